"""The engine against transformers with the same weights: logits, gradients, bf16, and faults that must show."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from support.hf import Sample, engine_of, positions_of, sample, to_batch, to_hf, unpad

from idefics2_fast import Batch, Idefics2, Idefics2Config, Segments, counters, ops, vision
from idefics2_fast.benchmarks.local_checkpoint import random_model

TINY = Idefics2Config.named("tiny")
FP32_LOGITS = 2e-5  # of the largest logit
FP32_GRADIENTS = 1e-4
BF16_GROWTH = 1.5  # our error over Hugging Face's, both against fp64


@pytest.fixture(scope="module")
def theirs():
    return random_model(TINY)


@pytest.fixture(scope="module")
def ours(theirs):
    return engine_of(theirs, TINY)


SPLIT = [(378, 490), (378, 491), (379, 490), (379, 491), (735, 980)]  # four crops and the whole
CASES = {
    "no image": [[]],
    "one image": [[(378, 504)]],
    "smallest and largest": [[(378, 378), (980, 980)]],
    "extreme aspect ratios": [[(378, 980), (980, 378)]],
    "three images": [[(378, 980), (500, 378), (653, 490)]],
    "split": [SPLIT],
    "a batch of all": [[(378, 504)], [], [(980, 378), (378, 378), (400, 401)]],
}


def samples_of(case: list[list[tuple[int, int]]]) -> list[Sample]:
    return [sample(sizes, TINY, text=5 + 4 * index, seed=index) for index, sizes in enumerate(case)]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@pytest.fixture(scope="module")
def expected(theirs) -> Callable[[str], torch.Tensor]:
    """Return a function from a case's name to transformers' logits, computed once a case."""

    @cache
    @torch.no_grad()
    def logits(name: str) -> torch.Tensor:
        samples = samples_of(CASES[name])
        return unpad(theirs(**to_hf(samples)).logits, samples)

    return logits


@torch.no_grad()
def logits_error(expected, ours, name: str, *, as_bytes: bool = True) -> float:
    return relative(ours(to_batch(samples_of(CASES[name]), TINY, as_bytes=as_bytes)), expected(name))


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "three images" else pytest.mark.slow) for name in CASES])
def test_logits_of_patches_in_floats_equal_transformers(expected, ours, name):
    assert logits_error(expected, ours, name, as_bytes=False) <= FP32_LOGITS


SLOW_CASES = ("smallest and largest", "extreme aspect ratios", "split")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW_CASES else ()) for name in CASES])
def test_logits_equal_transformers(expected, ours, name):
    assert logits_error(expected, ours, name) <= FP32_LOGITS


def test_logits_equal_the_eager_formula_under_a_sliding_window():
    config = Idefics2Config(TINY.vision, TINY.perceiver, type(TINY.text)(**{**vars(TINY.text), "sliding_window": 16}))
    theirs = random_model(config)
    theirs.set_attn_implementation("eager")
    samples = [sample([], config, text=90), sample([], config, text=13, seed=1)]
    with torch.no_grad():
        assert (
            relative(engine_of(theirs, config)(to_batch(samples, config)), unpad(theirs(**to_hf(samples)).logits, samples)) <= FP32_LOGITS
        )


def labelled(samples: list[Sample]) -> list[list[int]]:
    """Every other token after the first ten is trained; placeholders are not."""
    return [[t if i > 10 and i % 2 and t != TINY.image_token_id else -100 for i, t in enumerate(s.tokens)] for s in samples]


def gradients(theirs, ours, samples: list[Sample]) -> tuple[float, dict[str, float]]:
    labels, length = labelled(samples), max(len(s.tokens) for s in samples)
    padded = torch.tensor([[-100] * (length - len(row)) + row for row in labels])
    theirs.zero_grad(), ours.zero_grad()
    expected = theirs(**to_hf(samples), labels=padded).loss
    expected.backward()
    actual = ours.loss(to_batch(samples, TINY, labels=labels))
    actual.backward()
    known = ours.hf_gradients()
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert known.keys() == grads.keys()
    # A key's bias moves all scores of a query alike, so its gradient is zero but for rounding: measured by the query bias's.
    scales = {name: grads[name.replace("k_proj.bias", "q_proj.bias")].abs().max().item() for name in grads}
    errors = {name: (known[name] - grad).abs().max().item() / scales[name] for name, grad in grads.items()}
    return abs(actual.item() / expected.item() - 1), errors


@pytest.mark.parametrize("name", [pytest.param("three images", marks=pytest.mark.slow), "a batch of all"])
def test_loss_and_every_gradient_equal_transformers(theirs, ours, name):
    loss, errors = gradients(theirs, ours, samples_of(CASES[name]))
    assert loss <= 1e-6
    worst = max(errors, key=errors.get)
    assert errors[worst] <= FP32_GRADIENTS, f"{worst}: {errors[worst]:.1e}"


def test_text_alone_leaves_the_vision_tower_without_gradient(theirs, ours):
    samples = [sample([], TINY, text=40)]
    theirs.zero_grad(), ours.zero_grad()
    theirs(**to_hf(samples), labels=torch.tensor(labelled(samples))).loss.backward()
    ours.loss(to_batch(samples, TINY, labels=labelled(samples))).backward()
    trained = {name for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    assert trained == ours.hf_gradients().keys()


@torch.no_grad()
def bf16_growth() -> float:
    """Our bf16 error over Hugging Face's, root mean square, both against fp64 on the same bf16 weights and pixels."""
    theirs = random_model(TINY, dtype=torch.bfloat16)
    ours = engine_of(theirs, TINY)
    samples = [sample([(378, 378)], TINY), sample([(392, 420)], TINY, seed=1)]
    errors = [unpad(theirs(**to_hf(samples, torch.bfloat16)).logits, samples), ours(to_batch(samples, TINY))]
    exact = unpad(theirs.double()(**to_hf(samples, torch.float64)).logits, samples)
    of_hf, of_ours = ((logits.double() - exact).square().mean().sqrt().item() for logits in errors)
    return of_ours / of_hf


