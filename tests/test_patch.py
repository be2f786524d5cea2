"""`idefics2_fast.patch`: a patched model beside the same model unpatched; what is left when it is undone; faults that must show."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from support.patched import (
    CASES,
    LATENTS,
    TOLERANCE,
    differences,
    evaluated,
    fresh,
    inputs_of,
    kept,
    relative,
    trained,
    with_adapter,
    worst,
)

import idefics2_fast
from idefics2_fast import Segments, layers, ops
from idefics2_fast.patching import vision

ALL = [(case, "left") for case in CASES]
BOTH_SIDES = [("a batch of all", "left"), ("a batch of all", "right")]
ADAPTERS = {
    "no adapter": (None, [*ALL, *BOTH_SIDES[1:]]),
    "LoRA": ({"bias": "lora_only", "modules_to_save": ["lm_head"]}, BOTH_SIDES),
    "DoRA": ({"use_dora": True}, BOTH_SIDES),
    "DoRA of rank 16": ({"use_dora": True, "r": 16}, [("one image", "left")]),
    "DoRA of rank 64": ({"use_dora": True, "r": 64, "use_rslora": True}, [("one image", "left")]),
    "DoRA of rank 128": ({"use_dora": True, "r": 128}, [("one image", "left")]),
}


@pytest.fixture(scope="module")
def model():
    return fresh()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_outputs_and_every_gradient(adapter):
    settings, cases = ADAPTERS[adapter]
    model = fresh() if settings is None else with_adapter(fresh(), **settings)
    before = kept(model)
    for case, side in cases:
        inputs = inputs_of(case, side)
        logits, step = evaluated(model, inputs), trained(model, inputs)
        with idefics2_fast.patch(model):
            assert relative(evaluated(model, inputs), logits) <= TOLERANCE, f"{case}, {side}"
            error, place = worst(trained(model, inputs), step)
        assert error <= TOLERANCE, f"{case}, {side}: {place}"
        assert torch.equal(evaluated(model, inputs), logits)
    assert differences(before, kept(model)) == []


def test_hugging_face_s_own_path_is_not_what_ran(model, monkeypatch):
    """The comparisons above would hold for a patch that does nothing."""
    from transformers.models.idefics2 import modeling_idefics2 as idefics2

    def refuse(*_, **__):
        raise AssertionError("transformers' own path")

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", refuse)
    monkeypatch.setattr(idefics2, "create_bidirectional_mask", refuse)
    monkeypatch.setattr(torch.Tensor, "masked_scatter", refuse)
    with idefics2_fast.patch(model):
        trained(model, inputs_of())


@pytest.mark.parametrize("off", ["attention", "perceiver", "fused_linear_cross_entropy"])
def test_each_switch_alone_may_be_off(model, off):
    inputs = inputs_of()
    logits, step = evaluated(model, inputs), trained(model, inputs)
    with idefics2_fast.patch(model, **{off: False}) as handle:
        assert relative(evaluated(model, inputs), logits) <= TOLERANCE
        assert worst(trained(model, inputs), step)[0] <= TOLERANCE
        assert ("model.vision_model" in handle.report()) == (off != "attention")
        assert ("model.connector.perceiver_resampler" in handle.report()) == (off != "perceiver")
        assert ("Idefics2ForConditionalGeneration" in handle.report()) == (off != "fused_linear_cross_entropy")


def test_all_switches_off_change_nothing(model):
    before = kept(model)
    switches = [name for name, p in inspect.signature(idefics2_fast.patch).parameters.items() if p.default is True]
    with idefics2_fast.patch(model, **dict.fromkeys(switches, False)):
        assert differences(before, kept(model)) == []


def test_image_features(model):
    """The features of each sample, and the tower's output where there are patches; zeros where there are none."""
    inputs = inputs_of()
    pixels, mask = inputs["pixel_values"], inputs["pixel_attention_mask"]
    with torch.no_grad():
        theirs = model.get_image_features(pixels, mask)
        with idefics2_fast.patch(model):
            ours = model.get_image_features(pixels, mask)
            assert isinstance(model.get_image_features(pixels, mask, return_dict=False), tuple)
            unmasked = model.get_image_features(pixels)
        expected = model.get_image_features(pixels)
    assert type(ours) is type(theirs)
    assert [f.shape for f in ours.pooler_output] == [f.shape for f in theirs.pooler_output]
    assert relative(torch.cat(ours.pooler_output), torch.cat(theirs.pooler_output)) <= TOLERANCE
    assert relative(torch.cat(unmasked.pooler_output), torch.cat(expected.pooler_output)) <= TOLERANCE
    assert relative(unmasked.last_hidden_state, expected.last_hidden_state) <= TOLERANCE
    whole = (mask.unfold(2, 14, 14).unfold(3, 14, 14).sum((-1, -2)) == 14 * 14).flatten(0, 1).flatten(1)
    there = whole[whole.any(1)]
    assert ours.last_hidden_state.shape == theirs.last_hidden_state.shape
    assert relative(ours.last_hidden_state[there], theirs.last_hidden_state[there]) <= TOLERANCE
    assert not ours.last_hidden_state[~there].any()


