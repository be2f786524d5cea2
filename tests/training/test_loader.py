"""One global plan: the same samples on any number of ranks and workers, resumed to the bit, damaged ones left out and named."""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from itertools import islice, pairwise
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from support.corpus import mixed_rows, picture, write_jsonl

from idefics2_fast import Batch, Idefics2, Idefics2Config, Processor, Segments
from idefics2_fast.batch import IGNORED
from idefics2_fast.benchmarks.local_checkpoint import write_processor
from idefics2_fast.training.loader import Loader, Step, TooManyRejections, probe_patches
from idefics2_fast.training.planning import Planner
from idefics2_fast.training.sources import Rejection, open_source

ROWS = mixed_rows(60)


@pytest.fixture(scope="module")
def planner(processor: Processor) -> Planner:
    return Planner(processor, seed=3, tokens=400, patches=1200)


def loader(planner: Planner, data: Any = None, **settings: Any) -> Loader:
    return Loader(open_source(ROWS if data is None else data), planner, **{"packs": 2, "max_open": 4, **settings})


def take(steps: Loader, n: int | None = None) -> list[Step]:
    """The next n steps, or all; then the threads end."""
    try:
        return list(islice(steps, n))
    finally:
        steps.close()


def contents(batch: Batch) -> list[Any]:
    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, torch.Tensor) else value.bounds if isinstance(value, Segments) else value

    return [plain(getattr(batch, entry.name)) for entry in fields(Batch)]


def all_contents(steps: Sequence[Step]) -> list[Any]:
    return [(step.index, step.epoch, step.tokens, step.patches, [contents(batch) for batch in step.batches]) for step in steps]


def keys(steps: Sequence[Step]) -> list[str]:
    return [key for step in steps for batch in step.batches for key in batch.sample_keys if key]


def documents(batch: Batch) -> Iterator[slice]:
    return (slice(start, end) for start, end in pairwise(batch.documents.bounds))


# --- what is in a batch ---


def test_batches_are_the_planned_documents(planner: Planner) -> None:
    """Tokens, labels and patches of every document are what planning and packing it alone gives, and positions restart."""
    source = open_source(ROWS)
    for step in take(loader(planner, epochs=1)):
        for batch in step.batches:
            images = 0
            for key, part in zip(batch.sample_keys, documents(batch), strict=True):
                if not key:
                    continue
                document = planner(source.read(int(key)), 0)
                assert batch.token_ids[part].tolist() == document.token_ids.tolist()
                assert batch.labels[part].tolist() == document.labels.tolist()
                assert batch.positions[part].tolist() == list(range(document.n_tokens))
                assert tuple(batch.images.lengths[images : images + len(document.crops)] if document.crops else ()) == document.crops
                images += len(document.crops)
            assert images == (len(batch.images) if batch.images else 0)


def test_documents_do_not_see_one_another(tmp_path: Path) -> None:
    """The model's logits for a packed document are those it gives the document alone."""
    config = Idefics2Config.named("tiny")
    write_processor(tmp_path, image_seq_len=config.perceiver.n_latents)
    processor = replace(Processor.from_pretrained(tmp_path), shortest_edge=28, longest_edge=112)
    torch.manual_seed(0)
    model = Idefics2(config).eval()
    source, planner = open_source(ROWS), Planner(processor, seed=3, tokens=600, patches=1200)
    (step,) = take(loader(planner, packs=1), 1)
    (batch,) = step.batches
    assert len(batch.documents) > 2
    assert batch.images is not None
    with torch.no_grad():
        packed = model(batch)
        for key, part in zip(batch.sample_keys, documents(batch), strict=True):
            planned = replace(planner, tokens=part.stop - part.start)  # the document fills its pack, and nothing else fits
            alone = next(
                other
                for step in take(Loader(source, planned, packs=1, epochs=1, max_open=99, least_rejected=99))
                for other in step.batches
                if other.sample_keys == (key,)
            )
            torch.testing.assert_close(packed[part], model(alone), rtol=1e-4, atol=1e-4)


def test_an_epoch_has_every_sample_once_and_the_next_another_order(planner: Planner) -> None:
    n = len(ROWS)
    one, two = (keys(take(loader(planner, epochs=epochs))) for epochs in (1, 2))
    assert sorted(one, key=int) == [str(row) for row in range(n)]
    assert sorted(two) == sorted(one * 2)
    assert [int(key) for key in one] != sorted(map(int, one))
    assert take(loader(planner, epochs=2))[-1].epoch == 2.0