def test_bf16_errs_no_more_than_transformers():
    assert bf16_growth() <= BF16_GROWTH


def test_the_same_bits_on_every_run(ours):
    batch = to_batch(samples_of(CASES["a batch of all"]), TINY)
    with torch.no_grad():
        first = ours(batch)
        assert all(torch.equal(ours(batch), first) for _ in range(3))


def test_gradients_have_the_same_bits_on_every_run(ours):
    samples = samples_of(CASES["three images"])
    runs = []
    for _ in range(3):
        ours.zero_grad()
        ours.loss(to_batch(samples, TINY, labels=labelled(samples))).backward()
        runs.append({name: grad.clone() for name, grad in ours.hf_gradients().items()})
    assert all(torch.equal(runs[0][name], run[name]) for run in runs[1:] for name in runs[0])


def test_company_changes_nothing(ours):
    samples = samples_of(CASES["a batch of all"])
    with torch.no_grad():
        together = ours(to_batch(samples, TINY)).split([len(s.tokens) for s in samples])
        for sample_, logits in zip(samples, together, strict=True):
            assert relative(logits, ours(to_batch([sample_], TINY))) <= 1e-5


def test_compiles_in_one_graph(ours):
    batch = to_batch(samples_of(CASES["one image"]), TINY)
    with torch.no_grad():
        compiled = torch.compile(ours, backend="eager", fullgraph=True)
        assert relative(compiled(batch), ours(batch)) <= 1e-6


# Faults that make an answer wrong in silence. Each is planted, and the comparison above must see it.


def attend_across_images(q, k, v, segments, causal=False, **settings):
    if causal:
        return ATTEND(q, k, v, segments, causal=True, **settings)
    return ATTEND(q, k, v, Segments.of_lengths([segments.total]), **settings)