def test_positions_are_transformers_own_bits():
    """Idefics2VisionEmbeddings with a table whose rows are their numbers, no pixels."""
    model = fresh()
    side = model.config.vision_config.image_size // 14
    embeddings = model.model.vision_model.embeddings
    embeddings.position_embedding.weight.data[:, 0] = torch.arange(side**2).float()
    for grid in [(1, 1), (3, 70), (27, 27), (41, 53), (70, 70), (69, 35)]:
        mask = torch.ones(1, *grid, dtype=torch.bool)
        with torch.no_grad():
            rows = embeddings(torch.zeros(1, 3, 14 * grid[0], 14 * grid[1]), mask) - embeddings.patch_embedding.bias
        assert torch.equal(rows[0, :, 0].round().long(), vision._positions(*grid, side))


def test_images_in_groups_and_rows_in_blocks_are_all_together(model, monkeypatch):
    inputs = inputs_of()
    with idefics2_fast.patch(model):
        together = evaluated(model, inputs)
        monkeypatch.setattr(vision, "PATCHES", 30)
        monkeypatch.setattr(layers, "ROWS", 10)
        assert relative(evaluated(model, inputs), together) <= 1e-6


def test_the_same_bits_on_every_run(model):
    with idefics2_fast.patch(model):
        first, *others = (trained(model, inputs_of()) for _ in range(3))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_bf16_errs_no_more_than_transformers():
    model, inputs = fresh(dtype=torch.bfloat16), inputs_of(dtype=torch.bfloat16)
    theirs = evaluated(model, inputs)
    with idefics2_fast.patch(model):
        ours = evaluated(model, inputs)
    exact = evaluated(model.double(), inputs_of(dtype=torch.float64))
    off = lambda logits: (logits.double() - exact).square().mean().sqrt()  # noqa: E731
    assert off(ours) <= 1.5 * off(theirs)


# Faults that make an answer wrong in silence. Each is planted, and the comparison above must see it.


def attend_across_images(q, k, v, segments, **settings):
    return ATTEND(q, k, v, Segments.of_lengths([segments.total]), **settings)


