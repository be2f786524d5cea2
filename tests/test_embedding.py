"""Token embedding, image merge and NEFTune as one op: the formula, its gradients, and whose noise is whose."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kstest
from torch import Tensor

from idefics2_fast import Batch, Idefics2, Idefics2Config, ops
from idefics2_fast.kernels import embedding, philox
from idefics2_fast.kernels.segments import Segments
from idefics2_fast.ops import Noise

C, V = 24, 11
DOCUMENTS = Segments.of_lengths([4, 0, 7, 1])
IDS = torch.tensor([1, 3, 3, 0, 10, 9, 9, 9, 3, 1, 3, 2])
ROWS = torch.tensor([7, 5, 6])  # features need not come in the order of their places
IMPLEMENTATIONS = [pytest.param(embedding.cpu, id="cpu"), pytest.param(embedding.reference, id="reference")]
NOISE = Noise.of(DOCUMENTS, alpha=5.0, seed=3, step=4, token_base=2**33)


def tensors(dtype: torch.dtype = torch.float64, width: int = C) -> tuple[Tensor, Tensor]:
    """A table and the features of three placeholders, with gradients."""
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(rows, width, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for rows in (V, 3))


def by_hand(table: Tensor, features: Tensor, noise: Noise | None) -> Tensor:
    """The formula token by token, in fp64."""
    out = []
    for row, token in enumerate(IDS.tolist()):
        place = ROWS.tolist().index(row) if row in ROWS.tolist() else None
        x = table[token] if place is None else features[place]
        if noise is not None and (place is None or noise.images):
            u = philox.uniform(noise.seed, noise.step, noise.tokens[row : row + 1], C)[0] if noise.values is None else noise.values[row]
            length = int(noise.lengths[row])
            x = x + u.double() * (noise.alpha / math.sqrt(length * C)) if length else x
        out.append(x)
    return torch.stack(out)


def gradients(y: Tensor, *leaves: Tensor) -> list[Tensor]:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return list(torch.autograd.grad((y * weights).sum(), leaves))


# --- the formula ---

NOISES = {
    "none": None,
    "text": NOISE,
    "images too": replace(NOISE, images=True),
    "padding": replace(NOISE, lengths=NOISE.lengths * (IDS != 3)),
}


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_output_and_gradients_are_the_formulas(implementation, noise):
    table, features = tensors()
    expected = by_hand(table, features, noise)
    actual = implementation(IDS, table, features, ROWS, noise)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)
    for ours, theirs in zip(gradients(actual, table, features), gradients(expected, table, features), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_the_cpu_path_has_the_bits_of_the_reference(noise, dtype, monkeypatch):
    monkeypatch.setattr(embedding, "ROWS", 5)
    table, features = tensors(dtype)
    assert torch.equal(embedding.cpu(IDS, table, features, ROWS, noise), embedding.reference(IDS, table, features, ROWS, noise))
    gathered = table.detach().index_select(0, IDS)
    assert torch.equal(embedding.cpu(None, gathered, noise=noise), embedding.reference(IDS, table, noise=noise))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_added_in_fp32_and_rounded_once(dtype):
    table, features = tensors(dtype)
    exact = by_hand(table.double(), features.double(), NOISE)
    actual = ops.embedding(IDS, table, features, ROWS, NOISE)
    # the sum's rounding; the scale's, the product's and the sum's in fp32, of values of up to 4
    assert ((actual.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 4 * torch.finfo(torch.float32).eps).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradcheck(implementation):
    table, features = tensors(width=3)
    assert torch.autograd.gradcheck(lambda table, features: implementation(IDS, table, features, ROWS, NOISE), (table, features))
    gathered = torch.randn(len(IDS), 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, features: implementation(None, x, features, ROWS, NOISE), (gathered, features))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_injected_noise_gives_the_formula_exactly(implementation):
    table, features = tensors()
    values = torch.randn(len(IDS), C, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    scales = torch.tensor([5.0 * (1 / math.sqrt(length * C)) for length in NOISE.lengths.tolist()], dtype=torch.float64)
    scales[ROWS] = 0
    expected = table.index_select(0, IDS).index_copy(0, ROWS, features) + values * scales[:, None]
    assert torch.equal(implementation(IDS, table, features, ROWS, replace(NOISE, values=values)), expected)


# --- the gradient of the table ---


def test_a_token_s_gradient_is_summed_in_fp32():
    """300 times 1 in bf16 is 256 where the sum itself is bf16."""
    table = torch.zeros(4, C, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.tensor([1, 3] * 300)
    embedding.cpu(ids, table).sum().backward()
    assert torch.equal(table.grad, torch.tensor([0.0, 300, 0, 300], dtype=torch.bfloat16)[:, None].expand(4, C))


def test_places_of_features_give_the_table_nothing():
    table, features = tensors()
    of_table, of_features = gradients(embedding.cpu(IDS, table, features, ROWS, NOISE), table, features)
    assert (of_table[9] == 0).all()
    assert (of_features != 0).all()


@pytest.mark.parametrize("padding_idx", [0, 3, 8])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_idx_is_torch_s(implementation, padding_idx):
    """Hugging Face's Mistral has one: the padding token's row gets no gradient, the output is as ever."""
    table, _ = tensors()
    expected = F.embedding(IDS, table, padding_idx)
    actual = implementation(IDS, table, padding_idx=padding_idx)
    assert torch.equal(actual, expected)
    assert torch.allclose(*gradients(actual, table), *gradients(expected, table), rtol=0, atol=1e-14)


# --- whose noise is whose ---


def test_the_noise_is_uniform():
    """Kolmogorov-Smirnov at 1 % for U(-s, s), s by each document's own length."""
    documents = Segments.of_lengths([100, 300, 112])
    noise = Noise.of(documents, alpha=5.0, seed=1, step=2)
    y = ops.embedding(torch.zeros(512, dtype=torch.int64), torch.zeros(1, 256), noise=noise)
    for start, end, length in ((0, 100, 100), (100, 400, 300), (400, 512, 112)):
        scale = 5 / math.sqrt(length * 256)
        assert kstest((y[start:end] / scale).flatten().numpy(), "uniform", args=(-1, 2)).pvalue > 0.01


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("images", [False, True])
def test_one_shard_and_four_have_the_same_bits(implementation, images):
    """Shards of whole documents, each with its own images."""
    table, features = torch.randn(V, C), torch.randn(8, C)
    ids, rows = torch.arange(40) % V, torch.tensor([2, 3, 11, 12, 22, 23, 35, 36])
    lengths, settings = [6, 4, 10, 3, 7, 10], {"alpha": 5.0, "seed": -7, "step": 9, "images": images}
    whole = implementation(ids, table, features, rows, Noise.of(Segments.of_lengths(lengths), **settings, token_base=100))
    shards = []
    for start, documents in ((0, [6, 4]), (10, [10]), (20, [3, 7]), (30, [10])):
        noise = Noise.of(Segments.of_lengths(documents), **settings, token_base=100 + start)
        mine = ((rows >= start) & (rows < start + 10)).nonzero()[:, 0]
        shards.append(implementation(ids[start : start + 10], table, features[mine], rows[mine] - start, noise))
    assert torch.equal(whole, torch.cat(shards))


