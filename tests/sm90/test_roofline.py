"""The formulas of floors against what the compiled kernels requested and computed, at shapes that fill whole tiles."""

import pytest
import torch

from idefics2_fast.benchmarks.sm90 import roofline
from idefics2_fast.benchmarks.sm90.launches import executed, launches
from idefics2_fast.kernels.embedding import Noise
from idefics2_fast.kernels.segments import Segments


def counted(function, *args, of=None):
    """FLOPs and bytes of all launches; bytes of the arguments `of` alone, where every thread of a row reads the row's index."""
    with launches(executed()) as run:
        function(*args)
    total = sum(run.counts[1:], run.counts[0])
    return sum(total.flops.values()), sum(total.bytes(argument=name) for name in of or [None])


def drawn(*shape):
    return torch.randn(*shape).bfloat16()


def test_perceiver_context():
    from idefics2_fast.kernels.perceiver_context_triton import forward

    flops, moved = counted(forward, drawn(128, 192), drawn(256, 192), 1e-5, of=["x", "weight", "y"])
    work = roofline.perceiver_context(128, 192, 256)
    assert flops == work.flops
    assert moved == work.bytes - 4 * 128 + 2 * 128 * 192, "x once more than the least, for its rows' squares; without the rows' scales"


def test_segment_attention():
    from idefics2_fast.kernels.segment_attention_triton import forward

    rows, heads, head_dim = 128, 2, 64
    q, k, v = drawn(rows, 3, heads, head_dim).unbind(1)
    flops, moved = counted(forward, q, k, v, torch.tensor([0, rows], dtype=torch.int32), False, 0, 0.1, of=["q", "k", "v"])
    work = roofline.segment_attention(rows, heads=heads, head_dim=head_dim)
    assert flops == work.flops
    assert moved == work.bytes - 2 * rows * heads * head_dim - 4 * rows * heads, "all but the output and its statistics"


def test_perceiver_attention():
    from idefics2_fast.kernels.perceiver_attention_triton import forward

    patches, latents, heads, head_dim = 128, 64, 2, 96
    keys, own = drawn(patches, 2, heads, head_dim).unbind(1), drawn(latents, 2, heads, head_dim).unbind(1)
    offsets = torch.tensor([0, patches], dtype=torch.int32)
    read = ["q", "k_context", "v_context", "k_latents", "v_latents"]
    flops, moved = counted(forward, drawn(latents, heads, head_dim), *keys, *own, offsets, patches, 0.1, of=read)
    work = roofline.perceiver_attention(1, patches, latents=latents, heads=heads, kv_heads=heads, head_dim=head_dim)
    assert flops == work.flops
    assert moved == work.bytes - 2 * latents * heads * head_dim - 4 * latents * heads, "all but the output and its statistics"


@pytest.mark.parametrize("noisy", [False, True])
def test_embedding(noisy):
    from idefics2_fast.kernels.embedding_triton import forward

    tokens, width = 48, 1024
    noise = Noise.of(Segments.of_lengths([tokens]), alpha=5.0, seed=1, step=2) if noisy else None
    _, moved = counted(
        forward, torch.arange(tokens) % 7, drawn(7, width), drawn(5, width), torch.arange(5), noise, of=["out", "table", "features"]
    )
    assert moved == pytest.approx(roofline.embedding(tokens, width, noise=noisy).bytes, rel=0.01)


def test_embedding_backward():
    from idefics2_fast.kernels.embedding_triton import table_grad

    tokens, vocabulary, width = 48, 16, 1024
    _, moved = counted(table_grad, drawn(tokens, width), torch.arange(tokens) % vocabulary, None, vocabulary, None, of=["out", "grad"])
    assert moved == pytest.approx(roofline.embedding_backward(tokens, vocabulary, width).bytes, rel=0.01)


def test_softmax():
    from idefics2_fast.kernels.linear_cross_entropy_triton import room, softmax

    rows, classes = 2, 32003
    logits = room(torch.zeros(0), classes, rows, torch.bfloat16).normal_()
    _, moved = counted(softmax, logits, torch.arange(rows), None, -100, 0.0, True, of=["logits"])
    assert moved == pytest.approx(roofline.softmax(rows, classes).bytes, rel=0.02)


def test_dora_linear(monkeypatch):
    from idefics2_fast.kernels import dora_linear_triton

    rows, width, outs, rank = 128, 192, 256, 64
    monkeypatch.setattr(dora_linear_triton, "FULL", 1)
    tensors = drawn(rows, width), drawn(rows, rank), drawn(outs, width), drawn(outs, rank), torch.ones(outs), None
    flops, moved = counted(dora_linear_triton.forward, *tensors, of=["x", "h", "weight", "b", "y"])
    work = roofline.dora_linear(rows, width, outs, rank)
    assert flops == work.flops - 2 * rows * width * rank, "all but h"
    assert moved == work.bytes - 2 * rank * width + 2 * rows * rank, "h and not A"


def test_dora_norm():
    from idefics2_fast.kernels.dora_linear_triton import TERMS, cross

    outs, width, rank = 256, 128, 64
    flops, moved = counted(cross, drawn(outs, width), torch.randn(rank, width), torch.randn(outs, rank), of=["weight"])
    work = roofline.dora_norm(outs, width, rank)
    assert flops == TERMS * work.flops
    assert moved == work.bytes - 4 * rank * (outs + width) - 8 * outs, "W once, beside which the others are small"


def test_a_floor_is_the_slower_of_the_two():
    assert roofline.Work(roofline.TENSOR, roofline.MEMORY / 2).floor == 1
    assert roofline.Work(roofline.TENSOR, roofline.MEMORY / 2).bound == "compute"
    assert roofline.Work(roofline.TENSOR, roofline.MEMORY * 2).floor == 2
    assert roofline.Work(roofline.TENSOR, roofline.MEMORY * 2).bound == "memory"


@pytest.mark.parametrize(
    ("work", "floor"),
    [
        (roofline.perceiver_context(4900, 4096, 2304), 116e-6),
        (roofline.segment_attention(4900), 138e-6),
        (roofline.segment_attention(4900, backward=True), 346e-6),
        (roofline.perceiver_attention(1, 4900), 2.7e-6),
        (roofline.perceiver_attention(8, 4900), 21e-6),
        (roofline.perceiver_attention(8, 4900, backward=True), 49e-6),
        (roofline.dora_linear(8192, 4096, 4096, 64), 354e-6),
        (roofline.dora_linear(8192, 4096, 14336, 64), 1.225e-3),
        (roofline.dora_norm(4096, 4096, 64), 11.9e-6),
        (roofline.dora_norm(14336, 4096, 64), 40.7e-6),
        (roofline.embedding(8192, 4096), 45e-6),
        (roofline.linear_cross_entropy(2048, 4096, 32003), 1.34e-3),
    ],
)
def test_floors_known_by_hand(work, floor):
    assert work.floor == pytest.approx(floor, rel=0.02)


def test_the_page_shows_the_present_floors_and_kernels():
    text = roofline.PAGE.read_text()
    for line in roofline.LINES:
        assert f"| {line.title} | {line.work.flops / 1e9:.1f} | {line.work.bytes / 1e6:.1f} | {line.work.floor * 1e6:.1f} " in text
    assert roofline.resources.markdown(roofline.resources.recorded_table()[1]) in text
