"""Files, folders, datasets and sequences give the same samples; bad rows are named by file and line."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from support.corpus import mixed_rows, write_jsonl

from idefics2_fast.training.order import ShuffledRows
from idefics2_fast.training.samples import Sample, Turn
from idefics2_fast.training.sources import PROBED, Rejection, RowGroups, Source, check, join_pairs, open_source


def samples(source: Source) -> list[Sample]:
    return [source.read(row) for row in range(len(source))]


def contents(source: Source) -> list[tuple]:
    """Samples without their keys, images as bytes."""
    read = lambda image: Path(image).read_bytes() if isinstance(image, str) else image  # noqa: E731
    return [(sample.turns, tuple(map(read, sample.images)), sample.pairs) for sample in samples(source)]


def stored(rows: list[dict]) -> list[dict]:
    """As datasets stores images."""
    return [{**row, "images": [{"bytes": data, "path": None} for data in row["images"]]} for row in rows]


def test_every_way_in_gives_the_same_samples(tmp_path: Path) -> None:
    rows = mixed_rows(12)
    expected = contents(open_source(rows))
    write_jsonl(tmp_path / "a.jsonl", rows)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "b.json").write_text(json.dumps([json.loads(line) for line in lines], indent=1))
    parquet.write_table(pa.Table.from_pylist(stored(rows)), tmp_path / "c.parquet", row_group_size=5)
    for name in ("a.jsonl", "b.json", "c.parquet"):
        assert contents(open_source(tmp_path / name)) == expected, name
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "texts": datasets.List({"user": datasets.Value("string"), "assistant": datasets.Value("string")}),
        }
    )
    dataset = datasets.Dataset.from_list(stored(rows), features=features)
    assert contents(open_source(dataset)) == expected
    dataset.save_to_disk(tmp_path / "saved")
    assert contents(open_source(tmp_path / "saved")) == expected


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    rows = mixed_rows(9)
    (tmp_path / "deep").mkdir()
    write_jsonl(tmp_path / "b.jsonl", rows[:4])
    parquet.write_table(pa.Table.from_pylist(stored(rows[4:])), tmp_path / "deep" / "a.parquet", row_group_size=2)
    source = open_source(tmp_path)
    assert contents(source) == contents(open_source(rows))
    assert [source.key(row) for row in (0, 3, 4, 8)] == ["b.jsonl:1", "b.jsonl:4", "deep/a.parquet:1", "deep/a.parquet:5"]
    assert source.blocks.tolist() == [1, 1, 1, 1, 2, 2, 1]


def test_keys_do_not_know_the_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "a.jsonl", mixed_rows(2))
    one, two = ([sample.key for sample in samples(open_source(tmp_path / name / "a.jsonl"))] for name in ("one", "two"))
    assert one == two == ["a.jsonl:1", "a.jsonl:2"]


TALK = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def test_check_names_file_and_line_of_every_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        "\n".join([TALK, "", '{"messages": [', TALK, '{"prompt": "a"}', "\ud83d".encode("utf-16", "surrogatepass").hex(), TALK]) + "\n"
    )
    found = list(check(open_source(path)))
    assert [rejection.key for rejection in found] == ["a.jsonl:3", "a.jsonl:5", "a.jsonl:6"]
    assert found[0].reason.startswith(f"{path}, line 3: not valid JSON")
    assert found[1].reason.startswith(f"{path}, line 5: the format is not known: the columns are prompt")


def test_check_names_the_lines_of_a_json_array(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(f'[\n{TALK},\n\n{{"prompt": "a"}},\n{TALK}, {{}}]\n')
    assert [rejection.reason.split(":")[0] for rejection in check(open_source(path))] == [
        f"{path}, line 4 (row 2)",
        f"{path}, line 5 (row 4)",
    ]


def test_check_names_the_rows_of_a_parquet_file(tmp_path: Path) -> None:
    rows = [json.loads(TALK) for _ in range(5)]
    rows[3]["messages"] = []
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    assert [rejection.reason.split(":")[0] for rejection in check(open_source(tmp_path / "a.parquet"))] == [
        f"{tmp_path / 'a.parquet'}, row 4"
    ]


def test_check_uses_every_sample() -> None:
    def refuse(sample: Sample) -> None:
        if sample.key == "1":
            raise ValueError("no")

    assert list(check(open_source(mixed_rows(3)), refuse)) == [Rejection("1", "row 1: no")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "\n\n", "has no row"),
        ("a.json", "{}", "is not a JSON array"),
        ("a.json", f"[{TALK} {TALK}]", "is not a JSON array"),
        ("a.json", f"[{TALK}", "is not a JSON array"),
        ("a.parquet", "x", "is not a Parquet file"),
        ("a.csv", "x", "is not read: expected a file that ends in"),
    ],
)
def test_files_that_are_not_what_they_say(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / name)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file or folder"):
        open_source(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="holds no file that ends in"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="has no row"):
        open_source([])
    with pytest.raises(ValueError, match="is a generator, expected a path or a sequence"):
        open_source(row for row in [1])


def test_parquet_columns_in_no_format_are_named(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"question": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: the format is not known: the columns are question"):
        open_source(tmp_path / "a.parquet")


def test_row_groups_are_read_once_in_shuffled_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of an epoch, and what is kept of the groups, go together."""
    rows = [json.loads(TALK) for _ in range(5000)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=100)
    source, reads = open_source(tmp_path / "a.parquet"), []
    get = RowGroups.get
    monkeypatch.setattr(RowGroups, "get", lambda self, path, group, read: get(self, path, group, lambda: reads.append(group) or read()))
    order = ShuffledRows(source.blocks, seed=1)
    for position in range(len(order)):
        source.read(order[position][1])
    assert sorted(reads) == list(range(50))


