"""The command line in this process, and twice as a user starts it: results against the engine's, mistakes as one line."""

import io
import json
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from idefics2_fast import Generation, Idefics2, Idefics2Config, Processor, cli, counters, ops
from idefics2_fast.benchmarks.local_checkpoint import write_model, write_processor

TINY = Idefics2Config.named("tiny")
SCRIPT = Path(sys.executable).with_name("idefics2-fast")
GENERATE = ["generate", "--device", "cpu", "--model"]
Run = Callable[..., str]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread only waits in a model this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def interruptible() -> Iterator[None]:
    """Shells let what runs in the background ignore Ctrl-C, and its children as well."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and beside its files two images and a text that claims to be one."""
    path = tmp_path_factory.mktemp("cli") / "tiny"
    write_model(path, TINY)
    write_processor(path)
    draw = np.random.default_rng(0)
    for name, shape in (("left.png", (60, 80, 3)), ("right.jpg", (90, 50, 3))):
        Image.fromarray(draw.integers(0, 256, shape, np.uint8)).save(path / name)
    (path / "text.jpg").write_text("not an image")
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Idefics2:
    return Idefics2.from_pretrained(folder)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line that must succeed without a word on stderr, and returns what it printed."""

    def run(*argv: Any) -> str:
        code = cli.main([str(argument) for argument in argv])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return out

    return run


def words(text: str, folder: Path, **others: Path) -> list[str]:
    """A shell's words, with {folder} filled in."""
    return [word.format(folder=folder, **others) for word in shlex.split(text)]


# --- help and mistakes ---