def pool_across_images(q, k_context, v_context, k_latents, v_latents, images, **settings):
    shift = k_context.roll(images.lengths[0] // 2, 0), v_context.roll(images.lengths[0] // 2, 0)  # half an image of the neighbour's keys
    return POOL(q, *shift, k_latents, v_latents, images, **settings)


def merge_in_wrong_order(self, batch: Batch):
    return ENCODE(self, batch).unflatten(0, (len(batch.images), -1)).flip(0).flatten(0, 1)


def shifted_positions(self, patches, positions):
    return EMBED(self, patches, (positions + 1) % TINY.vision.positions_per_side**2)


def norm_off(*arguments):
    return NORM(*arguments) * 1.01


class OffLayerNorm(torch.nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * 1.01


ATTEND, POOL, NORM = ops.segment_attention, ops.perceiver_attention, ops.rms_norm
EMBED, ENCODE = vision.PatchEmbedding.forward, Idefics2.encode_images
FAULTS = {
    "rms norm off by 1 %": (ops, "rms_norm", norm_off),
    "attention across image borders in the tower": (ops, "segment_attention", attend_across_images),
    "attention across image borders in the perceiver": (ops, "perceiver_attention", pool_across_images),
    "image features merged in the wrong order": (Idefics2, "encode_images", merge_in_wrong_order),
    "position ids shifted by one": (vision.PatchEmbedding, "forward", shifted_positions),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_silent_error_is_seen(expected, ours, monkeypatch, fault):
    monkeypatch.setattr(*FAULTS[fault])
    assert logits_error(expected, ours, "three images") > 10 * FP32_LOGITS


def test_a_layer_norm_off_by_one_percent_is_seen(expected, ours, monkeypatch):
    for layer in ours.vision_model.layers:
        monkeypatch.setattr(layer.layer_norm1, "__class__", OffLayerNorm)
    assert logits_error(expected, ours, "three images") > 10 * FP32_LOGITS


# Batches that cannot be right.


def test_image_and_placeholder_mismatches_are_named(ours):
    batch = to_batch([sample([(378, 378), (378, 392)], TINY)], TINY)
    without = {**vars(batch), "patches": None, "patch_positions": None, "images": None}
    with pytest.raises(ValueError, match=r"image_rows has shape \[128\], expected \[0\]: 0 images"):
        ours(Batch(**without))
    with pytest.raises(ValueError, match="the text has places for 2 images .* but 0 images are given"):
        ours(Batch(**{**without, "image_rows": None}))
    short = batch.token_ids.clone()
    short[20] = 5
    with pytest.raises(ValueError, match="image 0 has a run of .* placeholder tokens, expected 64"):
        ours(Batch(**{**vars(batch), "token_ids": short, "image_rows": None}))
    text = to_batch([sample([], TINY)], TINY)
    with pytest.raises(ValueError, match="the text has places for 0 images .* but 2 images are given"):
        ours(
            Batch(**{**vars(text), **{name: getattr(batch, name) for name in ("patches", "patch_positions", "images")}, "image_rows": None})
        )


def test_rows_found_are_rows_given(ours):
    batch = to_batch([sample([(378, 378), (378, 392)], TINY)], TINY)
    with torch.no_grad():
        assert torch.equal(ours(batch), ours(Batch(**{**vars(batch), "image_rows": None})))


def test_positions_restart_and_length_is_the_position_tables():
    assert positions_of(980, 980).tolist() == list(range(4900))


def test_sizes_have_the_published_parameters():
    with torch.device("meta"):
        model = Idefics2(Idefics2Config.named("idefics2-8b"))
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(model) == 8_402_768_112
    assert count(model.connector.modality_projection) == 91_750_400
    assert count(model.connector.perceiver_resampler) == 651_468_800


def test_fresh_weights_are_fit_to_train():
    torch.manual_seed(0)
    model = Idefics2(TINY)
    latents = model.connector.perceiver_resampler.latents
    assert latents.std(0).min() > 0  # alike latents would stay alike
    with torch.no_grad():
        logits = model(to_batch([sample([(378, 392)], TINY)], TINY))
    assert logits.isfinite().all()
    assert 0.5 < logits.std() < 2


def test_counters_stand_on_the_model(ours):
    batch = to_batch([sample([(378, 392)], TINY)], TINY)
    assert ours.forward_flops(batch) == counters.forward_flops(TINY, [len(batch.token_ids)], [27 * 28])
    assert ours.decode_bytes(10) == counters.decode_bytes(TINY, 10, 4)


def test_images_go_through_the_tower_in_groups(ours, monkeypatch):
    assert vision.by_total([3, 4, 9, 1, 1, 8], 8) == [[3, 4], [9], [1, 1], [8]]
    batch = to_batch(samples_of(CASES["a batch of all"]), TINY)
    with torch.no_grad():
        together = ours(batch)
        monkeypatch.setattr(vision, "PATCHES", 1)
        assert relative(ours(batch), together) <= 1e-6