@pytest.mark.parametrize("blocks", [[1] * 1500, [100] * 15 + [7], [1500, 1, 300, 900], [700]])
def test_every_epoch_has_every_row_once_in_another_order(blocks: list[int]) -> None:
    order = ShuffledRows(np.array(blocks), seed=3)
    n = sum(blocks)
    first, second = ([order[epoch * n + place] for place in range(n)] for epoch in (0, 1))
    assert [epoch for epoch, _ in first + second] == [0] * n + [1] * n
    rows = [[row for _, row in part] for part in (first, second)]
    assert sorted(rows[0]) == sorted(rows[1]) == list(range(n))
    assert rows[0] != rows[1]
    assert rows[0] != [row for _, row in (ShuffledRows(np.array(blocks), seed=4)[place] for place in range(n))]


def test_blocks_come_in_another_order_each_epoch() -> None:
    order = ShuffledRows(np.full(64, 10), seed=0, window=1)
    first, second = ([order[epoch * 640 + place][1] // 10 for place in range(640)] for epoch in (0, 1))
    assert first != second
    assert all(len(set(first[start : start + 10])) == 1 for start in range(0, 640, 10))  # and each is read in one go


def test_a_shuffle_mixes_all_rows_where_any_is_cheap() -> None:
    """The mean distance of neighbours is that of random rows, n / 3; its standard error is n / sqrt(18 n) = 0.24 sqrt(n)."""
    n = 4096
    order = ShuffledRows(np.ones(n, dtype=np.int64), seed=0)
    rows = np.array([order[place][1] for place in range(n)])
    assert abs(np.abs(np.diff(rows)).mean() - n / 3) < 5 * 0.24 * n**0.5


def test_rows_that_ask_about_one_image_are_joined() -> None:
    def row(images: list, *talk: str) -> dict:
        return {
            "images": images,
            "conversations": [{"from": role, "value": text} for role, text in zip(["human", "gpt"] * 2, talk, strict=False)],
        }

    rows = [
        row(["a.png"], "1?", "one"),
        row(["b.png"], "2?", "two"),
        row(["a.png"], "3?", "three"),
        row(["a.png", "b.png"], "4?", "four"),
        row(["a.png"], "5?", "five", "6?", "six"),  # turns that build on one another stay together and alone
        row([], "7?", "seven"),
        row([], "8?", "eight"),
        row(["a.png"], "9?", "nine"),
        row([b"a"], "?", "!"),
        row([b"a"], "?", "!"),
        row(["a.png"], "<image> 10?", "ten"),
        row(["a.png"], "in <image>?", "no"),
        {},
    ]
    joined = join_pairs(open_source(rows), lambda images: 3 * (2 * 32 + 7))  # room for three of these pairs
    assert [joined.key(index) for index in range(len(joined))] == ["0", "1", "3", "4", "5", "6", "8", "9", "10", "11", "12"]
    questions = ((None, "1?"), ("one",), ("3?",), ("three",), ("9?",), ("nine",))
    assert joined.read(0) == Sample("0", tuple(map(Turn, ("user", "assistant") * 3, questions)), ("a.png",), pairs=True)
    assert joined.read(3) == open_source(rows).read(4)
    assert [rejection.key for rejection in check(joined)] == ["12"]


def test_rows_of_which_none_can_be_joined_are_left_as_they_are() -> None:
    alone = {"image": [b"a"], "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}
    source = open_source([alone] * PROBED + [alone | {"image": ["a.png"]}] * 2)
    assert join_pairs(source, lambda images: 10**6) is source
    source = open_source([alone, alone | {"image": ["a.png"]}, alone | {"image": ["b.png"]}])
    assert join_pairs(source, lambda images: 10**6) is source


def test_joined_rows_keep_the_blocks_that_are_read_together(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    texts = [{"user": "?", "assistant": "!"}]
    images = ["a.png", "a.png", "b.png", "a.png", "c.png", "a.png", "d.png"]
    table = Table.from_pylist([{"images": [name], "texts": texts} for name in images])
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=3)
    source = open_source(tmp_path / "rows.parquet")
    assert source.blocks.tolist() == [3, 3, 1]
    joined = join_pairs(source, lambda images: 10**6)
    assert [joined.key(row) for row in range(len(joined))] == [f"rows.parquet:{line}" for line in (1, 3, 5, 7)]
    assert joined.blocks.tolist() == [2, 1, 1]
    assert len(joined.read(0).turns) == 8