LIGHT = """
import sys
from idefics2_fast.cli import main

for command in ([], ["info"], ["generate"], ["convert"], ["bench"]):
    try:
        main([*command, "--help"])
    except SystemExit as end:
        assert end.code == 0
assert main(["generate"]) == 2
heavy = {"torch", "transformers", "numpy", "PIL", "tqdm"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_and_wrong_arguments_import_nothing_heavy() -> None:
    child = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stdout.count("examples:") == 5


@pytest.mark.parametrize("command", ["", "info", "generate", "convert", "bench"])
def test_every_example_is_a_command_line_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    examples = capsys.readouterr().out.split("examples:\n")[1].replace("\\\n", "").splitlines()
    ours = [line for line in map(str.strip, examples) if line.startswith("idefics2-fast ")]
    assert ours
    for line in ours:
        cli._parse(shlex.split(line)[1:])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == "idefics2-fast 0.1.0\n"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("", "required: COMMAND (see idefics2-fast --help)"),
        ("answer", "invalid choice: 'answer'"),
        ("generate", "required: --model, --prompt (see idefics2-fast generate --help)"),
        ("generate --model {folder} --prompt", "--prompt: expected one argument"),
        ("generate --model {folder} --prompt x --images left.png", "unrecognized arguments: --images left.png"),
        ("generate --model {folder} --prompt ''", "--prompt: it is empty, expected text"),
        ("generate --model {folder} --prompt x\udcff", "'x\\udcff' is not valid text"),
        ("generate --model {folder} --prompt x --stop ''", "--stop: it is empty, expected text"),
        ("generate --model {folder} --prompt x --chat --raw", "--raw: not allowed with argument --chat"),
        ("generate --model {folder} --prompt x --max-new-tokens many", "--max-new-tokens: invalid int value: 'many'"),
        ("generate --model {folder} --prompt x --max-new-tokens 0", "max_new_tokens is 0, expected 1 or more"),
        ("generate --model {folder} --prompt x --temperature -1", "temperature is -1.0, expected 0"),
        ("generate --model {folder} --prompt x --top-p 2", "top_p is 2.0, expected more than 0"),
        (
            "generate --model {folder} --prompt x --dtype int8",
            "--dtype: invalid choice: 'int8' (choose from 'float32', 'bfloat16', 'float16')",
        ),
        ("generate --model {folder} --prompt x --device gpu", "--device: 'gpu' is not a device: expected cpu, cuda or cuda:N"),
        ("generate --model {folder} --prompt x --device cuda:99", "device 'cuda:99' is not there"),
        ("generate --model {folder}/none --prompt x", "/none' is not the folder of a checkpoint"),
        ("generate --model {empty} --prompt x", "has no image settings"),
        ("generate --model {folder} --prompt x --image none.jpg", "image 0: there is no file none.jpg"),
        ("generate --model {folder} --prompt x --image {folder}/left.png {folder}/text.jpg", "text.jpg is not an image"),
        ("generate --model {folder} --prompt x --image", "--image: expected at least one argument"),
        ("generate --model {folder} --prompt x --raw --image {folder}/left.png", "has 0 <image> marks and 1 images"),
        ("generate --model {folder} --prompt '<image> x' --raw", "has 1 <image> marks and 0 images"),
        ("generate --model {folder} --prompt '<image> x' --image {folder}/left.png", "has 2 <image> marks and 1 images"),
        ("generate --model {folder} --prompt x --device cuda:99999999999999999999", "'cuda:99999999999999999999' is not a device"),
        ("generate --model {folder} --prompt x --device cuda:\u0663", "is not a device: expected cpu, cuda or cuda:N"),
        ("generate --model {folder} --prompt x --adapter ''", "--adapter: it is empty, expected a path"),
        ("convert --model {folder} --out ''", "--out: it is empty, expected a path"),
        (f"convert --model {{folder}} --out {{empty}}/out --max-shard-size {'9' * 400}", "is not a size: expected less than 2**63"),
        ("info --revision v1", "revision 'v1' was given without --model"),
        ("info --size huge", "invalid choice: 'huge'"),
        ("info --size tiny --model {folder}", "--model: not allowed with argument --size"),
        ("info --model {empty}", "no Idefics2 configuration at"),
        ("convert --model {folder}", "required: --out"),
        ("convert --model {folder} --out {folder} --force", "expected a folder other than the one that is read"),
        ("convert --model {folder} --out {folder}/left.png --force", "expected a folder other than the one that is read"),
        ("convert --model {folder} --out {folder}/left.png/out", "Not a directory"),
        ("convert --model {folder} --out {empty}/out --max-shard-size 5parsecs", "'5parsecs' is not a size"),
        ("convert --model {folder} --out {empty}/out --max-shard-size 0GB", "max_shard_size is 0"),
        ("convert --model {empty} --out {empty}/out", "no Idefics2 configuration at"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    argv: str, expected: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(argv, folder, empty=tmp_path)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("idefics2-fast: error: ")
    assert err.count("\n") == 1
    assert expected in err
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_larger_than_the_embedding_is_a_mistake(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    write_model(tmp_path, replace(TINY, text=replace(TINY.text, vocab_size=32002)))
    capsys.readouterr()
    assert cli.main(["generate", "--model", str(tmp_path), "--prompt", "x"]) == 2
    assert capsys.readouterr() == ("", "idefics2-fast: error: the tokenizer has 32003 tokens, the model's embedding only 32002 rows\n")


def test_a_reason_of_many_lines_becomes_one(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(folder / "processor_config.json", tmp_path)
    with pytest.raises(ValueError, match=r"(?s)has no tokenizer.*\n.*\n"):
        Processor.from_pretrained(tmp_path)
    capsys.readouterr()
    assert cli.main(["generate", "--model", str(tmp_path), "--prompt", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_debug_adds_the_traceback(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--debug", "--model", f"{folder}/none"]) == 2
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert last.startswith("idefics2-fast: error: ")


# --- info ---


def row(table: str, name: str) -> list[str]:
    """The cells of the line that starts with `name`."""
    return next(line[len(name) :].split("  ") for line in table.splitlines() if line.startswith(f"{name} "))


def cells(table: str, name: str) -> list[str]:
    return [cell.strip() for cell in row(table, name) if cell.strip()]


def test_info_shows_what_each_op_takes_here(run: Run) -> None:
    out = run("info")
    assert f"torch {torch.__version__}" in cells(out, "versions")[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for op, known in ops.IMPLEMENTATIONS.items():
        chosen = [
            ops.choose(op, torch.empty(1, 128, dtype=dtype, device=device)) for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ]
        assert cells(out, op) == [*chosen, ", ".join(known)]
    assert "parameters" not in out


def test_info_of_a_named_size(run: Run) -> None:
    out = run("info", "--size", "idefics2-8b")
    flops = counters.forward_flops(Idefics2Config.named("idefics2-8b"), [64 + 32], [70 * 70], head_rows=1)
    assert cells(out, "total") == ["8,402,768,112", "33.6 GB", "16.8 GB", "16.8 GB", f"{flops.total / 1e9:,.1f}"]
    assert cells(out, "projection")[:3] == ["91,750,400", "367.0 MB", "183.5 MB"]
    assert cells(out, "perceiver") != cells(out, "text")
    assert cells(out, "KV cache, a token") == ["262.1 KB", "131.1 KB", "131.1 KB"]
    assert "27 layers, width 1152, 16 heads of 72" in out


def test_info_of_a_checkpoint_needs_its_config_alone(folder: Path, tmp_path: Path, run: Run) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    total = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert cells(run("info", "--model", tmp_path), "total")[0] == f"{total:,}"


# --- generate ---


@cache
def read_processor(folder: Path, split: bool) -> Processor:
    return Processor.from_pretrained(folder, split_images=split)


def answer(
    folder: Path, model: Idefics2, prompt: str, images: tuple[str, ...] = (), *, chat: bool = True, split: bool = False, **settings: Any
) -> Generation:
    """The engine's own answer to what the command line is asked."""
    processor, paths = read_processor(folder, split), [folder / image for image in images]
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
    batch = processor.chat([{"role": "user", "content": content}], paths) if chat else processor(prompt, paths)
    return model.generate(batch, **settings)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--prompt Why?", {}),
        ("--prompt Why? --image {folder}/left.png", {"images": ("left.png",)}),
        ("--prompt Why? --image {folder}/right.jpg {folder}/left.png", {"images": ("right.jpg", "left.png")}),
        ("--prompt Why? --image {folder}/right.jpg --image {folder}/left.png", {"images": ("right.jpg", "left.png")}),
        ("--prompt Why? --image {folder}/left.png --split", {"images": ("left.png",), "split": True}),
        ("--prompt Why? --chat --no-split", {}),
        ("--prompt Why? --raw", {"chat": False}),
        ("--prompt 'See <image>' --raw --image {folder}/left.png", {"prompt": "See <image>", "chat": False, "images": ("left.png",)}),
        ("--prompt Why? --max-new-tokens 3", {"max_new_tokens": 3}),
        ("--prompt Why? --temperature 0.9", {"temperature": 0.9}),
        ("--prompt Why? --temperature 0.9 --seed 5", {"temperature": 0.9, "seed": 5}),
        ("--prompt Why? --temperature 0.9 --top-p 0.5", {"temperature": 0.9, "top_p": 0.5}),
    ],
)
def test_generate_gives_the_engines_answer(argv: str, expected: dict[str, Any], folder: Path, model: Idefics2, run: Run) -> None:
    out = answer(folder, model, **{"prompt": "Why?", "max_new_tokens": 16} | expected)
    if expected:
        default = answer(folder, model, "Why?", max_new_tokens=16)
        assert out.tokens != default.tokens, "an option without effect shows nothing"
    printed = json.loads(run(*GENERATE, folder, "--json", "--max-new-tokens", 16, *words(argv, folder)))
    seconds = printed.pop("seconds")
    assert printed == {"tokens": out.tokens[0], "text": out.texts[0], "finish": out.finish[0]}
    assert sorted(seconds) == ["decode", "load", "prefill", "prepare"]
    assert all(value >= 0 for value in seconds.values())


