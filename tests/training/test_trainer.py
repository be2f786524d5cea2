"""One step of the trainer: what its loss and gradients depend on, and what they must not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.steps import NEW, batch_of, document, gradients, packed, trainer_of
from torch import Tensor

from idefics2_fast import ops
from idefics2_fast.training.loader import make_batch
from idefics2_fast.training.parallel import Ranks, ranks
from idefics2_fast.training.planning import Planner
from idefics2_fast.training.samples import read_row

ROOT = Path(__file__).parents[2]
DOCUMENTS = [document(9, 3, patches=5), document(14, 8), document(6, 1, patches=12), document(11, 2)]


@pytest.fixture(scope="module")
def group() -> Iterator[Ranks]:
    with ranks() as group:
        yield group


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
    """Each gradient within `rtol` of its own norm: sums of some hundred fp32 products, in another order."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= rtol * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("packs", [[1, 3], [3, 1], [1, 1, 1, 1], [2, 2]], ids=str)
def test_the_loss_is_the_sum_over_the_global_count_whatever_the_packs(group, packs):
    """Dropout and NEFTune on. A mean of the packs' means, or noise scaled by the pack's length, is another number."""
    ends = [sum(packs[: index + 1]) for index in range(len(packs))]
    trainer = trainer_of(group, clip=1e6)
    losses = [trainer.accumulate(packed(DOCUMENTS), 3)]
    expected = gradients(trainer)
    trainer.skip()
    losses.append(trainer.accumulate(packed(*(DOCUMENTS[end - count : end] for end, count in zip(ends, packs, strict=True))), 3))
    assert losses[1].loss == pytest.approx(losses[0].loss, rel=1e-5)
    assert (losses[1].trained, losses[1].images) == (14, 2)
    assert losses[1].flops == losses[0].flops
    assert_close(gradients(trainer), expected)


def test_without_chance_the_loss_is_the_mean_over_the_answers(group):
    """No token is trained that has no label: user turns have none."""
    trainer = trainer_of(group, dropout=0.0, neftune_alpha=0.0)
    (batch,) = packed(DOCUMENTS)
    loss = trainer.accumulate([batch], 0).loss
    logits = trainer.model.eval()(batch).log_softmax(-1)
    trained = [row for row, label in enumerate(batch.labels.tolist()) if label != -100]
    expected = [-logits[row - 1, batch.token_ids[row]].item() for row in trained]
    assert len(expected) == 14
    assert loss == pytest.approx(sum(expected) / 14, rel=1e-5)


def test_noise_is_of_the_documents_length_and_not_the_packs(group):
    """NEFTune alone: a document has the same loss with a neighbour behind it."""
    trainer = trainer_of(group, dropout=0.0, neftune_alpha=50.0)
    alone = trainer.accumulate([batch_of(DOCUMENTS[1:2])], 1).loss
    neighbour = document(40, 1)
    silent = replace(neighbour, labels=[-100] * len(neighbour.ids))
    assert trainer.accumulate([batch_of([DOCUMENTS[1], silent])], 1).loss == pytest.approx(alone, rel=1e-5)
    assert trainer.accumulate([batch_of(DOCUMENTS[1:2])], 2).loss != pytest.approx(alone, rel=1e-4)


