"""Rows that people, crashes and attackers leave: each is a sample or is named; a check and a run agree on which; none costs much."""

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from support.corpus import WORDS, mixed_rows, picture, write_jsonl

from idefics2_fast import Processor
from idefics2_fast.training import __main__ as command
from idefics2_fast.training.loader import Loader
from idefics2_fast.training.planning import Planner
from idefics2_fast.training.recipe import instruct
from idefics2_fast.training.run import planner_of, trained_rows
from idefics2_fast.training.samples import read_row
from idefics2_fast.training.sources import Rejection, check, join_pairs, open_source

TALK = {"texts": [{"user": "?", "assistant": "!"}]}


@pytest.fixture(scope="module")
def planner(processor: Processor) -> Planner:
    return Planner(processor, seed=3, tokens=400, patches=1200)


# --- whatever a row raises ---


class Panic(BaseException):
    """As a library in Rust raises it."""


ERRORS = [
    KeyError("text"),
    RuntimeError("two\nlines\x1b[31m"),
    OverflowError("int too large"),
    RecursionError("deep"),
    MemoryError(),
    StopIteration(),
    IndexError("7"),
    OSError(5, "Input/output error"),
    AssertionError(),
    UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "surrogates not allowed"),
    jinja2.UndefinedError("'x' is undefined"),
    jinja2.TemplateError("no"),
    jinja2.exceptions.SecurityError("unsafe"),
    Panic("index out of range"),
    ValueError("x" * 10**6),
]


class Failing(list):
    """A sequence of rows of which one raises when it is read."""

    def __init__(self, error: BaseException) -> None:
        super().__init__([TALK] * 5)
        self.error = error

    def __getitem__(self, index: int) -> Any:
        if index == 3:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["read", "planned", "decoded"])
def test_any_error_leaves_out_its_row(planner: Planner, monkeypatch: pytest.MonkeyPatch, error: BaseException, where: str) -> None:
    """In a check and in a run, with the type's name, on one line."""
    rows = Failing(error) if where == "read" else [TALK] * 3 + [TALK | {"image": picture(20, 20)}, TALK]
    name = {"planned": "idefics2_fast.training.planning.image_size", "decoded": "idefics2_fast.training.loader.pack_images"}

    def fail(*args: Any, **settings: Any) -> None:
        raise error

    if where != "read":
        monkeypatch.setattr(name[where], fail)
    run = Loader(open_source(rows), planner, packs=1, epochs=1, max_open=2)
    assert sorted(key for step in run for batch in step.batches for key in batch.sample_keys if key) == ["0", "1", "2", "4"]
    state = run.state()
    run.close()
    ((key, reason),) = {**state["rejected"], **state["undecoded"]}.items()
    assert key == "3"
    assert reason.startswith("row 3: ")
    assert type(error) is ValueError or type(error).__name__ in reason
    assert len(reason) < 800
    assert reason.isprintable()
    if where != "decoded":
        assert list(check(open_source(rows), planner)) == [Rejection("3", reason)]
    if where == "read":
        assert join_pairs(open_source(rows), lambda images: 10**6)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_what_ends_the_program_ends_it(error: BaseException) -> None:
    with pytest.raises(type(error)):
        open_source(Failing(error)).attempt(3, str)


