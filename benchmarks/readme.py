"""The README's figures, written from the committed results: `python -m idefics2_fast.benchmarks --readme`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from idefics2_fast.benchmarks.case import ENGINE
from idefics2_fast.benchmarks.record import RESULTS, Record, read_records
from idefics2_fast.benchmarks.report import seconds

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- figures: python -m idefics2_fast.benchmarks --readme -->\n", "<!-- figures end -->\n"
# The CPU whose results the README shows, as `default_path` names its files.
CPU = "intel-r-xeon-r-processor-vnni-bf16"
FILES = (f"{CPU}-2-threads.jsonl", f"{CPU}-1-threads.jsonl")
HF, TUNED, COMPILED, PATCH = "hf", "hf-tuned", "hf-compiled", "patch"

# label, suite, case, pass
Line = tuple[str, str, str, str]
MODEL: list[Line] = [
    *((f"encode 8 images, fill {fill} | {size}", "encode", f"{size}, 8 images, fill {fill}", "forward") for size, fill in [
        ("tiny fp32", "0.40"), ("tiny fp32", "0.75"), ("small fp32", "0.40"), ("small fp32", "0.75")]),
    *((f"first token, 4 prompts, {how} | {size}", "first_token", f"{size}, 4 prompts, {how}", "forward")
      for size in ("tiny fp32", "small fp32") for how in ("preprocessed images", "image processing included")),
    *((f"decode, 1 sequence, a token | {size}", "decode", f"{size}, 1 sequence, a token", "forward")
      for size in ("tiny fp32", "small fp32", "small bf16")),
]  # fmt: skip
PATCHED: list[Line] = [
    *(
        (f"encode 8 images, fill 0.40, `{size}`", PATCH, f"{size} fp32, 8 images, fill 0.40: encode", "forward")
        for size in ("tiny", "small")
    ),
    (
        "generate, 4 prompts, 32 tokens each, `small`",
        PATCH,
        "small fp32, 4 prompts, 32 tokens each: generate, preprocessed images",
        "forward",
    ),
    *((f"DoRA training step, `{size}`", PATCH, f"{size} fp32, 4 images: DoRA training step", "both") for size in ("tiny", "small")),
]
HEADS = ("frozen", "trained")
LOSS: list[Line] = [
    (f"the loss alone, {head} head", "linear_cross_entropy", f"{head} head, 2048 tokens, 10% answers, 1024 x 32003 fp32", "both")
    for head in HEADS
]
PARTS = "small fp32, 4 images of half the size: parts of a DoRA training step"
DORA = "{}, 1024 tokens, rank 64"
STEP, BESIDE = "{} fp32, 4 documents, 3 images: DoRA and NEFTune training step", "{} fp32, 4 documents, 3 images: DoRA beside LoRA"
TRAINED: list[Line] = [
    ("tiny, images up to 980 pixels", "instruct", STEP.format("tiny"), "both"),
    ("small, images up to 756 pixels", "instruct", STEP.format("small"), "both"),
]
KERNELS: list[Line] = [
    (
        "the perceiver's context (norms, keys and values of all layers, attention), both ways",
        "perceiver",
        "2000 patches, hidden 4096",
        "both",
    ),
    ("embedding with NEFTune's noise over a frozen table, forward", "embedding", "2048 tokens, float32, noise, frozen table", "forward"),
    ("attention of 4 mixed images, both ways", "segment_attention", "4 images, 7796 patches, float32", "both"),
]
IMAGES = [(size, f"resample and pack, {size}") for size in ("300x200", "640x480", "1024x768", "1600x1200", "2480x3508", "4000x3000")]
FILES_CASE = "files to patches, split batch of six"  # which torchvision has no part in
IMAGES += [("split batch of the six", "split batch of all 6"), ("from JPEG files, split batch", FILES_CASE)]
LOADING = "the demo's questions: data"


class Figures:
    """Looks records up and writes them down.

    Attributes:
        said: everything that was written from a record.
        missing: what was asked for and is not in the results.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        records = list(records)
        self.devices = sorted({r.device for r in records})
        self._values = {(r.suite, r.case, r.pass_, r.provider, r.metric): r.value for r in records if r.value is not None}
        self.said: list[str] = []
        self.missing: list[str] = []

    def value(self, suite: str, case: str, pass_: str, provider: str, metric: str) -> float | None:
        found = self._values.get((suite, case, pass_, provider, metric))
        if found is None:
            self.missing.append(f"{suite}: {case}, {pass_}: {provider}, {metric}")
        return found

    def say(self, text: str) -> str:
        self.said.append(text)
        return text

    def time(self, line: Sequence[str], provider: str = ENGINE) -> str:
        found = self.value(*line[-3:], provider, "time")
        return "-" if found is None else self.say(seconds(found))

    def speed(self, line: Sequence[str], baseline: str, inverse: bool = False) -> str:
        """Of the engine; inverse: of the baseline."""
        found = self.value(*line[-3:], ENGINE, f"speed against {baseline}")
        return "-" if found is None else self.say(f"{1 / found if inverse else found:.2f} x")

    def memory(self, line: Sequence[str], baseline: str) -> str:
        own, theirs = (self.value(*line[-3:], provider, "peak memory") for provider in (ENGINE, baseline))
        return "-" if None in (own, theirs) or not theirs else self.say(f"{own / theirs:.2f} x")

    def share(self, suite: str, case: str, metric: str) -> str:
        found = self.value(suite, case, "both", ENGINE, metric)
        return "-" if found is None else self.say(f"{found:.1%}".replace("%", " %"))

    def number(self, suite: str, case: str, metric: str, unit: str) -> str:
        found = self.value(suite, case, "both", ENGINE, metric)
        return "-" if found is None else self.say(f"{found:.2g} {unit}")


