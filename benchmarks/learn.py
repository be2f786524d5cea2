"""A small model learns to read from scratch, then to answer questions; its adapter gives the same answers within transformers."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

import idefics2_fast
from idefics2_fast import Idefics2, Processor
from idefics2_fast.adapter_files import load_adapters
from idefics2_fast.benchmarks.reading import NEW_TOKENS, Page, blanked, chats, examination, right, share_right, write_reader
from idefics2_fast.benchmarks.reading_corpus import TRAINED, WORDS, Lessons, Questions
from idefics2_fast.benchmarks.report import table
from idefics2_fast.training import Recipe, fit, instruct

FOLDER = Path("build/demo")
STEPS, TUNING_STEPS = 1100, 120
DOCUMENTS, TOKENS = 64, 22  # documents in a step, tokens in a document that asks to read a word of six letters
EXAMINED, COMPARED, SHOWN = 240, 24, 12
PASS, CHANCE = 0.7, 0.1  # the least share of held-out words that must be read, the greatest that may be where the image is blank


def main() -> int:
    """Returns 0; 1 where the model has not learned to read, reads what is not there, or transformers gives other answers."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    begin = time.perf_counter()
    write_reader(FOLDER / "untrained")
    print(_INTRODUCTION, flush=True)
    reads = _learn_to_read()
    same = _learn_to_answer()
    print(f"\nReports with curves and answers: {FOLDER}/reading/report.html, {FOLDER}/answering/report.html")
    print(f"Learning took {time.perf_counter() - begin:.0f} s.")
    return 0 if reads and same else 1


_INTRODUCTION = """
A model of this architecture with 1.2 million parameters, from random weights: it sees rendered words and captioned photographs, easy ones
first, and every weight is trained.
"""


def warm_up(base: Path, out: Path, steps: int, seed: int = 0, **changes: object) -> Recipe:
    """Every weight trained on `Lessons`, in their order."""
    settings = {
        "adapter": "full",
        "shuffle": False,
        "join": False,
        "steps": steps,
        "seed": seed,
        "packs": 1,
        "tokens": DOCUMENTS * TOKENS,
        "patches": 50 * DOCUMENTS,
        "split_share": 0.0,
        "upscale_share": 0.0,
        "neftune_alpha": 0.0,
        "learning_rate": 1.5e-3,
        "betas": (0.9, 0.98),
        "weight_decay": 0.02,
        "warmup": 60,
        "schedule": "cosine",
        "dtype": "float32",
        "checkpointing": "none",
        "workers": 1,
        "save_every": steps,
        "roll_back": False,
    }
    return instruct(base, "lessons", out, **settings | changes)


def lessons(steps: int, **settings: object) -> Lessons:
    """As many rows as `warm_up` goes through, and those that the packs still open hold at the end."""
    return Lessons(rows=(steps + 20) * DOCUMENTS, **settings)


def _learn_to_read() -> bool:
    begin = time.perf_counter()
    fitted = fit(warm_up(FOLDER / "untrained", FOLDER / "reading", STEPS), lessons(STEPS))
    seconds = time.perf_counter() - begin
    model, processor = Idefics2.from_pretrained(fitted.weights), Processor.from_pretrained(fitted.weights)
    chance = random.Random(0)
    texts = [chance.choice(WORDS) for _ in range(EXAMINED)]
    known, unknown = examination(texts, TRAINED), examination(texts)
    shares = [share_right(model, processor, pages) for pages in (known, unknown, blanked(unknown))]
    lines = [
        [f"{len(WORDS)} words, {EXAMINED} new drawings", "read letter for letter"],
        ["fonts, sizes, hues and places as trained", f"{shares[0]:.1%}"],
        ["others, none of them trained", f"{shares[1]:.1%}"],
        ["the same questions, blank images", f"{shares[2]:.1%}"],
    ]
    print(f"{STEPS} steps, {seconds:.0f} s, loss {fitted.loss:.3f}\n\n{table(lines)}\n", flush=True)
    if shares[1] < PASS or shares[2] > CHANCE:
        print(f"Expected {PASS:.0%} or more of what is held out, and {CHANCE:.0%} or less of blank images.")
        return False
    return True