def test_a_question_without_text_stays_first(planner: Planner) -> None:
    """Such a turn has nothing to say without its images, and the template no first piece."""
    texts = [{"user": "", "assistant": "A lamp."}, {"user": "Colour?", "assistant": "Red."}, {"user": "Size?", "assistant": "Big."}]
    sample = read_row({"texts": texts, "images": [picture(30, 30)]}, "k")
    assert len({planner(sample, epoch).token_ids.tobytes() for epoch in range(8) if not planner(sample, epoch).split}) == 1
    talk = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A lamp."}]
    asked = [{"from": "human", "value": "<image>\nColour?"}, talk[1]]
    source = open_source([{"conversations": turns, "image": "a.png"} for turns in (talk, asked, talk, asked)])
    assert [len(group) for group in join_pairs(source, lambda images: 10**6)._groups] == [1, 2, 1]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f'{{"images": [], {json.dumps(TALK | {"images": ["a.png"]})[1:]}', "an object has 'images' twice"),
        ("[" * 10**5, "nested too deeply"),
        ('{"texts": ' * 10**4, "nested too deeply"),
        (f'{{"texts": {"9" * 5000}}}', "Exceeds the limit (4300 digits)"),
        ('{"texts": "\xff"}', "not valid JSON: 'utf-8' codec can't decode byte 0xff"),
        ("\0" * 4096, "not valid JSON: "),
        ('"text"', "the row is 'text', expected an object"),
    ],
    ids=["twice", "lists", "objects", "digits", "bytes", "zeros", "text"],
)
def test_json_that_is_no_row_is_named(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(f"{json.dumps(TALK)}\n{line}\n{json.dumps(TALK)}".encode("latin-1"))
    (found,) = check(open_source(tmp_path / "a.jsonl"))
    assert found.reason.startswith(f"{tmp_path / 'a.jsonl'}, line 2: ")
    assert reason in found.reason


def test_a_key_that_is_twice_among_many_costs_no_time(tmp_path: Path) -> None:
    """Each key was once counted among all."""
    many = ",".join(f'"a{number}":1' for number in range(20_000))
    (tmp_path / "a.jsonl").write_text(f'{{{json.dumps(TALK)[1:-1]},{many},"a19999":2}}\n{json.dumps(TALK)}')
    began = time.process_time()
    (found,) = check(open_source(tmp_path / "a.jsonl"))
    assert "an object has 'a19999' twice" in found.reason
    assert time.process_time() - began < 1


def test_open_source_of_an_empty_path() -> None:
    """That of a variable that is not set: not this folder."""
    with pytest.raises(ValueError, match="data is empty, expected the path"):
        open_source("")


# --- a check and a run ---


def corrupt_rows(folder: Path, rng: random.Random, n: int) -> Path:
    """JSON lines of rows, of which about half have something wrong; and some that ask about one image file each."""
    rows = mixed_rows(n, seed=rng.randrange(10**6))
    write_jsonl(folder / "rows.jsonl", rows)
    lines = (folder / "rows.jsonl").read_text().splitlines()
    for index, line in enumerate(lines):
        lines[index] = rng.choice(SPOILING)(folder, line, index, rng) if rng.random() < 0.6 else line
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    return folder / "rows.jsonl"


def spoil_image(change: Callable[[bytes, random.Random], bytes]) -> Callable[..., str]:
    def spoil(folder: Path, line: str, index: int, rng: random.Random) -> str:
        name = f"bad-{index}"
        kind = rng.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP"])
        (folder / name).write_bytes(change(picture(200, 90, kind=kind), rng))
        pair = {"from": "gpt", "value": "!"}
        row = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, pair], "image": name}
        return "\n".join([json.dumps(row)] * rng.randint(1, 3))  # joined to one sample

    return spoil


def spoil_row(**parts: Any) -> Callable[..., str]:
    return lambda folder, line, index, rng: json.dumps(json.loads(line) | parts)


