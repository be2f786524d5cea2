"""The README's Python examples run as they stand, on a tiny checkpoint instead of the hub's."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from idefics2_fast import Idefics2, Idefics2Config, attach_adapters, save_adapters
from idefics2_fast.benchmarks.local_checkpoint import write_model, write_processor

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
