"""Files and folders as people keep them: read, or named; never absent in silence, never twice."""

import gzip
import json
import logging
import os
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet
from support.corpus import picture

from idefics2_fast.training.samples import read_row
from idefics2_fast.training.sources import Chain, ParquetFile, Source, check, open_source
from idefics2_fast.training.spans import Limits


def row(text: str) -> dict:
    return {"texts": [{"user": text, "assistant": "!"}]}


def lines(*texts: str) -> str:
    return "".join(json.dumps(row(text)) + "\n" for text in texts)


def asked(source: Source) -> list[str]:
    """What the rows ask."""
    return [source.read(index).turns[0].pieces[0] for index in range(len(source))]


def keys(source: Source) -> list[str]:
    return [source.key(index) for index in range(len(source))]


ARRAY = json.dumps([row("a"), row("b")], indent=2)


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "X.JSON", "x.JsonL", "x.json.gz", "x.jsonl.gz", "X.JSONL.GZ"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize(
    "text", [lines("a", "b"), "\n" + lines("a", "b").strip(), lines("a", "b").replace("\n", "\r\n"), ARRAY, ARRAY.replace("\n", "")]
)
def test_the_contents_say_what_a_file_of_json_is(tmp_path: Path, name: str, bom: str, text: str) -> None:
    data = (bom + text).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)
    for source in (open_source(tmp_path / name), open_source(tmp_path)):
        assert asked(source) == ["a", "b"]
        numbers = ["2", "3"] if text.startswith("\n") else ["1", "2"]
        assert keys(source) == [f"{name}:{number}" for number in numbers]


def test_compression_is_seen_in_the_contents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(lines("a").encode()))
    (tmp_path / "b.jsonl.gz").write_text(lines("b"))
    assert asked(open_source(tmp_path)) == ["a", "b"]


def test_parquet_in_capitals(tmp_path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist([row("a")]), tmp_path / "A.PARQUET")
    assert keys(open_source(tmp_path)) == ["A.PARQUET:1"]


def test_byte_order_marks_between_lines(tmp_path: Path) -> None:
    """As `cat` leaves them."""
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines("a") + "\ufeff" + lines("b"), encoding="utf-8")
    assert asked(open_source(tmp_path / "a.jsonl")) == ["a", "b"]


def test_a_bad_line_among_lines_is_that_line(tmp_path: Path) -> None:
    for first in ("[", "[]", "[1] [2]", "{", "x"):
        for name in ("a.jsonl", "a.json"):
            (tmp_path / name).write_text(f"{first}\n{lines('a', 'b')}")
            if name == "a.json" and first[0] != "{":
                with pytest.raises(ValueError, match="is not a JSON array of rows, nor JSON lines"):
                    open_source(tmp_path / name)
            else:
                assert [found.key for found in check(open_source(tmp_path / name))] == [f"{name}:1"]


@pytest.mark.parametrize(
    "text", ["", " \n", '{"data": []}', '{\n"data": [\n' + lines("a") + "]}", f"{ARRAY} {ARRAY}", f"{ARRAY}x", ARRAY[:-1], '"a"', "{}"]
)
def test_a_json_file_that_is_neither_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    for data in (tmp_path / "a.json", tmp_path):
        with pytest.raises(ValueError, match=r"a\.json is not a JSON array of rows, nor JSON lines"):
            open_source(data)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_other_encodings_are_named(tmp_path: Path, encoding: str, name: str) -> None:
    (tmp_path / name).write_bytes(("\ufeff" + ARRAY).encode(encoding) if encoding == "utf-16-le" else ARRAY.encode(encoding))
    with pytest.raises(ValueError, match=f"{name} is UTF-16 or UTF-32, expected UTF-8"):
        open_source(tmp_path / name)


# --- folders ---


