"""What the tests of the trainer share: a processor, and a small corpus with a model to train on it."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.corpus import mixed_rows, write_jsonl

from idefics2_fast import Idefics2Config, Processor
from idefics2_fast.benchmarks.local_checkpoint import write_model, write_processor

TINY = Idefics2Config.named("tiny")


def small_processor(folder: Path) -> Processor:
    """Idefics2's tokenizer and template, 4 placeholder tokens an image, images of 28 to 112 pixels."""
    write_processor(folder, image_seq_len=4)
    return replace(Processor.from_pretrained(folder), shortest_edge=28, longest_edge=112)


@pytest.fixture(scope="session")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return small_processor(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, a checkpoint of the tiny model, and `data.jsonl`, 60 rows."""
    folder = tmp_path_factory.mktemp("corpus")
    write_model(folder / "model", replace(TINY, perceiver=replace(TINY.perceiver, n_latents=4)))
    small_processor(folder / "model").save_pretrained(folder / "model")
    write_jsonl(folder / "data.jsonl", mixed_rows(60))
    return folder