def test_a_document_does_not_attend_to_its_neighbour(group):
    trainer = trainer_of(group)
    losses = []
    for seed in (1, 2):
        first = document(12, 1, patches=7, seed=seed)
        losses.append(trainer.accumulate([batch_of([replace(first, labels=[-100] * len(first.ids)), DOCUMENTS[0]])], 0).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_targets_of_a_row_are_its_answers(processor):
    row = {"messages": [{"role": role, "content": text} for role, text in (("user", "river lamp"), ("assistant", "stone"))] * 2}
    document = Planner(processor, seed=0, tokens=200, patches=50)(read_row(row, "0"))
    batch = make_batch([(document, None)], processor)
    targets = processor.decode(batch.labels[batch.answer_rows + 1], skip_special_tokens=False)
    assert targets.replace(" ", "") == "stone<end_of_utterance>stone<end_of_utterance></s>"


def test_new_tokens_are_trained_and_no_other_row(group):
    trainer = trainer_of(group, trained=("new_tokens",), weight_decay=0.5)
    weights = {"embed": trainer.model.text_model.embed_tokens.weight, "head": trainer.model.lm_head.weight}
    before = {name: weight.full_tensor().clone() for name, weight in weights.items()}
    for step in range(2):
        trainer.accumulate(packed(DOCUMENTS), step)
        trainer.update(step)
    others = [row for row in range(64) if row not in NEW]
    for name, weight in weights.items():
        after = weight.full_tensor()
        assert torch.equal(after[others], before[name][others]), name
        changed = (after != before[name]).any(1)
        assert changed[NEW[0]], name
    assert not (weights["head"].full_tensor() == before["head"])[list(NEW)].all(1).any()


def test_what_is_trained_is_fp32_in_a_run_in_bf16(group, monkeypatch):
    used, combine = set(), ops.dora_combine

    def noting(base, h, b, magnitude, *others, **more):
        used.add((h.dtype, magnitude.dtype))
        return combine(base, h, b, magnitude, *others, **more)

    monkeypatch.setattr(ops, "dora_combine", noting)
    trainer = trainer_of(group, dtype="bfloat16", learning_rate=1e-5)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    before = {name: p.detach().clone() for name, p in trained.items()}
    trainer.accumulate(packed(DOCUMENTS), 0)
    assert used == {(torch.bfloat16, torch.float32)}
    assert {p.grad.dtype for p in trained.values() if p.grad is not None} == {torch.float32}
    trainer.update(0)
    magnitudes = [name for name in trained if name.endswith("magnitude")]
    assert magnitudes
    for name in magnitudes:  # a step of 1e-5 is below bf16's spacing at 1
        assert trained[name].dtype == torch.float32
        assert not torch.equal(trained[name], before[name]), name


def test_recomputed_activations_give_the_same_gradients(group):
    found = []
    for how in ("none", "selective", "full"):
        trainer = trainer_of(group, checkpointing=how)
        trainer.accumulate(packed(DOCUMENTS), 0)
        found.append(gradients(trainer))
    for other in found[1:]:
        assert all(torch.equal(gradient, other[name]) for name, gradient in found[0].items())


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "how"), [("dora", "none"), ("dora", "selective"), ("full", "full")])
def test_compiled_layers_give_the_losses_of_eager_ones(group, adapter, how):
    """Steps of different lengths; the graphs are really there, and few, however many steps there are."""
    from torch._dynamo.utils import counters

    found, graphs = [], []
    for compiled in (False, True):
        torch.compiler.reset()
        trainer = trainer_of(group, adapter=adapter, dropout=0.1 if adapter == "dora" else 0.0, checkpointing=how, compile=compiled)
        for step in range(5):
            losses = trainer.accumulate(packed(DOCUMENTS[: 2 + step % 3]), step)
            trainer.update(step)
            found.append((losses.loss, losses.grad_norm))
            graphs.append(counters["stats"]["unique_graphs"])
    assert torch.tensor(found[5:]).allclose(torch.tensor(found[:5]), rtol=1e-4)
    assert graphs[4] < graphs[5]
    assert graphs[-1] == graphs[-2] == graphs[-3]


def test_text_alone_gives_the_tower_no_gradient(group):
    trainer = trainer_of(group, weight_decay=0.0)
    trainer.accumulate([batch_of([DOCUMENTS[1]])], 0)
    tower = {name: grad for name, grad in gradients(trainer).items() if name.startswith(("vision_model", "connector"))}
    assert tower
    assert not any(grad.any() for grad in tower.values())


def test_a_step_that_trains_nothing_has_no_loss_and_no_gradient(group):
    trainer = trainer_of(group)
    losses = trainer.accumulate([batch_of([replace(DOCUMENTS[0], labels=[-100] * len(DOCUMENTS[0].ids))])], 0)
    assert (losses.loss, losses.grad_norm, losses.trained) == (0.0, 0.0, 0)


RANKS = """
import json, sys
import torch
from types import ModuleType
support = ModuleType("support"); support.__path__ = [sys.argv[1]]; sys.modules["support"] = support
from support.steps import document, packed, trainer_of
from idefics2_fast.training.parallel import ranks
documents = [document(9, 3, patches=5), document(14, 8), document(6, 1, patches=12), document(11, 2)]
batches = packed(documents[::2], documents[1::2])
with ranks() as group:
    trainer = trainer_of(group)
    for step in range(3):
        mine = batches[group.rank : group.rank + 1] if group.world > 1 else batches
        losses = trainer.accumulate(mine, step)
        trainer.update(step)
        if group.first:
            print(json.dumps([losses.loss, losses.grad_norm, losses.trained]))
"""


@pytest.mark.slow
def test_two_ranks_one_of_text_alone_give_the_losses_of_one():
    """Uneven counts of trained tokens, dropout and NEFTune on; three steps, so that magnitudes and norms move, too."""
    found = []
    for world in (1, 2):
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "--no-python"]
        command = [*(start if world > 1 else []), sys.executable, "-c", RANKS, str(ROOT / "tests" / "support")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append([json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")])
    assert len(found[0]) == 3
    for one, two in zip(*found, strict=True):
        assert two == pytest.approx(one, rel=1e-5)