def test_what_editors_and_systems_leave_is_not_read_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text(lines("a"))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.json").write_text(ARRAY)
    left = [".a.jsonl", ".a.jsonl.swp", "._a.jsonl", "a.jsonl~", "#a.jsonl#", "a.jsonl.bak"]
    left += ["a (copy).csv", "notes.txt", "a.jsonl.zst", "x.parquet.gz", "dataset_infos.json"]
    for name in left:
        (tmp_path / name).write_text(lines("twice"))
    os.symlink("nobody@host.1:2", tmp_path / ".#a.jsonl")
    os.symlink(tmp_path / "nowhere.jsonl", tmp_path / "gone.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "empty.jsonl").touch()
    for name in (".ipynb_checkpoints", ".git"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a-checkpoint.jsonl").write_text(lines("twice"))
    (tmp_path / "a.png").write_bytes(picture(20, 20))
    source = open_source(tmp_path)
    assert keys(source) == ["a.jsonl:1", "deep/b.json:1", "deep/b.json:2"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{tmp_path}: {len(left) + 6} not read: " in record.getMessage()
    assert record.getMessage().endswith(f" and {len(left) - 4} more")
    assert ".png" not in record.getMessage()
    for name in left:
        (tmp_path / name).unlink()
    caplog.clear()
    open_source(tmp_path)
    for reason in (
        ".#a.jsonl (hidden",
        "gone.jsonl (a link to nothing)",
        "pipe.jsonl (not a regular file)",
        "empty.jsonl (no row)",
        ".git (hidden)",
    ):
        assert reason in caplog.text


def test_linked_folders_are_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (data / "real", elsewhere / "deep"):
        folder.mkdir(parents=True)
        (folder / "a.jsonl").write_text(lines(folder.name))
    (elsewhere / "deep" / "up").symlink_to(elsewhere)
    for name in ("link", "other"):
        (data / name).symlink_to(elsewhere)
    (data / "again").symlink_to(data / "real")
    (data / "cycle").symlink_to(data)
    (data / "a.jsonl").symlink_to(data / "real" / "a.jsonl")
    os.link(data / "real" / "a.jsonl", data / "real" / "b.jsonl")
    (data / "single.jsonl").symlink_to(tmp_path / "alone.jsonl")
    (tmp_path / "alone.jsonl").write_text(lines("alone"))
    assert keys(open_source(data)) == ["link/deep/a.jsonl:1", "real/a.jsonl:1", "single.jsonl:1"]
    for reason in (
        "a.jsonl (the same file as real/a.jsonl)",
        "real/b.jsonl (the same file as real/a.jsonl)",
        "again (a link to a folder",
        "cycle (a link to a folder",
        "other (a link to a folder",
        "link/deep/up (a link to a folder",
    ):
        assert reason in caplog.text


def test_a_file_beside_its_compressed_copy_is_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text(lines("a"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines("a").encode()))
    assert keys(open_source(tmp_path)) == ["a.jsonl:1"]
    assert "a.jsonl.gz (the file decompressed is beside it)" in caplog.text


def test_order_and_keys_of_plain_folders_are_as_ever(tmp_path: Path) -> None:
    """Resumed runs count on them: paths in the order of their parts."""
    names = ["b.jsonl", "a/z.jsonl", "a.jsonl", "a/b/c.jsonl", "a-b/c.jsonl", "B.jsonl", "10.jsonl", "9.jsonl"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(lines(name))
    expected = ["10.jsonl", "9.jsonl", "B.jsonl", "a/b/c.jsonl", "a/z.jsonl", "a-b/c.jsonl", "a.jsonl", "b.jsonl"]
    assert asked(open_source(tmp_path)) == expected == [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*.jsonl"))]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_named(tmp_path: Path, make) -> None:
    make(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl (holds no file|is not a regular file)"):
        open_source(tmp_path / "a.jsonl")


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text(lines("a"))

    def refuse(*args: object, **settings: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ValueError, match=r"a\.jsonl cannot be read: Permission denied"):
        open_source(tmp_path)
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ValueError, match="the folder .* cannot be read: Permission denied"):
        open_source(tmp_path)


# --- datasets' own ---


def test_splits_are_named_and_a_single_one_is_taken(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list([row("a")])
    for splits in ({"train": one, "test": one}, {"train": one}):
        both = datasets.DatasetDict(splits)
        both.save_to_disk(tmp_path / "saved")
        for data in (both, tmp_path / "saved"):
            if len(splits) == 1:
                assert asked(open_source(data)) == ["a"]
            else:
                with pytest.raises(ValueError, match=r"splits (train, test|test, train): expected"):
                    open_source(data)
        assert asked(open_source(tmp_path / "saved" / "train")) == ["a"]
        shutil.rmtree(tmp_path / "saved")


def test_a_saved_dataset_among_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines("a"))
    datasets.Dataset.from_list([row("a")]).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="saved is a saved dataset in a folder of files"):
        open_source(tmp_path)


# --- images by URL ---


@pytest.mark.parametrize("name", ["a#b.png", "a?b=c.png", "100%.png", "a b.png", "é.png", "a%20b.png", "a;b&c.png"])
def test_file_urls_lead_to_any_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    quoted = path.as_uri()
    given = [quoted, quoted.replace("file://", "file://localhost"), quoted.replace("file://", "FILE:")]
    if "%20" not in name:  # which as it stands is a space
        given.append(f"file://{path}")
    assert read_row(row("?") | {"images": given}, "k").images == (str(path),) * len(given)


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    url = "file:///data/a%FFb.png"
    assert read_row(row("?") | {"image": url}, "k").images == (os.fsdecode(b"/data/a\xffb.png"),)
    path = os.fsencode(tmp_path) + b"/a\xff.jsonl"
    with open(path, "w") as file:
        file.write(lines("a") + "{")
    (found,) = check(open_source(tmp_path))
    assert r"a\udcff.jsonl, line 2: not valid JSON" in found.reason
    found.reason.encode()


# --- costs ---


def test_rows_over_a_limit_are_left_out(tmp_path: Path) -> None:
    for name, text in {
        "a.jsonl": lines("a", "b" * 500, "c") + "\n" * 999 + lines("d"),
        "b.json": json.dumps([row("a"), row("b" * 500)]),
    }.items():
        (tmp_path / name).write_text(text)
    source = open_source(tmp_path, Limits(row_bytes=200))
    assert isinstance(source, Chain)
    found = list(check(source))
    assert [rejection.key for rejection in found] == ["a.jsonl:2", "b.json:2"]
    assert all("the row has more than 200 bytes (row_bytes), expected fewer" in rejection.reason for rejection in found)


def test_a_sparse_file_is_a_bad_row(tmp_path: Path) -> None:
    """20 GB that take no room: of the file, one row is bad; the others are read."""
    with (tmp_path / "a.jsonl").open("w") as file:
        file.write(lines("a"))
        file.truncate(20 * 10**9)
    source = open_source(tmp_path)
    assert source.read(0).key == "a.jsonl:1"
    assert [rejection.key for rejection in check(source)] == ["a.jsonl:2"]
    (tmp_path / "a.jsonl").rename(tmp_path / "a.json")
    assert [rejection.key for rejection in check(open_source(tmp_path))] == ["a.json:2"]


def test_a_row_group_that_swells_is_left_out(tmp_path: Path) -> None:
    """1,000 rows of one text of 50 kB are 50 kB in the file, and 50 MB in memory."""
    rows = [row("x" * 50_000)] * 1000 + [row("a")] * 3
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=1000)
    assert (tmp_path / "a.parquet").stat().st_size < 10**6
    source = open_source(tmp_path / "a.parquet", Limits(group_bytes=10**7))
    assert "its row group takes more than 10000000 bytes (group_bytes)" in source.attempt(7, str).reason
    assert [source.attempt(index, lambda sample: sample.key) for index in (1000, 1002)] == ["a.parquet:1001", "a.parquet:1003"]


def test_a_damaged_page_costs_its_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist([row(f"{index}") for index in range(40)]), path, row_group_size=10, compression="snappy")
    column = parquet.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 24] = b"\xff" * 24
    path.write_bytes(data)
    reads = []
    read_group = ParquetFile._read_group
    monkeypatch.setattr(ParquetFile, "_read_group", lambda self, group: reads.append(group) or read_group(self, group))
    found = list(check(open_source(path)))
    assert [rejection.key for rejection in found] == [f"a.parquet:{number}" for number in range(11, 21)]
    assert reads == [0, 1, 2, 3]  # and not for each of its rows
