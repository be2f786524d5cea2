"""The counters against the model itself: its parameters, torch's own count of FLOPs, and the memory of a real cache."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.hf import sample, to_batch
from torch.utils.flop_counter import FlopCounterMode

from idefics2_fast import Batch, Idefics2, Idefics2Config, ops
from idefics2_fast.cache import KVCache
from idefics2_fast.counters import Parts, cache_bytes_per_token, count_parameters, decode_bytes, forward_flops
from idefics2_fast.generate import prefill

TINY = Idefics2Config.named("tiny")
# No two sizes alike, so that none can stand for another.
ODD = Idefics2Config(
    vision=replace(TINY.vision, hidden_size=40, intermediate_size=104, num_hidden_layers=2, num_attention_heads=5, image_size=98),
    perceiver=replace(TINY.perceiver, n_latents=6, depth=3, n_heads=6, head_dim=12, num_key_value_heads=3),
    text=replace(
        TINY.text, hidden_size=48, intermediate_size=88, num_hidden_layers=4, num_attention_heads=6, head_dim=10, sliding_window=9
    ),
)


@pytest.mark.parametrize("config", [ODD, *map(Idefics2Config.named, ("tiny", "small", "idefics2-8b"))])
def test_parameters_are_the_models(config: Idefics2Config) -> None:
    with torch.device("meta"):
        model = Idefics2(config)
    connector = model.connector
    modules = (model.vision_model, connector.modality_projection, connector.perceiver_resampler, model.text_model, model.lm_head)
    assert count_parameters(config) == tuple(sum(p.numel() for p in module.parameters()) for module in modules)
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())


def test_the_released_geometry_has_its_printed_size() -> None:
    parameters = count_parameters(Idefics2Config.named("idefics2-8b"))
    assert parameters.total == 8_402_768_112
    assert (parameters.connector, parameters.projection, parameters.perceiver) == (743_219_200, 91_750_400, 651_468_800)


SIZES = {"three images": [[(56, 84)], [(70, 42), (28, 14)], []], "text alone": [[], []]}


@pytest.fixture(params=SIZES)
def batch(request: pytest.FixtureRequest) -> Batch:
    return to_batch([sample(sizes, ODD, text=4 + i, seed=i) for i, sizes in enumerate(SIZES[request.param])], ODD)


def patches_of(batch: Batch) -> list[int]:
    return [] if batch.images is None else batch.images.lengths


def count_flops(run: Callable[[], object]) -> FlopCounterMode:
    """torch has no formula for attention on a CPU: the matrix products of the reference implementations are counted in its place."""
    with (
        FlopCounterMode(display=False) as counter,
        ops.using(segment_attention="reference", perceiver_attention="reference"),
        torch.no_grad(),
    ):
        run()
    return counter


def masked_flops(config: Idefics2Config, documents: list[int]) -> int:
    """What the reference spends on pairs that a causal, windowed mask hides: it multiplies all n * n."""
    text, hidden = config.text, 0
    for n in documents:
        row, column = torch.arange(n)[:, None], torch.arange(n)
        hidden += int(((column > row) | (column <= row - (text.sliding_window or n))).sum())
    return 2 * 2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * hidden


@pytest.mark.parametrize("window", [9, None])
def test_flops_of_every_part_are_torchs_without_the_masked_pairs(batch: Batch, window: int | None) -> None:
    config = replace(ODD, text=replace(ODD.text, sliding_window=window))
    model, lengths = Idefics2(config), batch.documents.lengths
    counts = count_flops(lambda: model(batch)).get_flop_counts()
    of = lambda name: sum(counts.get(f"Idefics2.{name}", {}).values())  # noqa: E731
    projection = of("connector.modality_projection")
    text = of("text_model") - masked_flops(config, lengths)
    expected = Parts(of("vision_model"), projection, of("connector") - projection, text, of("lm_head"))
    assert forward_flops(config, lengths, patches_of(batch)) == expected
    assert expected.total == sum(counts["Global"].values()) - masked_flops(config, lengths)


def test_prefill_makes_logits_of_one_row_a_document(batch: Batch) -> None:
    model, lengths = Idefics2(ODD), batch.documents.lengths
    cache = KVCache(ODD.text, lengths, dtype=torch.float32, device="cpu")
    theirs = count_flops(lambda: prefill(model, batch, cache)).get_total_flops()
    assert forward_flops(ODD, lengths, patches_of(batch), head_rows=len(lengths)).total == theirs - masked_flops(ODD, lengths)


def test_flops_of_a_full_size_image_by_hand() -> None:
    """4900 patches and 96 tokens, with the numbers of the model's table written out."""
    flops = forward_flops(Idefics2Config.named("idefics2-8b"), [96], [4900], head_rows=1)
    vision = 4900 * 588 * 1152 + 27 * (4900 * (4 * 1152 * 1152 + 2 * 1152 * 4304) + 2 * 1152 * 4900 * 4900)
    context, latents = 4900 * 2 * 384 * 4096, 64 * (2 * 1536 * 4096 + 2 * 384 * 4096 + 3 * 4096 * 16384)
    perceiver = 3 * (context + latents + 2 * 1536 * 64 * (4900 + 64))
    text = 32 * (96 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336) + 2 * 4096 * (96 * 97 // 2))
    projection = 4900 * (2 * 1152 * 14336 + 14336 * 4096)
    assert flops == tuple(2 * part for part in (vision, projection, perceiver, text, 4096 * 32003))


@pytest.mark.parametrize("bytes_per_value", [2, 4])
def test_cache_bytes_are_those_of_a_cache(bytes_per_value: int) -> None:
    dtype = {2: torch.bfloat16, 4: torch.float32}[bytes_per_value]
    cache = KVCache(ODD.text, [5, 3], dtype=dtype, device="cpu")
    assert cache_bytes_per_token(ODD, bytes_per_value) * 8 == cache.k.nbytes + cache.v.nbytes


@pytest.mark.parametrize(("context_length", "seen"), [(1, 1), (9, 9), (10, 9)])
def test_decoding_reads_one_row_of_the_embedding_all_other_weights_and_the_window(context_length: int, seen: int) -> None:
    model = Idefics2(ODD)
    embedding = model.text_model.embed_tokens.weight
    read = [*model.text_model.layers.parameters(), *model.text_model.norm.parameters(), model.lm_head.weight, embedding[0]]
    cache = KVCache(ODD.text, [seen], dtype=torch.float32, device="cpu")
    assert decode_bytes(ODD, context_length, 4) == sum(weight.nbytes for weight in read) + cache.k.nbytes + cache.v.nbytes
    unbounded = replace(ODD, text=replace(ODD.text, sliding_window=None))
    assert decode_bytes(unbounded, 50, 4) - decode_bytes(unbounded, 49, 4) == cache_bytes_per_token(ODD, 4)
