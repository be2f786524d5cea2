"""NEFTune under the patch: the generator against Random123's vectors, documents and padding, and the hook in transformers' Trainer."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn

from idefics2_fast.kernels import philox
from idefics2_fast.patching.neftune import Neftune, token_places

C = 24

# --- the generator ---


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    """The vectors that Random123 ships (kat_vectors, philox4x32 10)."""
    words = philox.philox(tuple(torch.tensor([word]) for word in counter), key)
    assert all(word.dtype == torch.int32 for word in words)
    assert tuple(int(word) & 0xFFFFFFFF for word in words) == expected


def philox_of_integers(counter: list[int], key: list[int]) -> list[int]:
    """The paper's algorithm in Python's integers."""
    for _ in range(10):
        low, high = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(high >> 32) ^ counter[1] ^ key[0], high & 0xFFFFFFFF, (low >> 32) ^ counter[3] ^ key[1], low & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


@pytest.mark.parametrize("seed", [0, 7, (0xDEAD << 32) + 0xBEEF, -3])
@pytest.mark.parametrize("step", [0, 5, 0xFFFFFFFF])
def test_uniform_maps_counters_and_words(seed, step):
    """Key: the seed; counter: column block, token (64 bits), step; column 4i + j takes word j, signed, over 2^31. Any width."""
    tokens = [0, 3, 2**31, 2**32 + 1, 2**40 + 5]
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    actual = philox.uniform(seed, step, torch.tensor(tokens), 10)
    assert (actual.shape, actual.dtype) == ((5, 10), torch.float32)
    for row, token in enumerate(tokens):
        words = [word for i in range(3) for word in philox_of_integers([i, token & 0xFFFFFFFF, token >> 32, step], key)]
        signed = np.array(words[:10], dtype=np.uint32).astype(np.int32)
        assert torch.equal(actual[row], torch.from_numpy(signed.astype(np.float32) * np.float32(2.0**-31)))


def test_the_noise_is_uniform_and_its_parts_are_independent(monkeypatch):
    """Kolmogorov-Smirnov at 1 % for U(-1, 1); rows, columns, steps and seeds do not correlate beyond 5 standard errors."""
    tokens = torch.arange(512)
    drawn = philox.uniform(1, 2, tokens, 256)
    assert kstest(drawn.flatten().numpy(), "uniform", args=(-1, 2)).pvalue > 0.01
    others = [philox.uniform(2, 2, tokens, 256), philox.uniform(1, 3, tokens, 256), philox.uniform(1, 2, tokens + 1, 256), drawn.roll(1, 1)]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([drawn.flatten(), other.flatten()]))[0, 1]) < 5 / math.sqrt(drawn.numel())
    monkeypatch.setattr(philox, "BLOCK", 100)
    assert torch.equal(philox.uniform(1, 2, tokens, 256), drawn)


# --- lengths and token indices ---


def places(mask: list | None, positions: list | None = None, shape: tuple[int, int] | None = None) -> tuple[list, list]:
    shape = shape or torch.tensor(mask).shape
    made = token_places(torch.zeros(shape), *(None if given is None else torch.tensor(given) for given in (mask, positions)))
    return made[0].tolist(), made[1].tolist()


@pytest.mark.parametrize("kind", [int, bool, float])
def test_a_row_without_its_padding_is_a_document(kind):
    right = [[kind(m) for m in row] for row in ([1, 1, 1, 0, 0], [1, 1, 1, 1, 0])]
    left = [[kind(m) for m in row] for row in ([0, 0, 1, 1, 1], [0, 1, 1, 1, 1])]
    assert places(right)[0] == [[3, 3, 3, 0, 0], [4, 4, 4, 4, 0]]
    assert places(left)[0] == [[0, 0, 3, 3, 3], [0, 4, 4, 4, 4]]
    indices = [[i for i, m in zip(row, real, strict=True) if m] for row, real in zip(places(left)[1], left, strict=True)]
    assert indices == [[0, 1, 2], [3, 4, 5, 6]]
    assert places(right)[1][1][:4] == [3, 4, 5, 6]


@pytest.mark.parametrize(
    ("mask", "positions", "expected"),
    [
        (None, [[0, 1, 2, 0, 1, 0]], [[3, 3, 3, 2, 2, 1]]),  # packed
        (None, [[0, 0, 1, 0, 1, 2]], [[1, 2, 2, 3, 3, 3]]),  # a document of one token
        (None, [[0, 1, 2, 3, 4, 5]], [[6] * 6]),
        ([[1] * 6, [1] * 6], [[0, 1, 2, 3, 0, 1]], [[4, 4, 4, 4, 2, 2]] * 2),  # one row of positions for all
        ([[0, 0, 1, 1, 1, 1]], [[1, 1, 0, 1, 0, 1]], [[0, 0, 2, 2, 2, 2]]),  # padded and packed
        ([[0, 0, 1, 1, 1, 1]], [[1, 1, 0, 1, 2, 3]], [[0, 0, 4, 4, 4, 4]]),  # as `generate` counts
        ([[1, 1, 0, 0, 1, 1]], [[0, 1, 1, 1, 2, 3]], [[4, 4, 0, 0, 4, 4]]),  # a hole is no border
        ([[1, 1, 0, 0, 1, 1]], [[0, 1, 2, 3, 4, 5]], [[4, 4, 0, 0, 4, 4]]),
        ([[1, 1, 0, 0, 1, 1]], [[0, 1, 0, 1, 0, 1]], [[2, 2, 0, 0, 2, 2]]),
        ([[0, 0, 0], [1, 1, 1]], None, [[0, 0, 0], [3, 3, 3]]),  # a row of padding
    ],
)
def test_documents_are_found(mask, positions, expected):
    assert places(mask, positions, (len(expected), len(expected[0])))[0] == expected


def test_a_longer_mask_ends_with_the_tokens():
    """As with a prefix in the cache."""
    assert places([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]], shape=(2, 3))[0] == [[0, 2, 2], [3, 3, 3]]


@pytest.mark.parametrize("shape", [(2, 1, 5, 5), (2, 4), (1, 5)])
def test_a_mask_that_does_not_tell_padding_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected|needs an attention_mask \[2, 5\]"):
        token_places(torch.zeros(2, 5), torch.ones(shape), None)


# --- the hook ---


class Model(nn.Module):
    """An embedding, called as a patched model calls it."""

    def __init__(self, neftune: Neftune) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, C)
        self.neftune = neftune

    def forward(self, ids: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        with self.neftune.forward(self.embedding, ids, mask, positions):
            return self.embedding(ids)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def noise(self, *args: Tensor) -> Tensor:
        return (self(*args) - self.embedding.weight[args[0]]).detach()


def activated(neftune: Neftune | None = None, alpha: float = 5.0) -> tuple[Model, torch.utils.hooks.RemovableHandle]:
    """A model as Trainer leaves it at the start of training."""
    from transformers.integrations.neftune import activate_neftune

    model = Model(neftune or Neftune(seed=1))
    return model.train(), activate_neftune(model, alpha)


IDS = torch.arange(12).view(2, 6)
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("length", ["document", "padded"])
@pytest.mark.parametrize("mask", [LEFT, LEFT.flip(1)], ids=["left", "right"])
def test_noise_is_the_documents_and_not_the_paddings(length, mask):
    model, _ = activated(Neftune(seed=1, length=length))
    noise = model.noise(IDS, mask)
    assert (noise[mask == 0] == 0).all()
    for row, tokens in enumerate((3, 5)):
        base = 0 if row == 0 else 3
        scale = 5 / math.sqrt((tokens if length == "document" else 6) * C)
        expected = philox.uniform(1, 0, torch.arange(base, base + tokens), C) * scale
        torch.testing.assert_close(noise[row][mask[row] == 1], expected, rtol=0, atol=1e-6)


def test_a_packed_row_has_the_noise_of_its_documents_apart():
    model, _ = activated()
    packed = model.noise(torch.arange(8)[None], None, torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]))
    model.neftune.step = 0
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    apart = model.noise(torch.tensor([[0, 0, 0, 1, 2], [3, 4, 5, 6, 7]]), mask)
    assert torch.allclose(packed[0], apart[mask == 1], rtol=0, atol=1e-6)


def test_no_noise_in_evaluation_and_other_noise_at_each_step():
    model, _ = activated()
    first, second = model.noise(IDS, LEFT), model.noise(IDS, LEFT)
    assert model.neftune.step == 2
    assert not torch.equal(first, second)
    model.eval()
    assert (model.noise(IDS, LEFT) == 0).all()
    assert model.neftune.step == 2
    model.train()
    model.neftune.step = 0
    assert torch.equal(model.noise(IDS, LEFT), first)


def test_the_embedding_twice_in_a_forward_has_the_same_noise():
    model, _ = activated()
    with model.neftune.forward(model.embedding, IDS, LEFT, None):
        assert torch.equal(model.embedding(IDS), model.embedding(IDS))
        assert torch.equal(model.embedding(IDS[0, 0]), model.embedding.weight[0])  # compared with by Idefics2


def test_outside_of_a_forward_each_call_is_a_step_of_whole_rows():
    model, _ = activated()
    model(IDS)
    noise = (model.embedding(IDS) - model.embedding.weight[IDS]).detach()
    torch.testing.assert_close(noise[1], philox.uniform(1, 1, torch.arange(6, 12), C) * 5 / math.sqrt(6 * C), rtol=0, atol=1e-6)
    assert model.neftune.step == 2


def test_a_forward_that_fails_leaves_nothing_behind():
    model, _ = activated()
    with pytest.raises(RuntimeError, match="later"), model.neftune.forward(model.embedding, IDS, LEFT, None):
        raise RuntimeError("later")
    assert model.neftune._places is None
    assert model.neftune.step == 0


def test_seeds_and_ranks_differ(monkeypatch):
    def noise(**settings: int) -> Tensor:
        return activated(Neftune(**settings))[0].noise(IDS, LEFT)

    torch.manual_seed(11)
    by_default = noise()
    assert torch.allclose(by_default, noise(seed=11), rtol=0, atol=1e-6)
    assert not torch.allclose(noise(seed=1), noise(seed=2), atol=1e-3)
    assert not torch.allclose(noise(seed=1), noise(seed=1, rank=1), atol=1e-3)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert torch.allclose(noise(seed=1), noise(seed=1, rank=1), rtol=0, atol=1e-6)


def test_without_transformers_hook_nothing_happens():
    model = Model(Neftune(seed=1)).train()
    assert (model.noise(IDS, LEFT) == 0).all()
    assert not model.embedding._forward_hooks
    assert model.neftune.step == 0


def test_the_hook_is_exchanged_under_its_handle_and_given_back():
    from transformers.integrations.neftune import deactivate_neftune, neftune_post_forward_hook

    model, handle = activated()
    other = model.embedding.register_forward_hook(lambda module, args, output: None)
    model(IDS, LEFT)
    assert model.embedding._forward_hooks[handle.id] is model.neftune
    assert list(model.embedding._forward_hooks) == [handle.id, other.id]
    model.neftune.undo(model.embedding)
    assert model.embedding._forward_hooks[handle.id] is neftune_post_forward_hook
    model(IDS, LEFT)
    deactivate_neftune(model, handle)
    assert list(model.embedding._forward_hooks) == [other.id]
    assert (model.noise(IDS, LEFT) == 0).all()
    model.neftune.undo(model.embedding)
    assert list(model.embedding._forward_hooks) == [other.id]


def test_copies_and_pickles_in_the_middle_of_training():
    model, handle = activated()
    model(IDS, LEFT)
    twin = copy.deepcopy(model)
    stored = pickle.loads(pickle.dumps(model))
    expected = model.noise(IDS, LEFT)
    assert torch.equal(twin.noise(IDS, LEFT), expected)
    assert torch.equal(stored.noise(IDS, LEFT), expected)
    alone = copy.deepcopy(model.embedding)  # the hook is a copy that this model's forward has to find
    original, model.embedding = model.embedding, alone
    model(IDS, LEFT)
    assert (model.noise(IDS, LEFT)[LEFT == 0] == 0).all()
    handle.remove()
    assert not original._forward_hooks


def test_under_modules_to_save():
    """PEFT trains a copy of the embedding: Trainer registers its hook on the wrapper."""
    from peft.utils import ModulesToSaveWrapper

    model = Model(Neftune(seed=1)).train()
    model.embedding = ModulesToSaveWrapper(model.embedding, "default").train()
    from transformers.integrations.neftune import activate_neftune, deactivate_neftune

    handle = activate_neftune(model, 5.0)
    noise = (model(IDS, LEFT) - model.embedding.modules_to_save["default"].weight[IDS]).detach()
    assert (noise[LEFT == 0] == 0).all()
    torch.testing.assert_close(noise[0, 3:], philox.uniform(1, 0, torch.arange(3), C) * 5 / math.sqrt(3 * C), rtol=0, atol=1e-6)
    deactivate_neftune(model, handle)
    assert not model.embedding._forward_hooks


def test_compiled_steps_have_the_noise_of_eager_ones():
    model, _ = activated()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        noises = [compiled(IDS, LEFT) - model.embedding.weight[IDS] for _ in range(3)]
        model.neftune.step = 0
        for noise in noises:
            assert torch.allclose(noise, model.noise(IDS, LEFT), rtol=0, atol=1e-6)
    assert model.neftune.step == 3


def test_an_unknown_length_is_named():
    with pytest.raises(ValueError, match="neftune_length is 'row', expected one of document, padded"):
        Neftune(length="row")


def test_in_trainer(tmp_path):
    """Through transformers' own Trainer with `neftune_noise_alpha`: ours while it trains, nothing left behind."""
    from transformers import Trainer, TrainingArguments

    class Regression(Model):
        def __init__(self) -> None:
            super().__init__(Neftune())
            self.seen: list[Tensor] = []

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
            out = super().forward(input_ids, attention_mask)
            self.seen.append((out - self.embedding.weight[input_ids]).detach())
            return {"loss": out.square().mean()}

    model = Regression()
    rows = [{"input_ids": IDS[i % 2], "attention_mask": LEFT[i % 2], "labels": IDS[i % 2]} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), neftune_noise_alpha=5.0, max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2]).train()
    assert len(model.seen) == model.neftune.step == 3
    assert all((noise != 0).sum() in (6 * C, 8 * C, 10 * C) for noise in model.seen)  # documents of 3 and 5 tokens
    assert not model.embedding._forward_hooks
