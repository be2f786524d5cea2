"""Checkpoints against transformers and safetensors themselves, and against files that lie."""

import contextlib
import json
import logging
import math
import os
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from idefics2_fast import Idefics2, Idefics2Config, weights
from idefics2_fast.benchmarks.local_checkpoint import write_model, write_random_checkpoint
from idefics2_fast.weights import INDEX_FILE, POSITION_TABLE, SINGLE_FILE, load_weights, save_checkpoint, save_weights

TINY = Idefics2Config.named("tiny")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNTOUCHED = 7.0
# Every example writes and reads files of its own.
FILES = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def hugging_face(folder: Path, dtype: torch.dtype | str = "auto") -> dict[str, Tensor]:
    """transformers' own reading of a checkpoint, which must find it complete."""
    from transformers import Idefics2ForConditionalGeneration

    model, report = Idefics2ForConditionalGeneration.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    return model.state_dict()


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def noise(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.randn(shape, generator=draw).to(dtype) for i, shape in enumerate(shapes)}


def blank(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, UNTOUCHED, dtype=dtype or tensor.dtype) for name, tensor in tensors.items()}


def refused(folder: Path, tensors: dict[str, Tensor], match: str) -> str:
    """The one line of the refusal; nothing was written into the destination."""
    target = blank(tensors)
    with pytest.raises(ValueError, match=match) as caught:
        load_weights(target, folder)
    assert all((tensor == UNTOUCHED).all() for tensor in target.values())
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- against transformers ---