def test_a_document_s_noise_is_of_its_own_length():
    noise = Noise.of(DOCUMENTS, alpha=5.0, seed=0, step=0, token_base=7)
    assert noise.lengths.tolist() == [4] * 4 + [7] * 7 + [1]
    assert noise.tokens.tolist() == list(range(7, 19))


def test_hugging_face_s_mode_is_its_hook_on_the_padded_batch():
    """The same numbers from U(-1, 1): documents of 3 and 5 tokens, padded to 5 there."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    module = torch.nn.Embedding(V, C)
    module.neftune_noise_alpha = 5.0
    ids = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
    real = torch.tensor([0, 1, 2, 5, 6, 7, 8, 9])
    torch.manual_seed(5)
    expected = neftune_post_forward_hook(module, None, module(ids)).flatten(0, 1)[real]
    torch.manual_seed(5)
    values = torch.zeros(2, 5, C).uniform_(-1, 1).flatten(0, 1)[real]
    noise = Noise.of(Segments.of_lengths([3, 5]), alpha=5.0, seed=0, step=0, mode="huggingface")
    actual = ops.embedding(ids.flatten()[real], module.weight, noise=replace(noise, values=values))
    torch.testing.assert_close(actual, expected, rtol=0, atol=4 * torch.finfo(torch.float32).eps)


def test_the_model_embeds_documents_images_and_noise_in_one_place():
    model = Idefics2(Idefics2Config.named("tiny")).eval()
    latents, token = model.config.perceiver.n_latents, model.config.image_token_id
    batch = Batch.from_documents(
        [[5, 6], [7, *[token] * latents, 8, 9]],
        patches=torch.randint(0, 256, (6, 588), dtype=torch.uint8),
        patch_positions=torch.arange(6),
        images=Segments.of_lengths([6]),
    )
    noise = Noise.of(batch.documents, alpha=5.0, seed=1, step=2)
    with torch.no_grad():
        plain, features = model.embed(batch), model.encode_images(batch)
        noisy, all_noisy = model.embed(batch, noise=noise), model.embed(batch, noise=replace(noise, images=True))
    images = slice(3, 3 + latents)
    assert torch.equal(plain[images], features)
    assert torch.equal(plain[[0, 1, 2, -2, -1]], model.text_model.embed_tokens.weight[[5, 6, 7, 8, 9]])
    assert torch.equal(noisy[images], features)
    assert (noisy != plain).any(1).sum() == 5
    scales = (5 / (noise.lengths * plain.shape[1]).sqrt())[:, None]
    drawn = philox.uniform(1, 2, torch.arange(len(plain)), plain.shape[1])
    torch.testing.assert_close(all_noisy, plain + drawn * scales, rtol=0, atol=4 * torch.finfo(torch.float32).eps)


def test_an_image_that_no_token_stands_for_has_a_gradient_of_zeros():
    """A rank without images takes part in the backward pass of the vision tower."""
    model = Idefics2(Idefics2Config.named("tiny"))
    image = {"patches": torch.zeros(1, 588), "patch_positions": torch.zeros(1, dtype=torch.int64), "images": Segments.of_lengths([1])}
    model.embed(Batch.from_documents([[5, 6]], **image, image_rows=torch.zeros(0, dtype=torch.int64))).sum().backward()
    of_images = [parameter.grad for parameter in model.connector.parameters()]
    assert all(grad is not None and (grad == 0).all() for grad in of_images)


# --- what is refused ---


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_places_and_features_are_counted(implementation):
    table, features = tensors()
    with pytest.raises(ValueError, match="2 places for image features, but 3 features are given"):
        implementation(IDS, table, features, ROWS[:2])
    with pytest.raises(ValueError, match="3 places for image features, but 0 features"):
        implementation(IDS, table, None, ROWS)
    with pytest.raises(ValueError, match="0 places for image features, but 3 features"):
        implementation(IDS, table, features)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(3, C)}, r"features are torch.float32 \[3, 24\], expected torch.float64 \[3, 24\]"),
        ({"features": torch.zeros(3, 9, dtype=torch.float64)}, r"\[3, 9\], expected torch.float64 \[3, 24\]"),
        ({"noise": replace(NOISE, lengths=NOISE.lengths[1:])}, r"lengths \[11\] and tokens \[12\], expected \[12\]"),
        ({"noise": replace(NOISE, tokens=NOISE.tokens[1:])}, r"lengths \[12\] and tokens \[11\], expected \[12\]"),
        ({"noise": replace(NOISE, values=torch.zeros(12, 9))}, r"values are \[12, 9\], expected \[12, 24\]"),
    ],
)
def test_shapes_that_do_not_belong_together_are_named(change, message):
    table, features = tensors()
    arguments = {"features": features, "image_rows": ROWS, "noise": NOISE} | change
    with pytest.raises(ValueError, match=message):
        ops.embedding(IDS, table, **arguments)


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="mode of the noise is 'padded', expected one of document, huggingface"):
        Noise.of(DOCUMENTS, alpha=5.0, seed=0, step=0, mode="padded")


# --- as an operator of torch ---


def test_opcheck():
    """With all there is; with rows in another order of memory and nothing else."""
    table, features = tensors(torch.float32)
    operators, drawn = torch.ops.idefics2_fast, (NOISE.lengths, NOISE.tokens, None, 5.0, 3, 4, False)
    torch.library.opcheck(operators.embedding, (IDS, table, features, ROWS, *drawn, None))
    permuted = table.detach().T.contiguous().T.requires_grad_()
    torch.library.opcheck(operators.embedding, (None, permuted, None, None, None, None, None, 0.0, 0, 0, False, None))
    torch.library.opcheck(operators.embedding_table_grad, (torch.randn(len(IDS), C), IDS, ROWS, V, 3))


def test_one_graph_and_the_same_bits_twice():
    table, features = tensors(torch.float32)

    def results(function: Callable[..., Tensor]) -> list[Tensor]:
        y = function(IDS, table, features, ROWS, NOISE)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (table, features))]

    first, compiled = results(ops.embedding), torch.compile(ops.embedding, fullgraph=True, backend="aot_eager")
    for again in (results(ops.embedding), results(compiled)):
        assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))


def test_a_seed_is_64_bits_signed_or_not():
    x = torch.zeros(len(IDS), C)
    noises = [embedding.cpu(None, x, noise=replace(NOISE, seed=seed)) for seed in (-1, 2**64 - 1, 2**32 - 1)]
    assert torch.equal(noises[0], noises[1])
    assert not torch.equal(noises[0], noises[2])


def test_no_tokens_at_all():
    empty = torch.zeros(0, dtype=torch.int64)
    table, _ = tensors()
    y = ops.embedding(empty, table, noise=Noise.of(Segments.of_lengths([]), alpha=5.0, seed=0, step=0))
    assert y.shape == (0, C)
    assert (torch.autograd.grad(y.sum(), table)[0] == 0).all()


def test_what_is_chosen(monkeypatch):
    assert ops.choose("embedding", torch.zeros(1, C)) == "cpu"
    monkeypatch.setattr(ops, "_trusted", lambda op: True)
    on_card = ops._preferred.__wrapped__("embedding", "cuda", torch.bfloat16, 4096)
    assert on_card == ("triton" if ops._installed("triton") else "reference")
