"""The README's Python examples run as they stand, on a tiny checkpoint instead of the hub's."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from idefics2_fast import Idefics2, Idefics2Config, attach_adapters, save_adapters
from idefics2_fast.benchmarks import instruct, readme
from idefics2_fast.benchmarks.local_checkpoint import write_model, write_processor
from idefics2_fast.benchmarks.report import seconds

README = Path(__file__).parent.parent / "README.md"
LONG = "steps=2000, held_out=50"
SHORT = 'steps=2, held_out=1, warmup=0, packs=1, tokens=200, patches=2000, split_share=0.0, upscale_share=0.0, dtype="float32"'


def test_examples_run(tmp_path, monkeypatch, capsys):
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(examples) >= 3
    write_model(tmp_path / "model", Idefics2Config.named("tiny"))
    write_processor(tmp_path / "model")
    for name in ("photo.jpg", "a.png", "b.png"):
        Image.fromarray(np.random.default_rng(len(name)).integers(0, 255, (300, 400, 3), np.uint8)).save(tmp_path / name)
    for number, language in enumerate(("french", "german")):
        model = Idefics2.from_pretrained(tmp_path / "model")
        attach_adapters(model, rank=4, seed=number)
        save_adapters(model, tmp_path / "adapters" / language)
    talk = [{"user": "What is this?", "assistant": "A cat on a mat."}]
    rows = [{"images": [name], "texts": talk} for name in ("photo.jpg", "a.png", "b.png")]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    code = "\n".join(examples).replace('"HuggingFaceM4/idefics2-8b"', '"model"').replace('device="cuda"', 'device="cpu"')
    assert code.count(LONG) == 1
    code = code.replace(LONG, SHORT)
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["out"].texts
    assert scope["logits"].shape == (len(scope["batch"].token_ids), 32003)
    assert scope["result"].steps == 2
    assert "of 1 answers" in (tmp_path / "runs" / "a" / "report.html").read_text()
    assert (tmp_path / "my-model" / "model.safetensors").is_file()
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_two_commands_are_there(command):
    assert command in README.read_text()


# --- figures ---

NUMBER = re.compile(r"(?<![\w.-])\d+(?:[.,]\d+)*(?:e-?\d+)?")


def measured_section(text):
    return text.partition("## What is measured\n")[2].partition("\n## ")[0]


def unfounded(text, said, cases):
    """Numbers that come neither from a record nor from what the records say was measured: cases and model sizes."""
    for figure in sorted(said, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.]){re.escape(figure)}(?!\w)", " ", text)
    known = set(NUMBER.findall(" ".join(cases)))
    return [number for number in NUMBER.findall(text) if number not in known]


def named(committed):
    """What was measured, in words; and what is no figure: the processor's name, bits of weights, a tolerance, limits of images."""
    facts = ["weights of 16 and 22 bits, 8.4 billion parameters, within 1e-4, up to 980 and 756 pixels"]
    assert instruct.TOLERANCE == 1e-4
    assert [max(max(size) for sizes in instruct.SIZES[name] for size in sizes) for name in ("tiny", "small")] == [980, 756]
    return [*(record.case for record in committed), *facts]


def test_the_figures_are_those_of_the_committed_results():
    text = README.read_text()
    generated, _ = readme.section(readme.committed())
    assert readme.written(text, generated) == text, "run python -m idefics2_fast.benchmarks --readme"


def test_every_figure_is_found_in_the_results():
    committed = readme.committed()
    text = measured_section(README.read_text())
    _, figures = readme.section(committed)
    assert len(figures.said) > 100
    assert unfounded(text, figures.said, named(committed)) == []
    for invented in ("in 27 s", "17.3 GB", "1.86 x"):
        assert unfounded(f"{text} {invented}", figures.said, named(committed))


def test_a_changed_result_changes_the_figures(tmp_path):
    committed = readme.committed()
    before, _ = readme.section(committed)
    changed = [replace(r, value=2 * r.value) if r.value and r.metric == "time" and r.suite == "encode" else r for r in committed]
    after, _ = readme.section(changed)
    slowed = max(r.value for r in changed if r.suite == "encode" and r.metric == "time" and r.value)
    assert after != before
    assert seconds(slowed) in after
    assert seconds(slowed) not in before


def test_what_was_not_measured_is_left_out_and_named():
    committed = [r for r in readme.committed() if "fill 0.75" not in r.case]
    text, figures = readme.section(committed)
    assert "| encode 8 images, fill 0.75 |" not in text
    untimed = text.partition("Not timed, and not in the table: ")[2].partition("\n")[0]
    assert {f"encode 8 images, fill 0.75, {size} fp32" for size in ("tiny", "small")} <= set(untimed.rstrip(".").split("; "))
    assert any("fill 0.75" in missing for missing in figures.missing)


def test_a_readme_without_marks_is_refused():
    with pytest.raises(ValueError, match="no marks"):
        readme.written("nothing", "figures")
