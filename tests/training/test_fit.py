"""Whole runs on a tiny model: losses, resuming, what a run leaves behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields, replace
from html import escape
from pathlib import Path

import pytest
import torch

from idefics2_fast import Idefics2, Processor
from idefics2_fast.adapter_files import load_adapters
from idefics2_fast.training import Recipe, fit, instruct
from idefics2_fast.training import run as run_module
from idefics2_fast.training.parallel import Ranks
from idefics2_fast.training.sources import open_source
from idefics2_fast.training.trainer import Losses, Trainer


def recipe_of(corpus: Path, out: Path, **changes) -> Recipe:
    settings = {"steps": 6, "tokens": 300, "patches": 400, "packs": 2, "rank": 4, "dtype": "float32", "warmup": 2, "save_every": 3}
    return instruct(corpus / "model", corpus / "data.jsonl", out, **{"learning_rate": 1e-3, "workers": 2, **settings, **changes})


def metrics(out: Path) -> list[tuple[int, float, float]]:
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records]


class Crash(RuntimeError):
    pass


@pytest.mark.slow
def test_a_run_that_crashed_goes_on_bit_by_bit(corpus, tmp_path, monkeypatch):
    keys = {"whole": [], "broken": []}
    accumulate = Trainer.accumulate

    def note(kind, crash_at=None):
        def noting(self, batches, step):
            if step == crash_at:
                raise Crash
            keys[kind].append((step, tuple(key for batch in batches for key in batch.sample_keys)))
            return accumulate(self, batches, step)

        return noting

    monkeypatch.setattr(Trainer, "accumulate", note("whole"))
    whole = fit(recipe_of(corpus, tmp_path / "whole"))
    monkeypatch.setattr(Trainer, "accumulate", note("broken", crash_at=4))
    with pytest.raises(Crash):
        fit(recipe_of(corpus, tmp_path / "broken"))
    del keys["broken"][3:]  # step 3 was done after the checkpoint, and is done again
    monkeypatch.setattr(Trainer, "accumulate", note("broken"))
    broken = fit(recipe_of(corpus, tmp_path / "broken"))
    assert whole.steps == broken.steps == 6
    assert keys["whole"] == keys["broken"]
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "broken")
    weights = [(out.weights / "adapter_model.safetensors").read_bytes() for out in (whole, broken)]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.parametrize("roll_back", [True, False])
def test_a_jump_of_the_loss_goes_back_or_does_not(corpus, tmp_path, monkeypatch, roll_back):
    """While the loader is at work, threads take short turns; after the run they are as they were."""
    turns = []

    def accumulate(self, batches, step):
        turns.append(sys.getswitchinterval())
        loss = 9.0 if step == 18 else 1.0
        return Losses(loss, loss, 1.0, trained=1, images=0, flops=1.0)

    monkeypatch.setattr(Trainer, "accumulate", accumulate)
    before = sys.getswitchinterval()
    recipe = recipe_of(corpus, tmp_path, steps=20, save_every=20, roll_back=roll_back)
    with pytest.raises(ValueError, match="loss 9 where the median") if roll_back else nullcontext():
        assert fit(recipe).steps == 20
    assert len(turns) == (19 if roll_back else 20)
    assert max(turns) < before
    assert sys.getswitchinterval() == before


@pytest.mark.slow
def test_another_recipe_is_refused_in_the_same_folder(corpus, tmp_path):
    fit(recipe_of(corpus, tmp_path, steps=3))
    with pytest.raises(ValueError, match="recipe"):
        fit(recipe_of(corpus, tmp_path, steps=3, rank=2))


@pytest.mark.parametrize("adapter", ["dora", pytest.param("full", marks=pytest.mark.slow)])
def test_what_a_run_leaves_behind_is_what_was_trained(corpus, tmp_path, adapter):
    trainers, base = [], tmp_path / "base"
    shutil.copytree(corpus / "model", base)
    (base / "generation_config.json").write_text(json.dumps({"bad_words_ids": [[32001]], "max_new_tokens": 7}))
    init = Trainer.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "__init__", lambda self, *args, **others: (trainers.append(self), init(self, *args, **others))[1])
        result = fit(replace(recipe_of(corpus, tmp_path, adapter=adapter, steps=3), model=str(base)))
    if adapter == "full":
        loaded = Idefics2.from_pretrained(result.weights)
        assert loaded.generation_config.items() >= {"bad_words_ids": [[32001]], "max_new_tokens": 7}.items()
    else:
        loaded = Idefics2.from_pretrained(corpus / "model")
        load_adapters(loaded, result.weights)
    batch = Processor.from_pretrained(result.weights)("river stone")
    with torch.no_grad():
        trained = trainers[0].model.eval()
        for module in trained.modules():
            getattr(module, "unshard", lambda: None)()
        torch.testing.assert_close(loaded(batch), trained(batch), rtol=0, atol=1e-5)
        before = Idefics2.from_pretrained(corpus / "model")(batch)
        assert not torch.allclose(loaded(batch), before, atol=1e-3)


# Runs of a recipe one after another, each told to end (SIGTERM) in the step after which `stop` are done.
# Ranks are forked, with the environment that torchrun gives them, so that modules are imported once.
WORKER = """
import json, os, signal, socket, sys, traceback
import torch._dynamo, transformers, idefics2_fast.training.run
from idefics2_fast.training import fit, instruct
from idefics2_fast.training.trainer import Trainer
model, data, changes, runs = sys.argv[1:]
update = Trainer.update

