"""The processor that the tests of the data share."""

from dataclasses import replace

import pytest

from idefics2_fast import Processor
from idefics2_fast.benchmarks.local_checkpoint import write_processor


@pytest.fixture(scope="session")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    """Idefics2's tokenizer and template, 4 placeholder tokens an image, images of 28 to 112 pixels."""
    folder = tmp_path_factory.mktemp("processor")
    write_processor(folder, image_seq_len=4)
    return replace(Processor.from_pretrained(folder), shortest_edge=28, longest_edge=112)
