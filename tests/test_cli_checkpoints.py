"""The command line's checkpoints: revisions, adapters, damaged processors; and terminals that are not UTF-8."""

import argparse
import io
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from idefics2_fast import Idefics2, Processor, attach_adapters, cli, load_adapters, merge_adapters, save_adapters
from idefics2_fast.benchmarks.reading import write_reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "reader"
    write_reader(path, width=32)
    return path


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two that change the answer."""
    paths = []
    for seed in range(2):
        model = Idefics2.from_pretrained(folder)
        attach_adapters(model, rank=2)
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if name.endswith(".b"):
                parameter.data.normal_()
        paths.append(tmp_path_factory.mktemp("adapter") / str(seed))
        save_adapters(model, paths[-1])
    return paths


def answer(folder: Path, model: Idefics2) -> str:
    question = [{"role": "user", "content": "Why?"}]
    return model.generate(Processor.from_pretrained(folder).chat(question), max_new_tokens=8).texts[0] + "\n"


def test_generate_takes_adapters(folder: Path, adapters: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    model, expected = Idefics2.from_pretrained(folder), []
    expected.append(answer(folder, model))
    load_adapters(model, adapters[0])
    expected.append(answer(folder, model))
    merge_adapters(model)
    load_adapters(model, adapters[1])
    expected.append(answer(folder, model))
    assert len({*expected}) == 3
    capsys.readouterr()
    command = ["generate", "--device", "cpu", "--model", str(folder), "--prompt", "Why?", "--max-new-tokens", "8"]
    for text in expected:
        assert cli.main(command) == 0
        assert capsys.readouterr() == (text, "")
        command += ["--adapter", str(adapters[len(command) > 9])]


def test_convert_merges_adapters(folder: Path, adapters: list[Path], tmp_path: Path) -> None:
    command = ["convert", "--model", str(folder), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--adapter", str(adapters[0]), "--adapter", str(adapters[1])]) == 0
    merged = Idefics2.from_pretrained(folder)
    for path in adapters:
        load_adapters(merged, path)
        merge_adapters(merged)
    expected, written = merged.hf_tensors(), load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())


@pytest.mark.parametrize("command", ["generate --prompt x", "convert --out {empty}/out"])
def test_an_adapter_that_is_not_there_is_named_before_the_weights_are_read(
    command: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Idefics2, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    argv = shlex.split(command.format(empty=tmp_path))
    assert cli.main([*argv, "--model", str(folder), "--adapter", str(tmp_path)]) == 2
    assert f"no adapter at {tmp_path}: expected adapter_config.json" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "generate --prompt x", "convert --out {empty}/out"])
def test_a_revision_goes_to_the_hub(
    command: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    asked = []

    def download(name: str, *, revision: str, **_: object) -> str:
        asked.append(revision)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    argv = shlex.split(command.format(empty=tmp_path))
    assert cli.main([*argv, "--model", "owner/name", "--revision", "v1"]) == 0
    assert asked == ["v1"]
    assert cli.main([*argv, "--model", str(folder), "--revision", "v1"]) == 2
    assert "revision 'v1' was given for" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate --prompt x", "convert --out {empty}/out"])
def test_a_tokenizer_without_words_is_a_mistake(command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder, tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").unlink()
    argv = shlex.split(command.format(empty=tmp_path))
    capsys.readouterr()
    assert cli.main([*argv, "--model", str(tmp_path / "in")]) == 2
    assert "there is no tokenizer.json or tokenizer.model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_without_a_processor_are_converted(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path / "in")
    assert cli.main(["convert", "--model", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0


# --- terminals ---

ANSWER = "naïve 示意 🦊 é"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_an_answer_is_never_cut_by_a_terminals_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])

    def run(_: argparse.Namespace) -> None:
        print(ANSWER)
        raise ValueError(ANSWER)

    assert cli.run_command(lambda: argparse.Namespace(debug=False, run=run)) == 2
    out, err = (stream.flush() or stream.buffer.getvalue().decode(encoding) for stream in streams)
    shown = ANSWER.encode(encoding, "backslashreplace").decode(encoding)
    assert (out, err) == (f"{shown}\n", f"idefics2-fast: error: {shown}\n")


ECHO = """
import argparse
from idefics2_fast import cli
cli.run_command(lambda: argparse.Namespace(debug=False, run=lambda _: print("\\u793a \\ud800 end")))
"""


def test_a_process_in_another_locale_prints_all() -> None:
    environment = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PATH": "/usr/bin:/bin"}
    child = subprocess.run([sys.executable, "-c", ECHO], env=environment, capture_output=True, check=True)
    assert child.stdout == rb"\u793a \ud800 end" + b"\n"