def section(records: Iterable[Record]) -> tuple[str, Figures]:
    """What stands between the marks, and where its figures came from."""
    f = Figures(records)
    table = "\n".join(
        [
            "| what | model | transformers | tuned | idefics2_fast | speed: as it comes | **tuned** | peak memory: as it comes | tuned |",
            "|---|---|---|---|---|---|---|---|---|",
            *(row(f, line) for line in MODEL if known(f, line)),
        ]
    )
    return TEXT.format(
        cpu=f.say(f.devices[-1]),
        model=table,
        untimed=untimed(f, MODEL),
        compiled=compiled(f),
        patched=side_by_side(f, PATCHED, "patched"),
        loss=loss_table(f),
        dora="; ".join(dora(f, shape) for shape in ("4096x4096", "14336x4096")),
        parts=parts(f),
        trained=side_by_side(f, TRAINED, "idefics2_fast"),
        lora=" and ".join(f"{f.speed(('instruct', BESIDE.format(size), 'both'), 'LoRA', True)} on `{size}`" for size in ("tiny", "small")),
        tokens=f.share("instruct", LOADING, "fill of tokens"),
        patches=f.share("instruct", LOADING, "fill of patches"),
        loader=f.number("instruct", LOADING, "loader against model", "x"),
        wait=f.share("instruct", LOADING, "data wait"),
        first=f.number("instruct", LOADING, "time to the first loss", "s"),
        kernels=kernel_table(f),
        images=image_table(f),
        threads=f.speed(("images", "resample and pack, 4000x3000", "forward"), "2 threads", True),
        simd=simd(f),
        rows=", ".join(f"[{name}](benchmarks/results/{name})" for name in FILES),
    ), f


def known(f: Figures, line: Line) -> bool:
    """Whether the engine has a time there; a line without one is left out."""
    return f.value(*line[-3:], ENGINE, "time") is not None


def untimed(f: Figures, lines: Sequence[Line]) -> str:
    """Names the lines that a table is without, in a sentence."""
    names = [line[0].replace(" | ", ", ") for line in lines if not known(f, line)]
    return f" Not timed, and not in the table: {'; '.join(names)}." if names else ""


def compiled(f: Figures) -> str:
    """Speed against transformers under `torch.compile`, of the model that it compiles in seconds."""
    lines = [line for line in MODEL if "| tiny" in line[0] and f.value(*line[-3:], COMPILED, "time") is not None]
    said = [f"{line[0].split(' | ')[0]} {f.speed(line, COMPILED)}" for line in lines]
    return f"\nAgainst transformers under `torch.compile`, `tiny` fp32: {'; '.join(said)}.\n" if said else ""


def row(f: Figures, line: Line) -> str:
    times = (f.time(line, provider) for provider in (HF, TUNED, ENGINE))
    cells = [line[0], *times, f.speed(line, HF), f"**{f.speed(line, TUNED)}**", f.memory(line, HF), f.memory(line, TUNED)]
    return f"| {' | '.join(cells)} |"


def side_by_side(f: Figures, lines: Sequence[Line], ours: str) -> str:
    head = f"| what | transformers + PEFT | tuned | {ours} | speed: as it comes | **tuned** | peak memory: as it comes | tuned |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *(row(f, line) for line in lines if known(f, line))])


