"""The integer geometry in C++ against Hugging Face's own functions, sizes and lengths exhaustively where rounding decides."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.image_utils import SizeDict
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil, get_resize_output_image_size
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings

from idefics2_fast import _C


def hf_size(height: int, width: int, shortest_edge: int = 378, longest_edge: int = 980) -> tuple[int, int]:
    image = SimpleNamespace(shape=(3, height, width))
    return get_resize_output_image_size(image, SizeDict(shortest_edge=shortest_edge, longest_edge=longest_edge))


# --- sizes ---


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((768, 1024), (735, 980)),
        ((2532, 1170), (980, 452)),
        ((900, 1008), (874, 980)),  # 875 without the double rounding
        ((899, 1015), (867, 980)),  # a whole row of patches less than 868
        ((1015, 522), (980, 503)),  # 504 where the landscape formula is used
        ((1054, 1240), (833, 980)),  # 832 in float32
        ((200, 300), (378, 378)),  # each side is raised on its own
        ((1, 5000), (378, 980)),
        ((5000, 1), (980, 378)),
        ((1, 1), (378, 378)),
        ((480, 640), (480, 640)),
        ((980, 981), (979, 980)),
    ],
)
def test_sizes_that_show_the_rule(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert hf_size(*size) == expected
    assert _C.output_size(*size, 378, 980) == expected


def test_sizes_where_an_exact_quotient_is_lost_to_rounding() -> None:
    """Every size up to 4096 whose exact result is a whole number: there the order of the operations in double decides."""
    long, short = np.meshgrid(np.arange(981, 4097), np.arange(379, 4097), indexing="ij")
    exact = (980 * short % long == 0) & (short <= long)
    pairs = [(int(long), int(short)) for long, short in zip(long[exact], short[exact], strict=True)]
    assert len(pairs) > 5000
    for long, short in pairs:
        assert _C.output_size(short, long, 378, 980) == hf_size(short, long)
        assert _C.output_size(long, short, 378, 980) == hf_size(long, short)


def test_any_sizes_and_edges() -> None:
    draw = np.random.default_rng(0)
    for height, width, shortest in draw.integers(1, [6000, 6000, 600], (5000, 3)).tolist():
        longest = shortest + int(draw.integers(0, 1000))
        assert _C.output_size(height, width, shortest, longest) == hf_size(height, width, shortest, longest)


@pytest.mark.parametrize("size", [(2, 2), (5, 7), (4, 9), (979, 981)])
def test_crops_are_hugging_faces_in_its_order(size: tuple[int, int]) -> None:
    """Odd sides show which half is the longer; the pixels' numbers show where each crop lies."""
    image = np.arange(size[0] * size[1]).reshape(1, *size)
    crops = [image[:, top : top + height, left : left + width] for top, left, height, width in _C.crop_boxes(*size, True)]
    expected = Idefics2ImageProcessorPil().split_images(image)
    assert len(crops) == len(expected) == 5
    for crop, theirs in zip(crops, expected, strict=True):
        np.testing.assert_array_equal(crop, theirs)
    assert _C.crop_boxes(*size, False) == [(0, 0, *size)]