SPOILING = [
    spoil_image(lambda data, rng: data[: rng.randrange(len(data))]),
    spoil_image(lambda data, rng: data[: len(data) * 3 // 4]),
    spoil_image(lambda data, rng: bytes(byte if rng.random() < 0.99 else rng.randrange(256) for byte in data)),
    spoil_image(lambda data, rng: picture(1, 1)),
    spoil_image(lambda data, rng: picture(2, 3000)),
    spoil_image(lambda data, rng: data),
    spoil_row(images=["none.png"]),
    spoil_row(texts=[{"user": "word " * 300, "assistant": "!"}]),
    spoil_row(texts=[{"user": "\ud83d", "assistant": "!"}]),
    spoil_row(texts=[{"user": "</s>", "assistant": "!"}]),
    spoil_row(texts=[{"user": "", "assistant": "!"}, {"user": "a", "assistant": "b"}]),
    spoil_row(videos=["a.mp4"]),
    spoil_row(images=["rows.jsonl"] * 12),
    lambda folder, line, index, rng: line[: rng.randrange(1, len(line))],
    lambda folder, line, index, rng: "[" * 10**5,
    lambda folder, line, index, rng: f'{{"texts": {"9" * 5000}}}',
    lambda folder, line, index, rng: line.replace("{", '{"images": [], ', 1),
]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_check_and_a_run_leave_out_the_same_rows(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    """For the same reasons, in any epoch; joined rows, held-out ones and images that are damaged behind their headers."""
    data = corrupt_rows(tmp_path, random.Random(seed), 60)
    recipe = instruct(str(corpus / "model"), str(data), str(tmp_path / "out"), tokens=300, patches=600, packs=2)
    assert command._check(recipe, shown=True) == 2
    *reasons, summary = capsys.readouterr().err.splitlines()
    processor = Processor.from_pretrained(recipe.model)
    source = trained_rows(open_source(data), recipe, processor)
    for epochs in (1, 3):
        run = Loader(source, planner_of(recipe, processor), packs=2, epochs=epochs, least_rejected=10**6)
        kept = {key for step in run for batch in step.batches for key in batch.sample_keys if key}
        state = run.state()
        run.close()
        left_out = {**state["rejected"], **state["undecoded"]}
        assert sorted(left_out.values()) == sorted(reasons)
        assert len(kept) + len(left_out) == len(source)
        assert not kept & left_out.keys()
    assert 10 < len(reasons) < len(source) - 10
    rows = sum(
        rejection.rows for rejection in (source.reject(row, ValueError()) for row in range(len(source))) if rejection.key in left_out
    )
    assert summary == f"{rows} of {len(open_source(data))} rows cannot be used"


def test_a_row_fits_in_every_epoch_or_in_none(planner: Planner) -> None:
    """Split or scaled up as another epoch may draw it; so a row is left out for good, or never."""
    row = TALK | {"images": [picture(112, 112)] * 2}
    for limits in ({"tokens": 50}, {"patches": 300}):  # whole it has 25 tokens and 128 patches, split 65 and 640
        one = replace(planner, **limits)
        for epoch in range(6):
            found = open_source([row]).attempt(0, lambda sample, epoch=epoch, one=one: one(sample, epoch))
            assert isinstance(found, Rejection), (limits, epoch)
            assert open_source([row]).attempt(0, replace(one, split_share=0.0, upscale_share=0.0)).images


def test_joined_rows_are_named_together() -> None:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A lamp."}]
    joined = join_pairs(open_source([{"conversations": talk, "image": "a.png"}] * 9), lambda images: 10**6)
    rejection = joined.reject(0, ValueError("no"))
    assert rejection == Rejection("0", "row 0 (joined with 1, 2, 3, 4, 5 and 3 more): no", rows=9)


def test_a_check_looks_at_rows_held_out(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [TALK] * 4 + [TALK | {"images": [picture(90, 80)[:60]]}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = instruct(str(corpus / "model"), str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), held_out=2)
    assert command._check(recipe, shown=True) == 2
    captured = capsys.readouterr()
    assert captured.out == "looking at 5 rows and decoding their images\n"
    first, summary = captured.err.splitlines()
    assert first.startswith(f"{tmp_path / 'rows.jsonl'}, line 5: image 0: ")
    assert summary == "1 of 5 rows cannot be used"


# --- what a row may cost ---


@contextmanager
def cost(seconds: float, megabytes: float) -> Iterator[None]:
    """Fails where the work takes more of the CPU's time, or more memory at its peak than before."""

    def memory(name: str) -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1000

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started = memory("VmRSS"), time.process_time()
    yield
    assert time.process_time() - started < seconds
    assert memory("VmHWM") - before < megabytes


def test_a_row_of_200_megabytes_costs_nothing(planner: Planner, tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("w") as file:
        file.write('{"texts": [{"user": "')
        for _ in range(200):
            file.write("word " * 200_000)
        file.write(f'", "assistant": "!"}}]}}\n{json.dumps(TALK)}\n')
    with cost(seconds=10, megabytes=200):  # 1 s and 40 MB; 205 s and 16 GB without a limit
        (found,) = check(open_source(tmp_path / "a.jsonl"), planner)
    assert "line 1: the row has more than 16777216 bytes" in found.reason


def talk(user: str) -> dict[str, Any]:
    return {"texts": [{"user": user, "assistant": "!"}]}


def pieces(n: int) -> dict[str, Any]:
    content = [{"type": "text", "text": "a"}] * n
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "!"}]}


# Rows of n parts, the largest n that fits a row, and what is said of it.
MANY: dict[str, tuple[Callable[[int], dict[str, Any]], int, str]] = {
    "text": (lambda n: talk("word " * n), 3_000_000, "2 turns, 0 images and {5n1} characters"),
    "unicode": (lambda n: talk("é😀" * n), 2_000_000, "2 turns, 0 images and {2n1} characters"),
    "turns": (lambda n: {"texts": [{"user": "a", "assistant": "b"}] * n}, 500_000, "{2n} turns"),
    "images": (lambda n: talk("?") | {"images": ["a.png"] * n}, 1_000_000, "2 turns, {n} images"),
    "marks": (lambda n: talk("<image>" * n), 2_000_000, "{n} image marks and 0 images"),
    "brackets": (lambda n: talk("<" * n), 16_000_000, "2 turns, 0 images and {n1} characters"),
    "numbers": (lambda n: talk("<image1>" * n), 1_000_000, "the marks ['<image1>', '<image1>',"),
    "pieces": (pieces, 500_000, "2 turns, 0 images and {n1} characters"),
    "lists": (lambda n: {"texts": [[] for _ in range(n)]}, 5_000_000, "texts holds [], expected"),
    "columns": (lambda n: {f"c{i}": 1 for i in range(n)}, 1_000_000, "the columns are c0, c1, c2"),
}


def try_many(planner: Planner, path: Path, kind: str, share: float) -> None:
    make, most, message = MANY[kind]
    n = int(most * share)
    path.write_text(json.dumps(make(n), ensure_ascii=False, separators=(",", ":")))
    assert path.stat().st_size <= 2**24
    source = open_source(path)
    with cost(seconds=2 + 40 * share, megabytes=100 + 1200 * share):
        (found,) = check(source, planner)
    for name, number in {"{n}": n, "{n1}": n + 1, "{2n}": 2 * n, "{2n1}": 2 * n + 1, "{5n1}": 5 * n + 1}.items():
        message = message.replace(name, str(number))
    assert message in found.reason


@pytest.mark.parametrize("kind", MANY)
def test_rows_of_many_parts_are_refused_before_their_cost(planner: Planner, tmp_path: Path, kind: str) -> None:
    try_many(planner, tmp_path / "a.jsonl", kind, share=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MANY)
def test_the_largest_rows_are_refused_before_their_cost(planner: Planner, tmp_path: Path, kind: str) -> None:
    try_many(planner, tmp_path / "a.jsonl", kind, share=1.0)


def test_memory_does_not_hold_long_conversations(planner: Planner) -> None:
    planner = Planner(planner.processor, seed=0, tokens=50_000, patches=50_000)
    short, long = ({"texts": [{"user": "word " * n, "assistant": "!"}]} for n in (10, 5000))
    for row in (short, long):
        planner(read_row(row, "k"))
    assert planner._remembered.cache_info().currsize == 1


# --- rows at random ---


ODD_TEXTS = ["", " ", "\n", "<image>", "<image1>", "</s>", "<s>", "<fake_token_around_image>"]
ODD_TEXTS += ["<video>", "[IMG]", "\0", "\ud800", "{{ x }}", "\ufdfd" * 50, "a " * 3000, "<image>" * 50]


def random_text(rng: random.Random) -> str:
    if rng.random() < 0.85:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
    if rng.random() < 0.5:
        return rng.choice(ODD_TEXTS)
    last = rng.choice([0x7F, 0x250, 0xFFFF, 0x110000])
    return "".join(chr(rng.randrange(0x20, last)) for _ in range(rng.randint(0, 20)))


ODD_VALUES = [None, True, False, 0, 1, -1, 0.5, float("nan"), float("inf"), 10**30, b"", b"x"]
ODD_VALUES += [Path("a"), Image.new("1", (3, 3)), object(), ..., picture(20, 20)]


def random_value(rng: random.Random, depth: int = 3) -> Any:
    """A value such as JSON, Arrow or Python may hold."""
    if depth == 0 or rng.random() < 0.6:
        return rng.choice([*ODD_VALUES, random_text(rng)])
    values = [random_value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    kind = rng.random()
    if kind < 0.4:
        return values
    if kind < 0.5:
        return tuple(values)
    if kind < 0.6:
        return nested(rng.choice([list, dict]), rng.choice([5, 2000]))
    return {rng.choice(NAMES) if rng.random() < 0.8 else random_text(rng): value for value in values}


def nested(kind: type, depth: int) -> Any:
    value: Any = kind()
    for _ in range(depth):
        value = [value] if kind is list else {"tools": value}
    return value


PICTURES = [picture(30, 20), picture(90, 40, kind="JPEG"), picture(20, 20)[:40], b"no image"]
NAMES = (
    "messages texts conversations image images system weight train loss tools videos role content from value user assistant "
    "type text path url bytes index id name image_path prefix"
).split()


def valid_row(rng: random.Random) -> dict[str, Any]:
    pairs = [(random_text(rng), random_text(rng)) for _ in range(rng.randint(1, 3))]
    images = rng.choices(PICTURES, k=rng.choice([0, 1, 1, 2]))
    kind = rng.randrange(3)
    if kind == 0:
        return {"texts": [{"user": user, "assistant": assistant} for user, assistant in pairs], "images": images}
    names = ("role", "content") if kind == 1 else ("from", "value")
    roles = ("user", "assistant") if kind == 1 else ("human", "gpt")
    turns = [dict(zip(names, turn, strict=True)) for pair in pairs for turn in zip(roles, pair, strict=True)]
    if kind == 2:
        return {"conversations": turns, "image": images[0] if images else None}
    if rng.random() < 0.5:
        turns[0]["content"] = [*({"type": "image", "image": data} for data in images), {"type": "text", "text": pairs[0][0]}]
        images = []
    return {"messages": turns, "images": images}


def mutated(value: Any, rng: random.Random, rate: float) -> Any:
    """The value with parts exchanged, removed, doubled or renamed."""
    if rng.random() < rate:
        return random_value(rng)
    if isinstance(value, dict):
        parts = {name: mutated(part, rng, rate) for name, part in value.items() if rng.random() >= rate / 2}
        if rng.random() < rate:
            parts[rng.choice(NAMES)] = random_value(rng)
        return parts
    if isinstance(value, list):
        parts = [mutated(part, rng, rate) for part in value for _ in range(1 + (rng.random() < rate / 2))]
        if rng.random() < rate / 2:
            rng.shuffle(parts)
        return parts
    return value


def try_random_rows(planner: Planner, seed: int, count: int) -> tuple[int, int]:
    """Samples and refusals of random rows; anything but ValueError is raised."""
    rng, samples = random.Random(seed), 0
    for _ in range(count):
        row = mutated(valid_row(rng), rng, rng.choice([0.03, 0.1, 0.2]))
        try:
            planner(read_row(row, "k"), rng.randrange(3))
            samples += 1
        except ValueError:
            pass
        except BaseException as error:
            error.add_note(f"seed {seed}: {row!r:.2000}")
            raise
    return samples, count - samples


@pytest.mark.parametrize("seed", range(2))
def test_random_rows_are_samples_or_refused(planner: Planner, seed: int) -> None:
    with cost(seconds=60, megabytes=500):
        samples, refused = try_random_rows(planner, seed, 1000)
    assert min(samples, refused) > 100


# A million in all; IDEFICS2_FAST_FUZZ_ROWS sets another number.
PARTS, FUZZ_ROWS = 20, int(os.environ.get("IDEFICS2_FAST_FUZZ_ROWS", 10**6))


@pytest.mark.slow(part=True)
@pytest.mark.parametrize("part", range(PARTS))
def test_a_million_random_rows_are_samples_or_refused(planner: Planner, part: int) -> None:
    with cost(seconds=600, megabytes=1000):
        samples, refused = try_random_rows(planner, 100 + part, FUZZ_ROWS // PARTS)
    assert min(samples, refused) > FUZZ_ROWS // PARTS // 20


def test_open_source_of_a_parquet_file_with_a_column_twice(tmp_path: Path) -> None:
    """One of them would be left out without a word."""
    texts = pyarrow.array([TALK["texts"]])
    table = pyarrow.Table.from_arrays([texts, texts], names=["texts", "texts"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has the column 'texts' twice, expected each column once"):
        open_source(tmp_path)