@pytest.mark.parametrize("max_shard_size", [10**9, 2_000_000], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_what_transformers_wrote(tmp_path, dtype, max_shard_size):
    write_model(tmp_path, TINY, dtype=dtype, max_shard_size=max_shard_size)
    assert (tmp_path / INDEX_FILE).exists() == (max_shard_size < 10**9)
    assert weights.stored_dtype(tmp_path) == dtype
    model = Idefics2(TINY).to(dtype)
    load_weights(model.hf_tensors(), tmp_path)
    assert_same(model.hf_tensors(), hugging_face(tmp_path))


@pytest.mark.parametrize("max_shard_size", [10**9, 2_000_000], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transformers_reads_what_was_saved(tmp_path, dtype, max_shard_size):
    torch.manual_seed(0)
    model = Idefics2(TINY).to(dtype)
    save_checkpoint(model.hf_tensors(), TINY.to_hf(), tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / INDEX_FILE).exists() == (max_shard_size < 10**9)
    assert_same(hugging_face(tmp_path), model.hf_tensors())
    assert Idefics2Config.from_hf(tmp_path) == TINY
    assert weights.read_eos_ids(tmp_path, ()) == TINY.eos_token_ids


def test_saving_again_changes_nothing(tmp_path):
    write_model(tmp_path / "theirs", TINY, dtype=torch.bfloat16)
    model = Idefics2(TINY).to(torch.bfloat16)
    load_weights(model.hf_tensors(), tmp_path / "theirs")
    save_weights(model.hf_tensors(), tmp_path / "ours")
    assert_same(load_file(tmp_path / "ours" / SINGLE_FILE), load_file(tmp_path / "theirs" / SINGLE_FILE))


def test_index_is_the_one_transformers_writes(tmp_path):
    write_model(tmp_path / "theirs", TINY, max_shard_size=2_000_000)
    model = Idefics2(TINY)
    load_weights(model.hf_tensors(), tmp_path / "theirs")
    save_checkpoint(model.hf_tensors(), TINY.to_hf(), tmp_path / "ours", max_shard_size=2_000_000)
    ours, theirs = (json.loads((tmp_path / side / INDEX_FILE).read_text()) for side in ("ours", "theirs"))
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == config["dtype"] == "float32"


def test_written_models_are_seeded_and_nothing_in_them_is_neutral(tmp_path):
    for folder, seed in (("0", 0), ("again", 0), ("1", 1)):
        write_model(tmp_path / folder, TINY, seed=seed)
    state, again, other = (load_file(tmp_path / folder / SINGLE_FILE) for folder in ("0", "again", "1"))
    assert_same(state, again)
    assert all(tensor.std() > 0.03 and not torch.equal(tensor, other[name]) for name, tensor in state.items())


def test_random_checkpoint_is_a_model(tmp_path):
    write_random_checkpoint(tmp_path / "0", TINY, max_shard_size=2_000_000)
    write_random_checkpoint(tmp_path / "again", TINY)
    write_random_checkpoint(tmp_path / "1", TINY, seed=1)
    state, again, other = (hugging_face(tmp_path / folder) for folder in ("0", "again", "1"))
    assert_same(state, again)
    down = "model.text_model.layers.{}.mlp.down_proj.weight"
    assert state[down.format(0)].dtype == torch.bfloat16
    assert state[down.format(0)].float().std().item() == pytest.approx(176**-0.5, rel=0.05)
    assert state["model.text_model.norm.weight"].float().mean().item() == pytest.approx(1, abs=0.1)
    assert not torch.equal(state[down.format(0)], state[down.format(1)])
    assert not torch.equal(state[down.format(0)], other[down.format(0)])


# --- dtypes, tables, places ---


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", DTYPES, ids=str)
def test_dtypes_convert_as_torch_does(tmp_path, monkeypatch, stored, wanted):
    monkeypatch.setattr(weights, "STAGING_BYTES", 64)  # pieces that end inside tensors
    tensors = noise((33, 17), (5,), (1,), (16, 2), dtype=stored)
    save_file(tensors, tmp_path / SINGLE_FILE)
    target = blank(tensors, wanted)
    load_weights(target, tmp_path)
    assert_same(target, {name: tensor.to(wanted) for name, tensor in tensors.items()})


def test_mixed_dtypes_are_kept_and_aligned(tmp_path):
    tensors = noise((3,), dtype=torch.bfloat16) | {"wide": torch.randn(5), "half": torch.randn(1, 2).half(), "scalar": torch.randn(())}
    save_weights(tensors, tmp_path)
    assert_same(load_file(tmp_path / SINGLE_FILE), tensors)
    assert all(entry.start % tensors[name].itemsize == 0 for name, entry in weights.read_header(tmp_path / SINGLE_FILE).items())
    assert weights.stored_dtype(tmp_path) == torch.float32
    target = blank(tensors)
    load_weights(target, tmp_path)
    assert_same(target, tensors)


def test_values_beyond_float16_are_refused(tmp_path):
    tensors = {"w0": torch.tensor([1.0, 70000.0])}
    save_file(tensors, tmp_path / SINGLE_FILE)
    with pytest.raises(ValueError, match=rf"{SINGLE_FILE}.*'w0'.*float16"):
        load_weights(blank(tensors, torch.float16), tmp_path)


def test_parameters_that_require_gradients_are_filled_in_place(tmp_path):
    layer = torch.nn.Linear(4, 6)
    stored = {"up": torch.randn(2, 4), "down": torch.randn(4, 4).bfloat16(), "bias": torch.randn(6)}
    save_file(stored, tmp_path / SINGLE_FILE)
    load_weights({"up": layer.weight[:2], "down": layer.weight[2:], "bias": layer.bias}, tmp_path)
    assert torch.equal(layer.weight, torch.cat([stored["up"], stored["down"].float()]))
    assert torch.equal(layer.bias, stored["bias"])
    assert layer.weight.requires_grad
    assert layer.weight.is_leaf


def test_progress_counts_bytes(tmp_path):
    tensors = noise((4, 4), (8,), (0, 3))
    save_weights(tensors, tmp_path, max_shard_size=50)
    calls = []
    load_weights(blank(tensors), tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert len(calls) == len(tensors)
    assert [total for _, total in calls] == [96] * 3
    assert calls == sorted(calls)
    assert calls[-1] == (96, 96)


def bicubic(old: int, new: int) -> Tensor:
    """[new, old] in fp64: cubic convolution (Keys 1981) with a = -0.75 at pixel centres, the border repeated."""
    a = -0.75
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            x = abs(centre - tap)
            weight = (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            matrix[i, min(max(tap, 0), old - 1)] += weight
    return matrix


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("old", "new"), [(27, 70), (70, 27)])
def test_position_table_is_resized(tmp_path, caplog, old, new, dtype):
    stored = {POSITION_TABLE: torch.randn(old * old, 3), "w0": torch.randn(2)}
    save_file(stored, tmp_path / SINGLE_FILE)
    target = {POSITION_TABLE: torch.full((new * new, 3), UNTOUCHED, dtype=dtype), "w0": torch.zeros(2)}
    with caplog.at_level(logging.WARNING):
        load_weights(target, tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / SINGLE_FILE}: resized the vision position table from {old * old} to {new * new} rows"
    ]
    assert torch.equal(target["w0"], stored["w0"])
    rows = bicubic(old, new)
    expected = torch.einsum("ra,cb,abw->rcw", rows, rows, stored[POSITION_TABLE].double().view(old, old, 3)).reshape(-1, 3)
    # The four weights of a side sum to at most 1.375 in magnitude, their slopes to 3. In fp32 a place on the old side is off by old * eps.
    eps = (2 * 1.375 * 3 * old + 32) * torch.finfo(torch.float32).eps + 1.375**2 * torch.finfo(dtype).eps / 2
    bound = stored[POSITION_TABLE].abs().max() * eps
    assert (target[POSITION_TABLE].double() - expected).abs().max() <= bound


@pytest.mark.parametrize(
    ("name", "stored", "wanted"),
    [
        (POSITION_TABLE, (26, 3), (49, 3)),
        (POSITION_TABLE, (25, 4), (49, 3)),
        (POSITION_TABLE, (25, 3), (48, 3)),
        (POSITION_TABLE, (0, 3), (49, 3)),
        (POSITION_TABLE, (5, 5, 3), (49, 3)),
        ("w", (25, 3), (49, 3)),
        ("w", (3, 2), (2, 3)),
        ("w", (6,), (2, 3)),
    ],
)
def test_other_shapes_are_refused(tmp_path, name, stored, wanted):
    save_file({name: torch.zeros(stored)}, tmp_path / SINGLE_FILE)
    message = refused(tmp_path, {name: torch.zeros(wanted)}, "has shape")
    assert repr(name) in message
    assert str(list(stored)) in message
    assert str(list(wanted)) in message
    assert SINGLE_FILE in message


MEMORY = """
import resource, sys, torch
from pathlib import Path
from idefics2_fast.weights import load_weights, save_weights

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
target = {f"w{i}": torch.zeros(4096, 2048, dtype=dtype) for i in range(3)}
load_weights({"w": torch.zeros(2)}, folder / "small")  # whatever torch and numpy load at first use
before = peak()
load_weights(target, folder / "large")
save_weights(target, folder / "again", max_shard_size=10**8)
print((peak() - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neither_way_holds_a_second_copy(tmp_path, dtype):
    """96 MiB of fp32 weights: staging takes 16 MiB, a conversion of one piece no more than that again, and there is nothing else."""
    save_file({"w": torch.zeros(2)}, tmp_path / "w")
    (tmp_path / "small").mkdir()
    os.replace(tmp_path / "w", tmp_path / "small" / SINGLE_FILE)
    save_weights({f"w{i}": torch.ones(4096, 2048) for i in range(3)}, tmp_path / "large")
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path), dtype]
    growth = float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert growth < 48, f"{growth} MiB"


# --- refusals ---


def write_header(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_missing_and_unexpected_weights(tmp_path):
    tensors = noise((2,), (3,))
    save_file(tensors, tmp_path / SINGLE_FILE)
    assert "1 missing ('w2')" in refused(tmp_path, noise((2,), (3,), (4,)), "0 unexpected")
    assert "1 unexpected ('w1')" in refused(tmp_path, noise((2,)), "0 missing")
    message = refused(tmp_path, {f"v{i}": torch.zeros(1) for i in range(9)}, "9 missing .*2 unexpected")
    assert "('v0', 'v1', 'v2', ...)" in message
    assert str(tmp_path) in message


def test_old_buffers_are_ignored(tmp_path):
    tensors = noise((2,), (3,))
    buffers = {
        "model.text_model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.vision_model.embeddings.position_ids": torch.arange(9)[None],
    }
    save_file(tensors | buffers, tmp_path / SINGLE_FILE)
    target = blank(tensors)
    load_weights(target, tmp_path)
    assert_same(target, tensors)
    assert weights.stored_dtype(tmp_path) == torch.float32


@pytest.mark.parametrize("cut", [1, 8, 1000])
def test_truncated_files(tmp_path, cut):
    tensors = noise((20, 20))
    save_weights(tensors, tmp_path)
    path = tmp_path / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-cut])
    refused(tmp_path, tensors, f"{SINGLE_FILE} is truncated")


def test_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    tensors = noise((20, 20))
    save_weights(tensors, tmp_path)
    fill = weights._fill

    def cut_then_fill(*arguments):
        os.truncate(tmp_path / SINGLE_FILE, 1000)
        fill(*arguments)

    monkeypatch.setattr(weights, "_fill", cut_then_fill)
    with pytest.raises(ValueError, match=f"{SINGLE_FILE} was truncated"):
        load_weights(blank(tensors), tmp_path)


def test_folders_without_weights(tmp_path):
    tensors = noise((2,))
    refused(tmp_path / "absent", tensors, "absent is not a folder")
    refused(tmp_path, tensors, f"holds no weights: expected {SINGLE_FILE}")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    refused(tmp_path, tensors, r"pickled weights \(pytorch_model.bin\)")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("q_proj.weight.absmax", "bitsandbytes 4-bit"),
        ("q_proj.weight.nested_quant_map", "bitsandbytes 4-bit"),
        ("q_proj.weight.quant_state.bitsandbytes__nf4", "bitsandbytes 4-bit"),
        ("q_proj.SCB", "bitsandbytes 8-bit"),
        ("q_proj.qweight", "GPTQ or AWQ"),
        ("q_proj.weight_scale_inv", "8-bit float"),
    ],
)
def test_quantised_names_are_refused(tmp_path, name, kind):
    save_file({"q_proj.weight": torch.zeros(8, 1, dtype=torch.uint8), name: torch.zeros(2)}, tmp_path / SINGLE_FILE)
    message = refused(tmp_path, {"q_proj.weight": torch.zeros(4, 4)}, kind)
    assert repr(name) in message
    with pytest.raises(ValueError, match=kind):
        weights.stored_dtype(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2")],
    ids=str,
)
def test_quantised_dtypes_are_refused(tmp_path, dtype, stored):
    save_file({"w0": torch.zeros(4, 4).to(dtype)}, tmp_path / SINGLE_FILE)
    assert "'w0'" in refused(tmp_path, {"w0": torch.zeros(4, 4)}, rf"quantised \({stored}\)")


@pytest.mark.parametrize(("dtype", "stored"), [(torch.float64, "F64"), (torch.int32, "I32"), (torch.bool, "BOOL")], ids=str)
def test_other_dtypes_are_refused(tmp_path, dtype, stored):
    save_file({"w0": torch.zeros(4, 4).to(dtype)}, tmp_path / SINGLE_FILE)
    assert "'w0'" in refused(tmp_path, {"w0": torch.zeros(4, 4)}, f"is {stored}, expected one of BF16, F16, F32")
    with pytest.raises(ValueError, match="holds no weights in"):
        weights.stored_dtype(tmp_path)


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "size", "match"),
    [
        (b"", 8, "truncated or not safetensors"),
        (b'{"', 8, "damaged JSON"),
        (b"\xff\xfe{}", 8, "damaged JSON"),
        (b"[" * 200_000, 8, "damaged JSON"),
        (b'{"w0": %s}' % (b"9" * 5000), 8, "damaged JSON"),
        ([1, 2], 8, "expected an object"),
        (b'{"w0": 1, "w0": 2}', 8, "'w0' occurs twice"),
        ({"w0": 3}, 8, "'w0' has a damaged header entry"),
        ({"w0": ONE | {"dtype": None}}, 8, "'w0' has a damaged header entry"),
        ({"w0": ONE | {"shape": "2"}}, 8, "'w0' has a damaged header entry"),
        ({"w0": ONE | {"shape": [2.0]}}, 8, "'w0' has a damaged header entry"),
        ({"w0": ONE | {"shape": [True, 2]}}, 8, "'w0' has a damaged header entry"),
        ({"w0": ONE | {"shape": [-1, -2]}}, 8, "'w0' has a damaged header entry"),
        ({"w0": ONE | {"data_offsets": [0, 8, 8]}}, 8, "'w0' has a damaged header entry"),
        ({"w0": ONE | {"data_offsets": [8, 0]}}, 8, "-8 bytes"),
        ({"w0": ONE | {"dtype": "I64", "data_offsets": [8, 0]}}, 8, "-8 bytes"),
        ({"w0": ONE | {"shape": [3]}}, 8, "8 bytes, expected 12"),
        ({"w0": ONE | {"dtype": "BF16"}}, 8, "8 bytes, expected 4"),
        ({"w0": ONE | {"shape": [2**62, 4]}}, 8, "8 bytes, expected"),
        ({"w0": ONE, "w1": ONE | {"data_offsets": [4, 12]}}, 12, "'w1' starts at byte"),
        ({"w0": ONE, "w1": ONE | {"data_offsets": [0, 8]}}, 8, "'w1' starts at byte"),
        ({"w0": ONE, "w1": ONE | {"data_offsets": [16, 24]}}, 24, "'w1' starts at byte"),
        ({"w0": ONE | {"data_offsets": [4, 12]}}, 12, "'w0' starts at byte"),
        ({"w0": ONE}, 7, "truncated"),
        ({"w0": ONE}, 9, "has a tail"),
    ],
)
def test_damaged_headers(tmp_path, header, size, match):
    write_header(tmp_path / SINGLE_FILE, header, bytes(size))
    assert SINGLE_FILE in refused(tmp_path, {"w0": torch.zeros(2)}, match)


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**63, 2**64 - 1])
def test_header_lengths_that_cannot_be(tmp_path, length):
    (tmp_path / SINGLE_FILE).write_bytes(struct.pack("<Q", length) + b'{"w0": 1}')
    refused(tmp_path, {"w0": torch.zeros(2)}, "truncated or not safetensors")


@pytest.fixture
def shards(tmp_path) -> tuple[Path, dict[str, Tensor]]:
    tensors = noise((4,), (4,), (4,))
    save_weights(tensors, tmp_path, max_shard_size=16)
    return tmp_path, tensors


def rewrite_index(folder: Path, **weight_map: object) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"] |= weight_map
    (folder / INDEX_FILE).write_text(json.dumps(index))


SHARD = "model-0000{}-of-00003.safetensors"


def test_index_that_names_absent_files(shards):
    folder, tensors = shards
    (folder / SHARD.format(2)).unlink()
    refused(folder, tensors, f"{INDEX_FILE} names files that are not there: '{SHARD.format(2)}'")


def test_index_that_disagrees_with_its_files(shards):
    folder, tensors = shards
    rewrite_index(folder, w0=SHARD.format(2))
    refused(folder, tensors, f"{INDEX_FILE} places 'w0' in {SHARD.format(2)}, which does not hold it")
    rewrite_index(folder, w0=SHARD.format(1), w9=SHARD.format(1))
    refused(folder, tensors, f"{INDEX_FILE} places 'w9' in {SHARD.format(1)}, which does not hold it")


def test_weights_that_the_index_does_not_name(shards):
    folder, tensors = shards
    save_file({"w0": tensors["w0"], "w9": torch.zeros(1)}, folder / SHARD.format(1))
    refused(folder, tensors, f"{SHARD.format(1)}: 'w9' is not in the index")


def test_weights_in_two_shards(shards):
    folder, tensors = shards
    save_file({"w1": tensors["w1"], "w0": tensors["w0"]}, folder / SHARD.format(2))
    refused(folder, tensors, f"{SHARD.format(2)}: 'w0' occurs a second time, after {SHARD.format(1)}")


def test_damaged_indices(shards):
    folder, tensors = shards
    for place in ("../" + SHARD.format(1), str(folder / SHARD.format(1)), "", ".", "..", 3, None, "x" * 300, "\ud800", "a\0b"):
        rewrite_index(folder, w0=place)
        refused(folder, tensors, "damaged weight_map|not there")
    for text in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"w0": "a", "w0": "b"}}'):
        (folder / INDEX_FILE).write_text(text)
        refused(folder, tensors, "damaged JSON|damaged weight_map|3 missing")


@FILES
@given(cut=st.integers(0, 500))
def test_any_truncation_is_refused(tmp_path, cut):
    tensors = noise((4, 3), (5,))
    save_weights(tensors, tmp_path)
    path = tmp_path / SINGLE_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: cut % len(whole)])
    refused(tmp_path, tensors, SINGLE_FILE)


@FILES
@given(place=st.integers(0, 10**4), byte=st.integers(0, 255))
@example(place=0, byte=0)
def test_any_changed_header_byte_is_refused_or_harmless(tmp_path, place, byte):
    tensors = noise((4, 3), (5,), (0, 2))
    save_weights(tensors, tmp_path)
    path = tmp_path / SINGLE_FILE
    content = bytearray(path.read_bytes())
    content[place % (len(content) - 4 * 17)] = byte
    path.write_bytes(content)
    untouched_or_whole(tmp_path, tensors)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(0, 70)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["F32", "BF16"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "w0"]), inner, max_size=3)
    ),
    max_leaves=6,
)
field_paths = st.tuples(st.sampled_from(["w0", "w1", "w2", "__metadata__"]), st.sampled_from([None, "dtype", "shape", "data_offsets"]))


@FILES
@given(path=field_paths, value=json_values)
@example(path=("w0", "data_offsets"), value=[0, 20])
@example(path=("w0", "shape"), value=[3, 4])
def test_any_changed_header_field_is_refused_or_harmless(tmp_path, path, value):
    tensors = noise((4, 3), (5,), (0, 2))
    save_weights(tensors, tmp_path)
    content = (tmp_path / SINGLE_FILE).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    name, field = path
    if field is None:
        header[name] = value
    else:
        header[name][field] = value
    write_header(tmp_path / SINGLE_FILE, header, content[8 + length :])
    untouched_or_whole(tmp_path, tensors)


@FILES
@given(name=st.sampled_from(["w0", "w1", "w9"]), value=json_values | st.sampled_from([SHARD.format(n) for n in (1, 2, 3)]))
def test_any_changed_index_entry_is_refused_or_harmless(tmp_path, name, value):
    tensors = noise((4,), (4,), (4,))
    save_weights(tensors, tmp_path, max_shard_size=16)
    rewrite_index(tmp_path, **{name: value})
    untouched_or_whole(tmp_path, tensors)


def untouched_or_whole(folder: Path, tensors: dict[str, Tensor]) -> None:
    target = blank(tensors)
    try:
        load_weights(target, folder)
        refusal = None
    except ValueError as error:
        refusal = str(error)
    assert_same(target, blank(tensors) if refusal else tensors)
    assert refusal is None or str(folder) in refusal  # names the file


# --- saving over, and half-way ---


def layout(folder: Path, tensors: dict[str, Tensor], files: int) -> None:
    save_checkpoint(tensors, TINY.to_hf(), folder, max_shard_size=sum(tensor.nbytes for tensor in tensors.values()) // files)
    assert len(list(folder.glob("*.safetensors"))) == files


OLD, NEW = noise((4,), (4,), (4,), (4,)), noise((4,), (4,), (4,), (4,), seed=1)


@pytest.mark.parametrize("old_files", [1, 2, 4])
@pytest.mark.parametrize("new_files", [1, 2, 4])
def test_saving_over_an_older_save_replaces_it(tmp_path, old_files, new_files):
    layout(tmp_path, OLD, old_files)
    (tmp_path / "tokenizer.json").write_text("{}")
    layout(tmp_path, NEW, new_files)
    target = blank(NEW)
    load_weights(target, tmp_path)
    assert_same(target, NEW)
    others = {"config.json", "generation_config.json", "tokenizer.json"} | ({INDEX_FILE} if new_files > 1 else set())
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".safetensors"} == others


@pytest.mark.parametrize("with_config", [False, True], ids=["weights", "checkpoint"])
@pytest.mark.parametrize("old_files", [1, 2, 4])
@pytest.mark.parametrize("new_files", [1, 2, 4])
def test_save_that_stops_anywhere_leaves_old_new_or_nothing(tmp_path, monkeypatch, old_files, new_files, with_config):
    """Stops it before its first file operation, before its second, and so on until it gets through."""

    class Stopped(BaseException):
        pass

    size = sum(tensor.nbytes for tensor in NEW.values()) // new_files
    for steps in range(40):
        shutil.rmtree(tmp_path)
        layout(tmp_path, OLD, old_files)
        left = [steps]

        def stopping(operation, left=left):
            def step(*arguments, **settings):
                if left[0] == 0:
                    raise Stopped
                left[0] -= 1
                return operation(*arguments, **settings)

            return step

        with monkeypatch.context() as patch, contextlib.suppress(Stopped):
            patch.setattr(weights, "_write_file", stopping(weights._write_file))
            patch.setattr(os, "replace", stopping(os.replace))
            patch.setattr(Path, "unlink", stopping(Path.unlink))
            save_checkpoint(NEW, TINY.to_hf(), tmp_path, max_shard_size=size) if with_config else save_weights(
                NEW, tmp_path, max_shard_size=size
            )
        assert not (tmp_path / ".saving").exists()
        target = blank(NEW)
        if not list(tmp_path.glob(f"{SINGLE_FILE}*")):
            refused(tmp_path, NEW, "holds no weights")
            continue
        load_weights(target, tmp_path)
        assert_same(target, OLD if torch.equal(target["w0"], OLD["w0"]) else NEW)
        if left[0] > 0:
            assert_same(target, NEW)
            assert steps > new_files
            return
    pytest.fail("never got through")


def test_leftovers_of_a_killed_save_are_cleared(tmp_path):
    (tmp_path / ".saving").mkdir()
    (tmp_path / ".saving" / "model-00007-of-00009.safetensors").write_bytes(b"half")
    save_weights(NEW, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE_FILE]


def test_shards_keep_to_their_size(tmp_path):
    tensors = noise((10,), (10,), (100,), (3,), (3,), (0,), (3,))
    save_weights(tensors, tmp_path, max_shard_size=80)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"] == {"total_parameters": 129, "total_size": 516}
    held = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    assert sorted(held) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert all(len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 80 for part in held.values())
    assert index["weight_map"] == {name: file for file, part in held.items() for name in part}


def test_save_refuses_what_cannot_be_read_back(tmp_path):
    with pytest.raises(ValueError, match=r"w0 is torch\.float64: expected one of"):
        save_weights({"w0": torch.zeros(2, dtype=torch.float64)}, tmp_path)
    with pytest.raises(ValueError, match="max_shard_size is 0"):
        save_weights(NEW, tmp_path, max_shard_size=0)
    assert not list(tmp_path.iterdir())


# --- folders, hub ids, vocabulary, ends of text ---


def test_local_folders_resolve_to_themselves(tmp_path, monkeypatch):
    assert weights.resolve_checkpoint(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert weights.resolve_checkpoint("owner/name") == Path("owner/name")
    with pytest.raises(ValueError, match=r"revision 'v1' was given for .*a local folder"):
        weights.resolve_checkpoint(tmp_path, revision="v1")


@pytest.mark.parametrize(
    "path", ["/absent/model", "./model", "../models/a", "~/absent", "a/b/c", "model", "", "https://hub/x", "owner/.hidden"]
)
def test_paths_that_do_not_exist(path):
    with pytest.raises(ValueError, match="is not the folder of a checkpoint"):
        weights.resolve_checkpoint(path)


def test_file_in_place_of_a_folder(tmp_path):
    save_weights(NEW, tmp_path)
    with pytest.raises(ValueError, match=f"{SINGLE_FILE}' is not the folder of a checkpoint"):
        weights.resolve_checkpoint(tmp_path / SINGLE_FILE)


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "unreachable"])
def test_hub_that_does_not_answer(tmp_path, monkeypatch, offline):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # discard: nothing listens
    with pytest.raises(
        ValueError, match=r"owner/name at revision v1 is neither a folder here nor available from the Hugging Face hub: \w"
    ) as error:
        weights.resolve_checkpoint("owner/name", revision="v1")
    assert "\n" not in str(error.value)


def test_hub_gives_weights_and_texts_only(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def download(repository: str, **settings: object) -> str:
        asked.update(settings, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert weights.resolve_checkpoint("HuggingFaceM4/idefics2-8b", revision="v1") == tmp_path
    assert (asked.pop("repository"), asked.pop("revision")) == ("HuggingFaceM4/idefics2-8b", "v1")
    wanted = ["config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "chat_template.json"]
    wanted += [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "added_tokens.json",
        "special_tokens_map.json",
    ]
    wanted += ["model.safetensors", "model-00001-of-00007.safetensors", INDEX_FILE]
    others = [".gitattributes", "README.md", "modeling.py", "pytorch_model.bin", "optimizer.pt", "training_args.bin", "model.gguf"]
    others += ["original/model.safetensors", "onnx/config.json", "a.pkl", "a.npz", "flax_model.msgpack"]
    assert list(filter_repo_objects(wanted + others, **asked)) == wanted


@pytest.mark.parametrize(
    ("entry", "expected"),
    [({}, (2,)), ({"eos_token_id": None}, (2,)), ({"eos_token_id": 5}, (5,)), ({"eos_token_id": [2, 32002]}, (2, 32002))],
)
def test_ends_of_text(tmp_path, entry, expected):
    assert weights.read_eos_ids(tmp_path, (2,)) == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps(entry))
    assert weights.read_eos_ids(tmp_path, (2,)) == expected


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"eos_token_id": "2"}', '{"eos_token_id": []}', '{"eos_token_id": [2, -1]}', '{"eos_token_id": true}']
)
def test_damaged_ends_of_text(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        weights.read_eos_ids(tmp_path, (2,))


# --- CUDA ---


@pytest.mark.cuda
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", DTYPES, ids=str)
def test_cuda_both_ways(tmp_path, monkeypatch, stored, wanted):
    monkeypatch.setattr(weights, "STAGING_BYTES", 64)
    tensors = noise((33, 17), (5,), (1,), dtype=stored)
    save_file(tensors, tmp_path / SINGLE_FILE)
    target = {name: tensor.cuda() for name, tensor in blank(tensors, wanted).items()}
    load_weights(target, tmp_path)
    expected = {name: tensor.to(wanted) for name, tensor in tensors.items()}
    assert_same({name: tensor.cpu() for name, tensor in target.items()}, expected)
    save_weights(target, tmp_path / "again")
    assert_same(load_file(tmp_path / "again" / SINGLE_FILE), expected)