def rank(number, out, world, stop):
    def updated(self, step):
        if step + 1 == stop:
            signal.raise_signal(signal.SIGTERM)
        return update(self, step)
    Trainer.update = updated
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world)}
    assert fit(instruct(model, data, out, **json.loads(changes))).steps == stop

for out, world, stop in json.loads(runs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for number in range(world):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                rank(number, out, world, stop)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * world
"""


def run(corpus: Path, runs: list[tuple[Path, int, int]], **changes) -> None:
    """Runs of one recipe: the folder of each, its number of ranks, and the step at which it is told to end."""
    recipe = recipe_of(corpus, runs[0][0], **changes)
    settings = {entry.name: getattr(recipe, entry.name) for entry in fields(recipe) if entry.name not in ("model", "data", "out")}
    given = [json.dumps(settings), json.dumps([(str(out), world, stop) for out, world, stop in runs])]
    done = subprocess.run(
        [sys.executable, "-c", WORKER, recipe.model, recipe.data, *given], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one_whatever_the_world_was_before(corpus, tmp_path):
    """1 -> 2 -> 1 ranks over a resumed run, dropout and noise on, some packs without an image."""
    changes = {"packs": 4, "tokens": 160, "patches": 450, "dropout": 0.1}
    moving = [(tmp_path / "changing", world, stop) for world, stop in ((1, 2), (2, 4), (1, 6))]
    run(corpus, [(tmp_path / "one", 1, 6), *moving], **changes)
    one, changing = metrics(tmp_path / "one"), metrics(tmp_path / "changing")
    assert [step for step, _, _ in changing] == [1, 2, 3, 4, 5, 6]
    for (_, loss, norm), (_, other, other_norm) in zip(one, changing, strict=True):
        assert other == pytest.approx(loss, rel=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-4)


@pytest.mark.slow
def test_rows_held_out_are_not_seen_and_are_answered(corpus, tmp_path, monkeypatch):
    seen, accumulate = set(), Trainer.accumulate

    def noting(self, batches, step):
        seen.update(key for batch in batches for key in batch.sample_keys)
        return accumulate(self, batches, step)

    monkeypatch.setattr(Trainer, "accumulate", noting)
    fit(recipe_of(corpus, tmp_path, steps=4, held_out=10))
    assert seen
    assert seen <= {f"data.jsonl:{line}" for line in range(1, 51)}
    report = (tmp_path / "report.html").read_text()
    assert "of 10 answers" in report
    rows = [json.loads(line) for line in (corpus / "data.jsonl").read_text().splitlines()[-10:]]
    assert all(escape(row["texts"][0]["assistant"]) in report for row in rows)
    assert report.count("data:image/jpeg") == sum(len(row["images"]) for row in rows)
    with pytest.raises(ValueError, match="held_out is 60, expected fewer than the 60 rows"):
        fit(recipe_of(corpus, tmp_path / "b", held_out=60))


@pytest.mark.slow
def test_two_ranks_answer_the_rows_held_out_as_one_does(corpus, tmp_path):
    """As users start it. The first rank writes the report; the weights agree to rounding, so the greedy answers are the same."""
    shown = []
    for world in (1, 2):
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
        start = [sys.executable, *several, "-m", "idefics2_fast.training"]
        places = ["--model", corpus / "model", "--data", corpus / "data.jsonl", "--out", tmp_path / str(world)]
        flags = "--steps 3 --warmup 0 --tokens 300 --patches 400 --packs 2 --rank 4 --dtype float32 --held-out 5".split()
        subprocess.run([*start, "instruct", *map(str, places), *flags], check=True, capture_output=True, timeout=300)
        report = (tmp_path / str(world) / "report.html").read_text()
        shown.append(report[report.index("Rows held out") : report.index("<h2>Recipe")])
    assert "of 5 answers" in shown[0]
    assert shown[0] == shown[1]


def test_ranks_that_cannot_share_the_packs_are_refused_before_any_work(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "ranks", lambda: nullcontext(Ranks(0, 3, torch.device("cpu"))))
    monkeypatch.setattr(Idefics2, "from_pretrained", lambda *_, **__: pytest.fail("the model was read"))
    with pytest.raises(ValueError, match="packs is 2, expected a multiple of the 3 ranks"):
        fit(recipe_of(corpus, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_rows_of_one_image_become_one_dialogue(corpus, tmp_path):
    """Unless the recipe says otherwise; those held out stay as they are."""
    (image,) = [row["images"][0] for row in map(json.loads, (corpus / "data.jsonl").read_text().splitlines()) if row["images"]][:1]
    rows = [{"images": [str(corpus / image)], "texts": [{"user": f"{n}?", "assistant": "lamp"}]} for n in range(7)]
    lengths = []
    for join in (True, False):
        recipe = recipe_of(corpus, tmp_path, join=join, held_out=1, tokens=600)
        lengths.append(len(run_module.trained_rows(open_source(rows), recipe, Processor.from_pretrained(corpus / "model"))))
    assert lengths == [1, 6]


@pytest.mark.slow
def test_rows_are_given_as_they_are(corpus, tmp_path):
    rows = [json.loads(line) for line in (corpus / "data.jsonl").read_text().splitlines()]
    rows = [row | {"images": [str(corpus / name) for name in row["images"]]} for row in rows]
    assert fit(recipe_of(corpus, tmp_path / "rows", steps=3), data=rows).steps == 3
    fit(recipe_of(corpus, tmp_path / "file", steps=3))
    assert [step for step, _, _ in metrics(tmp_path / "rows")] == [step for step, _, _ in metrics(tmp_path / "file")]


@pytest.mark.slow
def test_sigterm_saves_and_asks_for_another_go(corpus, tmp_path, monkeypatch):
    update = Trainer.update

    def terminated(self, step):
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return update(self, step)

    monkeypatch.setattr(Trainer, "update", terminated)
    result = fit(recipe_of(corpus, tmp_path))
    assert (result.steps, result.exit_code) == (2, 75)
    monkeypatch.setattr(Trainer, "update", update)
    assert fit(recipe_of(corpus, tmp_path)).steps == 6
    assert [step for step, _, _ in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