def _learn_to_answer() -> bool:
    print("The same model, its weights frozen: DoRA adapters learn to answer four kinds of questions about an image.\n")
    base, begin = FOLDER / "reading" / "model", time.perf_counter()
    rows = Questions(rows=4000, held_out=SHOWN)
    fitted = fit(answering(base, FOLDER / "answering", TUNING_STEPS), rows)
    seconds = time.perf_counter() - begin
    model, processor = Idefics2.from_pretrained(base), Processor.from_pretrained(base)
    pages = question_pages(Questions(rows=100, held_out=100, seed=1))
    before = right(model, processor, pages)
    load_adapters(model, fitted.weights)
    after, blind = right(model, processor, pages), right(model, processor, blanked(pages))
    print(f"{TUNING_STEPS} steps, {seconds:.0f} s, loss {fitted.loss:.3f}\n\n{_by_question(pages, before, after, blind)}\n", flush=True)
    compared = pages[:COMPARED]
    ours = model.generate(processor.chat(chats(compared)), max_new_tokens=NEW_TOKENS).tokens
    same = ours == answers_of_transformers(base, fitted.weights, compared)
    verdict = "the same tokens" if same else "OTHER tokens"
    print(f"The adapter, loaded by PEFT onto transformers' model and patched: {verdict} for {len(compared)} held-out questions.")
    return same


def answering(base: Path, out: Path, steps: int) -> Recipe:
    """DoRA on `Questions`, as `instruct` has it, in the sizes of a small model."""
    return instruct(
        base,
        "questions",
        out,
        steps=steps,
        held_out=SHOWN,
        packs=1,
        tokens=1200,
        patches=3000,
        rank=16,
        split_share=0.0,
        upscale_share=0.0,
        dropout=0.0,
        learning_rate=5e-3,
        workers=1,
        warmup=15,
        dtype="float32",
        checkpointing="none",
        save_every=steps,
    )


def question_pages(rows: Questions) -> list[Page]:
    """Every question of the rows on a page of its own."""
    return [Page(row["images"][0], pair["user"], pair["assistant"]) for row in rows for pair in row["texts"]]


def _by_question(pages: Sequence[Page], *results: Sequence[bool]) -> str:
    """For each question the shares of right answers, and of the most frequent one: what guessing gives."""
    of_question = defaultdict(list)
    for page, *marks in zip(pages, *results, strict=True):
        of_question[page.question].append((page.answer, *marks))
    lines = [["held-out drawings", "before", "after", "blank image", "best guess"]]
    for question, rows in of_question.items():
        given, *columns = zip(*rows, strict=True)
        ((_, most),) = Counter(given).most_common(1)
        lines.append([question, *(f"{sum(marks) / len(rows):.0%}" for marks in columns), f"{most / len(rows):.0%}"])
    return table(lines)


def answers_of_transformers(base: Path, adapter: Path, pages: Sequence[Page]) -> list[list[int]]:
    """Tokens up to the first end, of transformers' own model with the adapter from PEFT, patched."""
    from peft import PeftModel
    from transformers import AutoProcessor, Idefics2ForConditionalGeneration

    processor = AutoProcessor.from_pretrained(base)
    model = PeftModel.from_pretrained(Idefics2ForConditionalGeneration.from_pretrained(base, dtype=torch.float32), adapter).eval()
    idefics2_fast.patch(model, processor)
    inputs = processor.apply_chat_template(
        chats(pages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[:, inputs["input_ids"].shape[1] :].tolist()
    ends = set(model.generation_config.eos_token_id)
    lengths = (next((index + 1 for index, token in enumerate(row) if token in ends), len(row)) for row in out)
    return [list(islice(row, length)) for row, length in zip(out, lengths, strict=True)]