def loss_table(f: Figures) -> str:
    lines = ["| what | transformers | torch | idefics2_fast | speed: transformers | torch | peak memory: transformers | torch |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for line in LOSS:
        times = (f.time(line, provider) for provider in (HF, "torch", ENGINE))
        cells = [line[0], *times, *(f.speed(line, name) for name in (HF, "torch")), *(f.memory(line, name) for name in (HF, "torch"))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def kernel_table(f: Figures) -> str:
    """Ops against transformers' chains; empty while none was measured."""
    lines = [line for line in KERNELS if known(f, line)]
    if not lines:
        return ""
    made = ["", "One op alone, beside transformers' own chain, fp32:", "", "| what | transformers | idefics2_fast | speed | peak memory |"]
    made += ["|---|---|---|---|---|"]
    made += [f"| {line[0]} | {f.time(line, HF)} | {f.time(line)} | {f.speed(line, HF)} | {f.memory(line, HF)} |" for line in lines]
    return "\n".join([*made, ""])


def dora(f: Figures, shape: str) -> str:
    time, memory = (f.share("dora_linear", DORA.format(shape), f"{what} overhead against peft") for what in ("time", "memory"))
    return f"{time} of PEFT's overhead in time and {memory} in memory at {shape}"


def parts(f: Figures) -> str:
    """Says what each part gains by itself, transformers' time over its own; "" where that was not measured."""
    whole = f.value(PATCH, PARTS, "both", HF, "time")
    if whole is None:
        return ""
    said = []
    for name, provider in (("packing", "packing alone"), ("DoRA", "DoRA alone"), ("the loss", "loss alone")):
        own = f.value(PATCH, PARTS, "both", provider, "time")
        said.append(f"{name} alone gains " + ("-" if None in (own, whole) else f.say(f"{whole / own:.2f} x")))
    gains = f"{', '.join(said)}, all together {f.speed((PATCH, PARTS, 'both'), HF)}"
    return f"\nOf a `small` step on images of half the size, by the medians, {gains}.\n"


def image_table(f: Figures) -> str:
    head = "| what | transformers, PIL | torchvision | idefics2_fast | with AVX2 | speed: PIL | torchvision |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for label, case in IMAGES:
        line = ("images", case, "forward")
        from_files = case == FILES_CASE
        torchvision = "-" if from_files else f.time(line, "hf torchvision")
        avx2 = "-" if from_files else f.time(line, "avx2")
        speed = "-" if from_files else f.speed(line, "hf torchvision")
        cells = [f.time(line, HF), torchvision, f.time(line), avx2, f.speed(line, HF), speed]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def simd(f: Figures) -> str:
    """The least and the most time of the resize over pillow-simd's."""
    cases = (case.replace("resample and pack", "resize alone") for _, case in IMAGES if "resample" in case)
    speeds = [f.value("images", case, "forward", ENGINE, "speed against pillow-simd") for case in cases if "640x480" not in case]
    ratios = sorted(1 / speed for speed in speeds if speed)
    return f"{f.say(f'{ratios[0]:.2f}')} to {f.say(f'{ratios[-1]:.2f}')}" if ratios else "-"


TEXT = """\
`tuned` is transformers at its best: images one by one, no padding, no masks. Medians; a row's providers take turns in one run, on {cpu},
rows of [results](benchmarks/results) written by `make bench`: {rows}. Both columns of speed are medians of
the rounds' ratios; a provider that takes over two seconds, and twice as long as the fastest, takes one turn. Sizes are mixed; fill is the
share of the padded batch that is image. A whole run takes `tiny`, and `small` for decoding and the trainer's step; the rest of `small` is
from `--model small`. On a CPU the encoder is bound by matrix products and SDPA that both sides share, so the gain over
the tuned column is what stands between them.{untimed}

{model}
{compiled}
Under the patch, fp32, the DoRA step on 4 documents with one mixed image each, rank 64 on every linear layer but the head:

{patched}
{parts}
The loss alone, 2048 tokens, 10% answers, 1024 x 32003:

{loss}

What one DoRA layer costs beyond the frozen layer, 1024 tokens, rank 64: {dora}.
{kernels}
A training step of this engine's own trainer: DoRA of rank 64 and NEFTune on 4 documents with 3 mixed images, several questions each, the
same samples, adapters and noise for all, losses within 1e-4; fp32:

{trained}

Of a LoRA step's time a DoRA step takes {lora}. On the demo's questions packs are filled to {tokens} of their tokens and {patches} of
their patches, the loader alone is {loader} as fast as the model, a step waits {wait} of its time for data, and the first loss is there
after {first}.

Images to normalised fp32 patches, bit-equal to transformers' PIL processor, one thread, with AVX-512 VNNI and, on the same CPU, with AVX2;
on a shared machine absolute times drift by half and more:

{images}

Two threads against one on the photograph: {threads}. The resize alone takes {simd} times what pillow-simd takes, whose weights have 16
bits: Pillow's have 22, which AVX2 multiplies in two parts and VNNI in three.
"""


def written(text: str, generated: str) -> str:
    """The README with what stands between its marks replaced.

    Raises:
        ValueError: the marks are not there.
    """
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise ValueError(f"the README has no marks {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + generated + END + after


def committed() -> list[Record]:
    return [record for name in FILES for record in read_records(RESULTS / name)]


def main() -> int:
    """Writes the README's figures, and says which are not in the results."""
    generated, figures = section(committed())
    README.write_text(written(README.read_text(), generated))
    for missing in dict.fromkeys(figures.missing):
        print(f"not measured: {missing}")
    return 0