def test_the_last_step_is_filled_up_with_batches_that_train_nothing(planner: Planner) -> None:
    steps = take(loader(planner, ROWS[:3], packs=4, epochs=1))
    assert [len(step.batches) for step in steps] == [4] * len(steps)
    empty = steps[-1].batches[-1]
    assert (empty.token_ids.tolist(), empty.labels.tolist(), empty.sample_keys) == ([1], [IGNORED], ("",))
    assert len(empty.answer_rows) == 0


def test_fill_of_a_mixed_corpus(planner: Planner) -> None:
    """Of the steps before the data ends, with the capacity in patches that the corpus asks for."""
    source = open_source(ROWS)
    planner = replace(planner, tokens=1500, patches=probe_patches(source, replace(planner, tokens=1500)))
    steps = take(Loader(source, planner, packs=2), 12)
    fills = torch.tensor([step.fill for step in steps])
    assert (fills.mean(0) >= torch.tensor([0.90, 0.85])).all(), fills.mean(0)


# --- ranks and workers ---


def test_ranks_take_slices_of_one_plan(planner: Planner) -> None:
    whole = take(loader(planner, packs=4), 4)
    halves = [take(loader(planner, packs=4, rank=rank, world_size=2), 4) for rank in (0, 1)]
    for step, first, second in zip(whole, *halves, strict=True):
        assert [contents(batch) for batch in step.batches] == [contents(batch) for part in (first, second) for batch in part.batches]
        bases = [batch.token_base for batch in step.batches]
        assert bases == [sum(len(batch.token_ids) for batch in step.batches[:index]) for index in range(4)]


def test_order_over_one_two_and_one_ranks(planner: Planner) -> None:
    expected = keys(take(loader(planner), 6))
    seen, state = [], None
    for world_size in (1, 2, 1):
        ranks = [loader(planner, rank=rank, world_size=world_size) for rank in range(world_size)]
        for rank in ranks:
            if state is not None:
                rank.load_state(json.loads(state))
        for _ in range(2):
            seen += [key for rank in ranks for key in keys([next(rank)])]
        states = {json.dumps(rank.state()) for rank in ranks}
        assert len(states) == 1
        (state,) = states
        for rank in ranks:
            rank.close()
    assert seen == expected


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 0), (1, 2), (3, 1)])
def test_workers_change_nothing(planner: Planner, threads: int, prefetch: int) -> None:
    found, expected = (take(loader(planner, **settings), 4) for settings in ({"threads": threads, "prefetch": prefetch}, {"threads": 2}))
    assert all_contents(found) == all_contents(expected)


# --- resumption ---


def bad_rows(folder: Path) -> Path:
    """40 rows, of them one that is no row, one image without a header, one cut off behind it."""
    rows = mixed_rows(40, seed=1)
    rows[5] = {"texts": []}
    rows[11] = {"images": [b"no image"], "texts": [{"user": "?", "assistant": "!"}]}
    rows[17] = {"images": [picture(90, 80)[:60]], "texts": [{"user": "?", "assistant": "!"}]}
    write_jsonl(folder / "rows.jsonl", rows)
    return folder / "rows.jsonl"


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_resumed_run_repeats_and_skips_nothing(planner: Planner, tmp_path: Path, prefetch: int) -> None:
    """From the state after any step, batches equal the uninterrupted run's to the bit: over an epoch's end, with bad rows."""
    path, settings = bad_rows(tmp_path), {"epochs": 2, "prefetch": prefetch}
    run = loader(planner, path, **settings)
    states, steps = [run.state()], []
    for step in run:
        steps.append(step)
        states.append(run.state())
    run.close()
    expected = all_contents(steps)
    assert len(steps) > 8
    for done, state in enumerate(states):
        resumed = loader(planner, path, **settings)
        resumed.load_state(json.loads(json.dumps(state)))
        assert resumed.state() == state
        assert all_contents(take(resumed)) == expected[done:]


def test_going_back_within_a_run(planner: Planner) -> None:
    run = loader(planner)
    next(run)
    state = run.state()
    expected = [all_contents([next(run)]) for _ in range(3)]
    run.load_state(state)
    assert [all_contents([next(run)]) for _ in range(3)] == expected
    run.close()