def pool_across_images(q, k_context, v_context, k_latents, v_latents, images, **settings):
    shift = k_context.roll(images.lengths[0] // 2, 0), v_context.roll(images.lengths[0] // 2, 0)
    return POOL(q, *shift, k_latents, v_latents, images, **settings)


def merge_in_wrong_order(self, original, input_ids, inputs_embeds, image_hidden_states):
    return MERGE(self, original, input_ids, inputs_embeds, image_hidden_states.unflatten(0, (-1, LATENTS)).flip(0).flatten(0, 1))


def answers_of_other_rows(hidden, labels, *, shifted=False):
    return ROWS(hidden, labels, shifted=not shifted)


def factor(cls):
    return lambda self, x: 1.01 * FORWARDS[cls](self, x)


def mlp_in_place(self, x):
    out = FORWARDS["Idefics2VisionMLP"](self, x)
    x.data.mul_(1.01)
    return out


def idefics2():
    from transformers.models.idefics2 import modeling_idefics2

    return modeling_idefics2


ATTEND, POOL, ROWS = ops.segment_attention, ops.perceiver_attention, ops.answer_rows
MERGE, POSITIONS = vision.inputs_merger, vision._positions
FORWARDS = {name: getattr(idefics2(), name).forward for name in ("Idefics2RMSNorm", "Idefics2VisionMLP")}
FORWARDS["LayerNorm"] = torch.nn.LayerNorm.forward
FAULTS = {
    "rms norm off by 1 %": (idefics2().Idefics2RMSNorm, "forward", factor("Idefics2RMSNorm")),
    "layer norm off by 1 %": (torch.nn.LayerNorm, "forward", factor("LayerNorm")),
    "attention across image borders in the tower": (ops, "segment_attention", attend_across_images),
    "attention across image borders in the perceiver": (ops, "perceiver_attention", pool_across_images),
    "image features merged in the wrong order": (vision, "inputs_merger", merge_in_wrong_order),
    "position ids shifted by one": (vision, "_positions", lambda *grid: (POSITIONS(*grid) + 1) % 4900),
    "labels not shifted": (ops, "answer_rows", answers_of_other_rows),
    "an MLP that modifies its input in place": (idefics2().Idefics2VisionMLP, "forward", mlp_in_place),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_silent_error_is_seen(model, monkeypatch, fault):
    inputs = inputs_of("several images")
    step = trained(model, inputs)
    monkeypatch.setattr(*FAULTS[fault])
    with idefics2_fast.patch(model):
        assert worst(trained(model, inputs), step)[0] > 10 * TOLERANCE


# What is refused, and what is left to Hugging Face.


def test_unknown_arguments_and_models_are_refused(model):
    with pytest.raises(TypeError, match="attentoin"):
        idefics2_fast.patch(model, attentoin=False)
    with pytest.raises(ValueError, match="no Idefics2 in Linear"):
        idefics2_fast.patch(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="neftune_length is 'tokens'"):
        idefics2_fast.patch(model, neftune_length="tokens")
    before = kept(model)
    with idefics2_fast.patch(model), pytest.raises(ValueError, match="patched already"):
        idefics2_fast.patch(model)
    assert differences(before, kept(model)) == []
    idefics2_fast.patch(model).undo()


def test_a_model_within_others(model):
    from transformers.models.idefics2.modeling_idefics2 import Idefics2Model

    with idefics2_fast.patch(torch.nn.ModuleList([torch.nn.Linear(2, 2), model])) as handle:
        assert handle.report()["1.model.vision_model"] == "packed patches"
        with pytest.raises(ValueError, match="patched already"):
            idefics2_fast.patch(model.model)
    assert isinstance(model.model, Idefics2Model)
    with idefics2_fast.patch(model.model) as handle:
        assert "vision_model" in handle.report()


def test_placeholders_and_features_must_match(model):
    inputs = inputs_of("several images")
    short = inputs["input_ids"].clone()
    short[0, (short[0] == 32001).nonzero()[3]] = 5
    with idefics2_fast.patch(model), torch.no_grad():
        with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: 23, features: 24"):
            model(**inputs | {"input_ids": short})


def unusual(change: str) -> dict:
    inputs = inputs_of()
    mask = inputs["pixel_attention_mask"]
    match change:
        case "a hole in an image":
            mask[0, 0, 14:28, 14:28] = 0
        case "an image not at the top left":
            mask[2, 1] = mask[2, 1].roll(14, 0)
        case "a mask of twos":
            mask *= 2
        case "less than a patch":
            mask[2, 0, 10:] = 0
    return inputs


@pytest.mark.parametrize("change", ["a hole in an image", "an image not at the top left"])
def test_masks_of_other_shapes_go_hugging_face_s_way(model, caplog, change):
    inputs = unusual(change)
    expected = evaluated(model, inputs)
    with caplog.at_level(logging.WARNING, "idefics2_fast"), idefics2_fast.patch(model):
        assert torch.equal(evaluated(model, inputs), expected)
        evaluated(model, inputs)
    lines = [record.message for record in caplog.records if record.name == "idefics2_fast"]
    assert len(lines) == 1
    assert "not a rectangle of ones" in lines[0]
    with idefics2_fast.patch(model, strict=True), pytest.raises(ValueError, match="not a rectangle of ones"):
        evaluated(model, inputs)


@pytest.mark.parametrize(("change", "why"), [("a mask of twos", "not a rectangle"), ("less than a patch", "image 6 has")])
def test_masks_that_mean_nothing_are_refused_under_strict(model, change, why):
    with idefics2_fast.patch(model, strict=True), pytest.raises(ValueError, match=why):
        evaluated(model, unusual(change))


def test_images_of_padding_alone_are_text(model):
    """Hugging Face's tower cannot be without a single real image."""
    inputs = inputs_of("text")
    padding = {"pixel_values": torch.zeros(1, 1, 3, 56, 56), "pixel_attention_mask": torch.zeros(1, 1, 56, 56).long()}
    expected = evaluated(model, inputs)
    with idefics2_fast.patch(model, strict=True):
        assert torch.equal(evaluated(model, inputs | padding), expected)


def test_a_mask_of_floats_or_bools(model):
    inputs = inputs_of()
    with idefics2_fast.patch(model, strict=True):
        expected = evaluated(model, inputs)
        for dtype in (torch.bool, torch.bfloat16, torch.int32):
            assert torch.equal(evaluated(model, inputs | {"pixel_attention_mask": inputs["pixel_attention_mask"].to(dtype)}), expected)


def test_attention_dropout_is_left_to_hugging_face():
    model = fresh()
    with idefics2_fast.patch(model, strict=True):
        model.config.vision_config.attention_dropout = 0.1
        evaluated(model, inputs_of())
        with pytest.raises(ValueError, match=r"attention_dropout = 0.1 in Idefics2VisionConfig"):
            trained(model, inputs_of())


def test_hidden_states_of_the_tower_are_hugging_face_s(model):
    inputs = inputs_of()
    asked = {name: inputs[name] for name in ("pixel_values", "pixel_attention_mask")} | {"output_hidden_states": True}
    model = fresh()
    with idefics2_fast.patch(model, strict=True), torch.no_grad():
        assert len(model.get_image_features(**asked).hidden_states) == 4


def test_an_old_transformers_is_left_alone(model, monkeypatch):
    import transformers

    before = kept(model)
    monkeypatch.setattr(transformers, "__version__", "5.19.4")
    with pytest.raises(ValueError, match=r"transformers is 5.19.4, expected 5.20 or later"):
        idefics2_fast.patch(model, strict=True)
    for handle in (idefics2_fast.patch(model), idefics2_fast.patch_classes()):
        assert "5.19.4" in str(handle.report())
    assert differences(before, kept(model)) == []