@pytest.mark.parametrize(("size", "grid"), [((735, 980), (52, 70)), ((980, 692), (70, 49)), ((14, 27), (1, 1)), ((28, 14), (2, 1))])
def test_only_full_patches_count(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert _C.patch_grid(*size, 14) == grid


# --- positions ---


class Ids(torch.nn.Module):
    """Stands in for the position table and gives back the ids that it is asked for."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ids[..., None].to(torch.float32)


def hf_positions(lengths: list[tuple[int, int]], side: int) -> list[torch.Tensor]:
    """Position ids of grids of patches by transformers' own embedding module, all in one padded batch."""
    module = Idefics2VisionEmbeddings(Idefics2VisionConfig(hidden_size=1, image_size=side, patch_size=1))
    torch.nn.init.zeros_(module.patch_embedding.weight)
    torch.nn.init.zeros_(module.patch_embedding.bias)
    module.position_embedding = Ids()
    longest = max(max(pair) for pair in lengths)
    mask = torch.zeros(len(lengths), longest, longest, dtype=torch.bool)
    for row, (height, width) in zip(mask, lengths, strict=True):
        row[:height, :width] = True
    with torch.no_grad():
        ids = module(torch.zeros(len(lengths), 3, longest, longest), mask).squeeze(2).to(torch.int64)
    return [row[valid.flatten()] for row, valid in zip(ids, mask, strict=True)]


@pytest.mark.parametrize(("side", "longest"), [(70, 70), (27, 27), (27, 70), (70, 120)])
def test_positions_equal_transformers_for_every_length(side: int, longest: int) -> None:
    """Rows and columns run through the lengths in opposite directions, so that a swap of the two shows. Past the side, too."""
    lengths = [(n, longest + 1 - n) for n in range(1, longest + 1)]
    for (rows, columns), expected in zip(lengths, hf_positions(lengths, side), strict=True):
        ours = torch.from_numpy(_C.grid_positions(rows, columns, side, "transformers-5"))
        assert torch.equal(ours, expected), (rows, columns)


def side_positions(length: int, side: int, rule: str) -> np.ndarray:
    return _C.grid_positions(1, length, side, rule)


def test_positions_are_not_the_exact_quotients() -> None:
    """18 of the 2485 patches stand on a border that float32 crosses: a formula in integers or doubles would pass everywhere else."""
    wrong = {(n, i) for n in range(1, 71) for i in range(n) if side_positions(n, 70, "transformers-5")[i] != i * 70 // n}
    assert len(wrong) == 18
    assert {n for n, _ in wrong} == {25, 49, 50, 55}
    assert side_positions(25, 70, "transformers-5")[5] == 13


def test_the_formula_of_the_training_time_differs_in_three_places() -> None:
    different = {}
    for n in range(1, 71):
        now, then = side_positions(n, 70, "transformers-5"), side_positions(n, 70, "transformers-4.40")
        different |= {(n, i): (int(now[i]), int(then[i])) for i in range(n) if now[i] != then[i]}
    assert different == {(49, 28): (39, 40), (49, 42): (60, 59), (58, 29): (35, 34)}


EIGHT_LANES = torch.backends.cpu.get_cpu_capability() in {"DEFAULT", "AVX2"}


@pytest.mark.skipif(not EIGHT_LANES, reason="torch.arange rounds by the width of the CPU's vectors: the table is that of eight floats")
@pytest.mark.parametrize(("side", "longest"), [(70, 300), (27, 100), (33, 100), (100, 100)])
def test_the_formula_of_the_training_time_as_it_was_written(side: int, longest: int) -> None:
    """The lines of transformers 4.40; the number of patches is a tensor there, so that the step is rounded to float32."""
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    for n in range(1, longest + 1):
        nb_patches = torch.ones(n, dtype=torch.bool).sum()
        expected = torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / nb_patches), boundaries, right=True)
        assert side_positions(n, side, "transformers-4.40").tolist() == expected.tolist(), n


# --- bad input ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _C.output_size(0, 5, 378, 980), "0x5 pixels .* expected 1x1 at least"),
        (lambda: _C.output_size(5, 5, 980, 378), "shortest_edge 980 and longest_edge 378 .* expected 1 <= shortest_edge <= longest_edge"),
        (lambda: _C.output_size(5, 5, 0, 378), "shortest_edge 0"),
        (lambda: _C.crop_boxes(1, 500, True), "1x500 pixels .* cannot be split in four: expected 2x2 at least"),
        (lambda: _C.crop_boxes(500, 1, True), "500x1 pixels .* cannot be split in four"),
        (lambda: _C.crop_boxes(0, 500, False), "0x500 pixels"),
        (lambda: _C.patch_grid(13, 500, 14), "13x500 pixels .* has no full patch of 14x14"),
        (lambda: _C.patch_grid(13, 500, 0), "patch_size is 0, expected 1 or more"),
        (lambda: _C.grid_positions(0, 5, 70, "transformers-5"), "number of patches is 0, expected 1 to 100000"),
        (lambda: _C.grid_positions(5, 5, 0, "transformers-5"), "positions_per_side is 0, expected 1 to 100000"),
        (lambda: _C.grid_positions(5, 5, 70, "exact"), "position_ids is 'exact', expected 'transformers-5' or 'transformers-4.40'"),
    ],
)
def test_bad_values_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