def test_generate_stops_and_avoids_words(folder: Path, model: Idefics2, run: Run) -> None:
    default = answer(folder, model, "Why?", max_new_tokens=20)
    stop, bad = default.texts[0][30:33], default.texts[0].split()[1]
    settings = {"max_new_tokens": 20, "stop_strings": ["no such text", stop], "bad_words": ["no such word", bad]}
    out = answer(folder, model, "Why?", **settings)
    command = [*GENERATE, folder, "--prompt", "Why?", "--max-new-tokens", 20, "--stop", "no such text", stop]
    printed = json.loads(run(*command, "--bad-word", "no such word", "--bad-word", bad, "--json"))
    assert (printed["tokens"], printed["text"], printed["finish"]) == (out.tokens[0], out.texts[0], out.finish[0])
    assert run(*command) == default.texts[0][: default.texts[0].index(stop)] + "\n"


def test_generate_runs_in_another_dtype(folder: Path, model: Idefics2, run: Run) -> None:
    settings = {"max_new_tokens": 8, "temperature": 3.0}  # draws from a flat distribution, which rounding changes at once
    out = answer(folder, Idefics2.from_pretrained(folder, dtype=torch.bfloat16), "Why?", **settings)
    assert out.tokens != answer(folder, model, "Why?", **settings).tokens
    command = [*GENERATE, folder, "--prompt", "Why?", "--max-new-tokens", 8, "--temperature", 3]
    assert run(*command, "--dtype", "bfloat16") == out.texts[0] + "\n"


