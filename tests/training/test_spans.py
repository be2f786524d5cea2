"""Where rows stand in a JSON file, against json itself, on files cut into pieces of any size; gzip; limits; holes."""

import gzip
import json
import os
import random
import time
import zlib
from pathlib import Path

import pytest

from idefics2_fast.training import spans
from idefics2_fast.training.spans import ArrayScanner, Contents, Limits, Spool, find_lines


def contents(path: Path, **limits: int) -> Contents:
    return Contents(path, Limits(**limits), Spool())


def scanned(path: Path) -> tuple[list, list[int]]:
    """The values of an array's elements, each parsed alone, and their lines."""
    opened = contents(path)
    found = ArrayScanner(opened)
    found.scan()
    parts = zip(found.starts, found.ends, strict=True)
    return [json.loads(opened.read(start, end - start)) for start, end in parts], list(found.lines)


TEXTS = ["", "a", '"', "\\", '\\"', "[{]}", ",", "\n", "é😀", "\\\\\\", ' \\" , [ ', "x" * 40]


def random_value(rng: random.Random, depth: int) -> object:
    if depth == 0 or rng.random() < 0.3:
        return rng.choice([None, True, 1.5e300, -7, *TEXTS])
    values = [random_value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    return values if rng.random() < 0.5 else {rng.choice(TEXTS): value for value in values}


@pytest.mark.parametrize("chunk", [1, 3, 17, 2**20])
def test_elements_of_an_array_are_those_that_json_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(spans, "CHUNK", chunk)
    rng, path = random.Random(chunk), tmp_path / "a.json"
    for case in range(40):
        rows = [random_value(rng, 4) for _ in range(rng.randint(0, 5))]
        text = json.dumps(rows, indent=rng.choice([None, 1]), ensure_ascii=case % 2 == 0)
        path.write_text(rng.choice(["", " \n", "\ufeff"]) + text + rng.choice(["", "\n \n"]), encoding="utf-8")
        values, lines = scanned(path)
        assert values == rows
        assert lines == sorted(lines)
        assert all(1 <= line <= text.count("\n") + 2 for line in lines)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "{}",
        "[",
        "[1",
        "[1,",
        "[1,]",
        "[,1]",
        "[,]",
        "[1]]",
        "[1] 2",
        "[1][2]",
        "x[1]",
        "[{}{}]",
        "[[] []]",
        '["]',
        "]",
        "[}",
        "[1}",
        "\0[1]",
    ],
)
@pytest.mark.parametrize("chunk", [1, 2**20])
def test_what_is_no_array_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, chunk: int) -> None:
    monkeypatch.setattr(spans, "CHUNK", chunk)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"\w"):
        scanned(tmp_path / "a.json")


@pytest.mark.parametrize("chunk", [1, 3, 2**20])
def test_lines_are_those_that_python_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(spans, "CHUNK", chunk)
    rng, path = random.Random(chunk), tmp_path / "a.jsonl"
    for _ in range(60):
        path.write_bytes("".join(rng.choices("a \n\r\t{é", k=rng.randint(0, 40))).encode())
        expected, offset = [], 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                expected += [] if line.isspace() else [(offset, number)]
                offset += len(line)
        assert list(zip(*find_lines(contents(path)), strict=True)) == expected


def members(path: Path, parts: list[bytes]) -> None:
    path.write_bytes(b"".join(map(gzip.compress, parts)) + b"\0" * 9)


@pytest.mark.parametrize("chunk", [1, 50, 2**20])
def test_gzip_of_any_members_is_decompressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(spans, "CHUNK", chunk)
    monkeypatch.setattr(spans, "FEED", 7)
    parts = [b"one", b"", b"x" * 3000, os.urandom(300), b"z" * 1024]
    members(tmp_path / "a.gz", parts)
    opened = contents(tmp_path / "a.gz")
    assert opened.read(0, 10**6) == b"".join(parts)
    assert opened.read(2, 3) == b"exx"


def test_gzip_files_of_one_spool_stay_apart(tmp_path: Path) -> None:
    spool = Spool()
    for name in "ab":
        members(tmp_path / name, [name.encode() * 5])
    both = [Contents(tmp_path / name, Limits(), spool) for name in "ab"]
    assert [opened.read(0, 99) for opened in both] == [b"aaaaa", b"bbbbb"]


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    data = gzip.compress(os.urandom(5000))
    for name, damaged in {"cut": data[:900], "bits": data[:900] + b"?" * 99 + data[999:], "more": data + b"?"}.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name} cannot be decompressed"):
            contents(tmp_path / name)


def test_limits_hold_before_the_cost(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(10**7)))
    with pytest.raises(ValueError, match="decompresses to more than 100 bytes"):
        contents(tmp_path / "a.gz", unpacked_bytes=100)
    with pytest.raises(ValueError, match=r"bytes, expected at most 100 \(file_bytes\)"):
        contents(tmp_path / "a.gz", file_bytes=100)
    with pytest.raises(ValueError, match="row_bytes is 0"):
        Limits(row_bytes=0)


def test_many_members_cost_linear_time(tmp_path: Path) -> None:
    """Each member's end copies what is left of the input: of a small piece, not of a large one."""
    (tmp_path / "a.gz").write_bytes(zlib.compress(b"", wbits=31) * 50_000)
    started = time.process_time()
    assert contents(tmp_path / "a.gz").size == 0
    assert time.process_time() - started < 3  # 0.2 s; 5 s when each member copies a megabyte


def test_holes_are_passed_over(tmp_path: Path) -> None:
    """A file of 20 GB that takes no room on the disk is read in no time, and its zeros are no row."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b"{}\n")
        file.truncate(20 * 10**9)
        file.seek(0, os.SEEK_END)
        file.write(b"\n{}")
        file.truncate(file.tell() + 10**9)
    started = time.process_time()
    starts, numbers = find_lines(contents(path))
    assert (list(starts), list(numbers)) == ([0, 3, 20 * 10**9 + 1], [1, 2, 3])
    with pytest.raises(ValueError, match="begin"):
        scanned(path)
    assert time.process_time() - started < 3