@pytest.mark.parametrize("change", [{"seed": 4}, {"tokens": 500}, {"patches": 1300}])
def test_a_state_of_other_settings_is_refused(planner: Planner, change: dict[str, int]) -> None:
    run, other = loader(planner), loader(replace(planner, **change))
    with pytest.raises(ValueError, match=f"the loader's state has {next(iter(change))} = "):
        other.load_state(run.state())
    for each in (run, other):
        each.close()


def test_a_state_of_other_data_is_refused(planner: Planner) -> None:
    run, fewer = loader(planner), loader(planner, ROWS[1:])
    with pytest.raises(ValueError, match="state has rows = 60, expected 59"):
        fewer.load_state(run.state())
    for each in (run, fewer):
        each.close()


def test_ranks_need_an_even_share(planner: Planner) -> None:
    with pytest.raises(ValueError, match="rank 0 of 2 has no even share of 3 packs"):
        loader(planner, packs=3, world_size=2)


def test_take_leaves_the_threads_asleep_until_refill(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is ready costs its consumer no turn of another thread: nothing is planned between the two calls."""
    plan, planned = Planner.__call__, []
    monkeypatch.setattr(Planner, "__call__", lambda self, *args: (planned.append(1), plan(self, *args))[1])
    run, expected = loader(planner, threads=1), keys(take(loader(planner, threads=1), 3))
    seen = keys([next(run)])
    settle(planned)
    before = len(planned)
    seen += keys([run.take()])
    settle(planned)
    assert len(planned) == before
    run.refill()
    seen += keys([next(run)])
    settle(planned)
    assert len(planned) > before
    assert seen == expected
    run.close()


def settle(planned: list[int]) -> None:
    """Returns when nothing was planned for a while."""
    before = -1
    while before != len(planned):
        before = len(planned)
        time.sleep(0.3)


# --- what cannot be used ---


def test_bad_samples_are_left_out_counted_and_named(planner: Planner, tmp_path: Path) -> None:
    path, quarantine = bad_rows(tmp_path), tmp_path / "quarantine.jsonl"
    steps = take(loader(planner, path, epochs=2, quarantine=quarantine))
    bad = {f"rows.jsonl:{line}" for line in (6, 12, 18)}
    assert sorted(keys(steps)) == sorted(2 * [key for line in range(1, 41) if (key := f"rows.jsonl:{line}") not in bad])
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert {line["key"] for line in lines} == bad
    assert len(lines) == 3
    reasons = {line["key"]: line["reason"] for line in lines}
    assert reasons["rows.jsonl:6"].startswith(f"{path}, line 6: texts is []")
    assert "rows-11-0.png is not an image" in reasons["rows.jsonl:12"]
    assert "rows-17-0.png cannot be decoded" in reasons["rows.jsonl:18"]


def test_a_damaged_image_moves_no_other_sample(planner: Planner, tmp_path: Path) -> None:
    """The whole and the damaged file have one header: all other batches and every token_base stay."""
    runs = []
    for name, data in (("whole", picture(90, 80)), ("damaged", picture(90, 80)[:60])):
        rows = mixed_rows(30, seed=2)
        rows[7] = {"images": [data], "texts": [{"user": "?", "assistant": "!"}]}
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "rows.jsonl", rows)
        runs.append(take(loader(planner, tmp_path / name / "rows.jsonl", epochs=1)))
    key, changed = "rows.jsonl:8", 0
    for whole, damaged in zip(*([batch for step in run for batch in step.batches] for run in runs), strict=True):
        assert whole.token_base == damaged.token_base
        if key in whole.sample_keys:
            changed += 1
            assert damaged.sample_keys == tuple(other for other in whole.sample_keys if other != key)
            kept = [part for other, part in zip(whole.sample_keys, documents(whole), strict=True) if other != key]
            assert damaged.token_ids.tolist() == torch.cat([whole.token_ids[part] for part in kept]).tolist()
        else:
            assert contents(whole) == contents(damaged)
    assert changed == 1


def test_a_file_that_changed_since_it_was_planned_is_left_out(planner: Planner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(picture(100, 30))
    rows = [{"images": [str(tmp_path / "a.png")], "texts": [{"user": "?", "assistant": "!"}]}]
    rows.append({"texts": [{"user": "?", "assistant": "!"}]})
    run = loader(planner, rows, epochs=1, prefetch=0)
    plan = Planner.__call__

    def then_change(self: Planner, *args: Any) -> Any:
        document = plan(self, *args)
        if document.images:
            (tmp_path / "a.png").write_bytes(picture(100, 60))
        return document

    monkeypatch.setattr(Planner, "__call__", then_change)
    assert keys(take(run)) == ["1"]


@pytest.mark.parametrize("images", [[b"no image"], [picture(90, 80)[:60]]], ids=["planned", "decoded"])
def test_too_many_bad_samples_stop_the_run_with_a_list(planner: Planner, images: list[bytes]) -> None:
    rows = mixed_rows(40, seed=1)
    for row in range(0, 40, 4):
        rows[row] = {"images": images, "texts": [{"user": "?", "assistant": "!"}]}
    with pytest.raises(TooManyRejections, match="^[4-6] of .* samples cannot be used, expected at most 3:") as raised:
        take(loader(planner, rows, epochs=2, least_rejected=3))  # what is damaged is counted a step at a time
    assert len(str(raised.value).splitlines()) == 1 + int(str(raised.value)[0])
    assert sorted(set(keys(take(loader(planner, rows, epochs=1, least_rejected=10)))), key=int) == [
        str(row) for row in range(40) if row % 4
    ]


def rows_with(bad: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [bad.get(number, row) for number, row in enumerate(mixed_rows(40, seed=1))]


NO_ROW = {"texts": []}
DAMAGED = {"images": [picture(90, 80)[:60]], "texts": [{"user": "?", "assistant": "!"}]}


@pytest.mark.parametrize("bad", [{3: NO_ROW, 30: NO_ROW}, {3: DAMAGED, 30: DAMAGED}, {3: NO_ROW, 30: DAMAGED}], ids=str)
def test_the_count_of_bad_samples_outlives_a_resumption(planner: Planner, tmp_path: Path, bad: dict[int, dict[str, Any]]) -> None:
    """Rows without a plan and damaged images count together, and those of before the resumption with those after it."""
    settings = {"max_open": 1, "quarantine": tmp_path / "quarantine.jsonl"}
    run = loader(planner, rows_with(bad), **settings)
    while not (state := run.state())["rejected"] and not state["undecoded"]:
        next(run)
    run.close()
    assert len({**state["rejected"], **state["undecoded"]}) == 1
    resumed = loader(planner, rows_with(bad), least_rejected=1, **settings)
    resumed.load_state(json.loads(json.dumps(state)))
    with pytest.raises(TooManyRejections, match="2 of .* expected at most 1") as raised:
        take(resumed, 99)
    assert len(str(raised.value).splitlines()) == 3
    lines = [json.loads(line)["key"] for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(lines) == ["3", "30"]


def test_ranks_count_what_any_of_them_found(planner: Planner) -> None:
    """Each rank decodes its slice alone: the states stay alike, and all ranks stop at the same step."""
    barrier, found = Barrier(2, timeout=60), [[], []]

    def rank(number: int) -> tuple[list[dict[str, Any]], str]:
        def gather(mine: Sequence[Rejection]) -> list[Rejection]:
            found[number] = mine
            barrier.wait()
            everything = [*found[0], *found[1]]
            barrier.wait()
            return everything

        rows = rows_with(dict.fromkeys((3, 9, 17, 22, 30), DAMAGED))
        run = loader(planner, rows, least_rejected=4, rank=number, world_size=2, gather=gather)
        states = []
        try:
            while True:
                next(run)
                states.append(run.state())
        except TooManyRejections as error:
            return states, str(error)
        finally:
            run.close()

    with ThreadPoolExecutor(2) as pool:
        (states, error), other = pool.map(rank, (0, 1))
    assert (states, error) == other
    assert error.startswith("5 of ")
    assert 1 <= len(states[-1]["undecoded"]) <= 4


def test_data_without_a_usable_sample_stops_the_run(planner: Planner) -> None:
    """However few they are: an endless run would look for the next for ever."""
    for rows in ([{"texts": []}] * 3, [{"images": [picture(90, 80)[:60]], "texts": [{"user": "?", "assistant": "!"}]}] * 3):
        with pytest.raises(TooManyRejections, match="3 of 3 samples cannot be used, expected at most 2"):
            take(loader(planner, rows), 99)


def test_no_usable_sample_to_probe(planner: Planner) -> None:
    with pytest.raises(ValueError, match="none of the first 2 samples"):
        probe_patches(open_source([{}, {}]), planner)