def at_decode_step(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    module = sys.modules["idefics2_fast.generate"]
    step = module.decode_step

    def decode_step(*arguments: Any) -> torch.Tensor:
        action()
        return step(*arguments)

    monkeypatch.setattr(module, "decode_step", decode_step)


def test_text_is_printed_as_it_is_made(
    folder: Path, model: Idefics2, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    expected = answer(folder, model, "Why?", max_new_tokens=8).texts[0]
    at_decode_step(monkeypatch, lambda: texts.append(capsys.readouterr().out))
    assert cli.main([*GENERATE, str(folder), "--prompt", "Why?", "--max-new-tokens", "8"]) == 0
    assert sum(map(bool, texts)) >= 4
    assert "".join(texts) + capsys.readouterr().out == expected + "\n"


def test_an_interrupted_json_answer_is_not_lost(
    folder: Path, model: Idefics2, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = answer(folder, model, "Why?", max_new_tokens=3)
    steps = iter(range(2))
    at_decode_step(monkeypatch, lambda: next(steps, None) is None and signal.raise_signal(signal.SIGINT))
    assert cli.main([*GENERATE, str(folder), "--prompt", "Why?", "--json"]) == 130
    printed = json.loads(capsys.readouterr().out)
    assert (printed["tokens"], printed["finish"]) == (expected.tokens[0], "interrupted")


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_what_was_printed_stays(folder: Path) -> None:
    command = [SCRIPT, *GENERATE, folder, "--prompt", "Why?", "--max-new-tokens", "500"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    first = child.stdout.read(4)
    child.send_signal(signal.SIGINT)
    rest, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (130, b"")
    assert len(first) == 4
    assert rest.endswith(b"\n")


@pytest.mark.cuda
def test_generate_takes_the_gpu_where_there_is_one(folder: Path, run: Run) -> None:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert run("generate", "--model", folder, "--prompt", "Why?", "--image", folder / "left.png", "--max-new-tokens", 4)
    assert torch.cuda.max_memory_allocated() - before > (folder / "model.safetensors").stat().st_size


# --- streams ---


def test_a_reader_that_left_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["info"]) == 141
        print("what is flushed at the end goes nowhere")
    assert capsys.readouterr().err == ""


def test_a_closed_stdout_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["generate", "--model", str(folder), "--prompt", "x", "--max-new-tokens", "2"]) == 0


@pytest.mark.parametrize(("delay", "terminal", "shown"), [(0.0, True, True), (0.0, False, False), (60.0, True, False)])
def test_a_bar_shows_on_a_terminal_while_weights_load_for_long(
    delay: float, terminal: bool, shown: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(cli, "BAR_DELAY", delay)
    assert cli.main(["convert", "--model", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert ("reading weights" in stderr.getvalue()) == shown


# --- convert and bench ---


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_convert_writes_what_transformers_loads(dtype: torch.dtype | None, folder: Path, tmp_path: Path, run: Run) -> None:
    from transformers import Idefics2ForConditionalGeneration

    out, name = tmp_path / "out", str(dtype or torch.float32).removeprefix("torch.")
    printed = run("convert", "--model", folder, "--out", out, "--max-shard-size", "4.5MB", *(["--dtype", name] if dtype else []))
    expected = {name: tensor.to(dtype or torch.float32) for name, tensor in read(folder).items()}
    size = sum(tensor.nbytes for tensor in expected.values())
    assert printed == f"{out}: {size / 1e6:.1f} MB in {name}\n"
    loaded, report = Idefics2ForConditionalGeneration.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.state_dict().keys() == expected.keys()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), expected[key].view(torch.uint8)), key
    shards = [load_file(path) for path in out.glob("*.safetensors")]
    assert len(shards) > 1
    assert all(len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= 4.5e6 for shard in shards)


def test_a_converted_checkpoint_answers_as_its_source(folder: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "deep" / "out"
    run("convert", "--model", folder, "--out", out)
    arguments = ["--image", folder / "left.png", "--prompt", "Why?", "--max-new-tokens", 20]
    assert run("generate", "--model", out, *arguments) == run("generate", "--model", folder, *arguments)
    others = {path.name for path in folder.iterdir()} - {"config.json", "model.safetensors", "left.png", "right.jpg", "text.jpg"}
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", *others}
    assert others >= {"generation_config.json", "processor_config.json", "tokenizer.json", "chat_template.jinja"}
    assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in others)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_convert_overwrites_a_checkpoint_only_by_force(
    name: str, folder: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("precious")
    command = ["convert", "--model", str(folder), "--out", str(tmp_path)]
    assert cli.main(command) == 2
    assert f"holds a checkpoint ({name}): give another folder, or --force" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]
    run(*command, "--force")
    assert read(tmp_path).keys() == read(folder).keys()


def test_bench_hands_its_arguments_on(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    started = []
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(runpy, "run_module", lambda module, run_name: started.append((module, run_name, sys.argv[1:])))
    arguments = ["images", "--size", "tiny", "--repeat=3", "-v"]
    run("bench", *arguments)
    assert started == [("idefics2_fast.benchmarks", "__main__", arguments)]
