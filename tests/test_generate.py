"""Generation against transformers' greedy search, and against its own contract: ragged, seeded, stoppable, streamed."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from support.hf import engine_of, sample, to_batch, to_hf

from idefics2_fast import Batch, Idefics2Config, Segments, ops
from idefics2_fast.benchmarks.local_checkpoint import random_model, write_processor
from idefics2_fast.cache import KVCache
from idefics2_fast.generate import _choose, decode_step, prefill

TINY = Idefics2Config.named("tiny")
NEW = 200


@pytest.fixture(scope="module")
def theirs():
    return random_model(TINY)


@pytest.fixture(scope="module")
def ours(theirs):
    return engine_of(theirs, TINY)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("processor")
    write_processor(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def prompts():
    """20 prompts: without images, with one, with two; of all lengths."""
    sizes = [[], [(378, 378)], [(378, 392), (392, 378)], []]
    return [sample(sizes[i % 4], TINY, text=1 + 3 * i, seed=i) for i in range(20)]


class Answers:
    """What transformers says to each prompt, asked when it is wanted."""

    def __init__(self, model, prompts):
        self.model, self.prompts = model, prompts

    @cache  # noqa: B019 the module's one object
    def __getitem__(self, index):
        prompt, settings = self.prompts[index], {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return self.model.generate(**to_hf([prompt]), **settings)[0, len(prompt.tokens) :].tolist()


@pytest.fixture(scope="module")
def expected(theirs, prompts):
    return Answers(theirs, prompts)


@pytest.mark.parametrize("chosen", [range(3), pytest.param(range(3, 20), marks=pytest.mark.slow)], ids=["three", "the others"])
def test_greedy_equals_transformers_alone(ours, prompts, expected, chosen):
    for i in chosen:
        assert ours.generate(to_batch([prompts[i]], TINY), max_new_tokens=NEW, stop_tokens=()).tokens == [expected[i]]


@pytest.mark.parametrize(
    "company",
    [[3, 0, 5, 2], *(pytest.param(company, marks=pytest.mark.slow) for company in (range(20), [19, 2, 5, 4, 8, 11]))],
    ids=["four", "all", "six"],
)
def test_greedy_equals_transformers_in_company(ours, prompts, expected, company):
    result = ours.generate(to_batch([prompts[i] for i in company], TINY), max_new_tokens=NEW, stop_tokens=())
    assert result.tokens == [expected[i] for i in company]
    assert result.finish == ["length"] * len(company)


def test_decode_continues_what_prefill_began(ours, prompts):
    """Logits of every decode step are those of the whole text at once, through every decode attention."""
    prompt, other, window = prompts[2], prompts[4], 10
    whole = to_batch([prompt, other], TINY)
    config = Idefics2Config(TINY.vision, TINY.perceiver, type(TINY.text)(**{**vars(TINY.text), "sliding_window": window}))
    for text, model in ((TINY.text, ours), (config.text, engine_of(random_model(config), config))):
        with torch.no_grad():
            full = model(whole)
            for implementation in ("sdpa_ragged", "sdpa_static", "reference"):
                cut = len(prompt.tokens) - 4
                start = to_batch([type(prompt)(prompt.tokens[:cut], prompt.images), type(prompt)(other.tokens[:-4], [])], TINY)
                cache = KVCache(text, [len(prompt.tokens), len(other.tokens)], dtype=torch.float32, device="cpu")
                with ops.using(decode_attention=implementation):
                    logits = [prefill(model, start, cache)]
                    for step in range(-4, -1):
                        tokens = torch.tensor([prompt.tokens[step], other.tokens[step]])
                        logits.append(decode_step(model, cache, tokens, torch.tensor([0, 1])))
                ends = torch.tensor([whole.documents.bounds[1], whole.documents.bounds[2]])
                for back, row in zip(range(5, 1, -1), logits, strict=True):
                    torch.testing.assert_close(row, full[ends - back], rtol=0, atol=1e-5 * full.abs().max().item())


def test_unused_rows_of_the_cache_are_finite():
    with pytest.MonkeyPatch.context() as patch:  # memory as it comes may hold anything
        patch.setattr(torch, "empty", lambda *shape, **kind: torch.full(*shape, float("nan"), **kind))
        cache = KVCache(TINY.text, [5, 7], dtype=torch.float32, device="cpu")
    assert cache.k.isfinite().all()
    assert cache.v.isfinite().all()


def test_a_finished_sequence_leaves_the_others_alone(ours, prompts, expected):
    """Each stops at a token of its own; the rest go on as if alone."""
    stops = {expected[0][9], expected[1][30]}
    result = ours.generate(to_batch(prompts[:3], TINY), max_new_tokens=60, stop_tokens=tuple(stops))
    for tokens, whole, finish in zip(result.tokens, expected, result.finish, strict=False):
        end = next((i for i, t in enumerate(whole[:60]) if t in stops), None)
        assert tokens == (whole[: end + 1] if end is not None else whole[:60])
        assert finish == ("stop" if end is not None else "length")


def test_the_same_bits_on_every_run(ours, prompts):
    settings = {"max_new_tokens": 30, "temperature": 1.0, "top_p": 0.9, "seed": 5, "stop_tokens": ()}
    first = ours.generate(to_batch(prompts[:4], TINY), **settings).tokens
    assert first == ours.generate(to_batch(prompts[:4], TINY), **settings).tokens
    assert first != ours.generate(to_batch(prompts[:4], TINY), **{**settings, "seed": 6}).tokens


def test_samples_do_not_depend_on_company(ours, prompts):
    settings = {"max_new_tokens": 20, "temperature": 1.0, "stop_tokens": ()}
    together = ours.generate(to_batch(prompts[:3], TINY), seed=[7, 8, 9], **settings).tokens
    alone = [ours.generate(to_batch([p], TINY), seed=[s], **settings).tokens[0] for p, s in zip(prompts[:3], (7, 8, 9), strict=True)]
    assert together == alone


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.3)])
def test_draws_follow_the_distribution_of_transformers_warpers(temperature, top_p):
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    logits, draws = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2, 20_000
    warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits))
    exact = warped.softmax(-1)[0]
    generator = torch.Generator().manual_seed(1)
    counts = torch.bincount(_choose(logits.expand(draws, -1), [generator] * draws, temperature, top_p), minlength=12)
    assert (counts[exact == 0] == 0).all()
    # five standard deviations of each binomial count
    assert ((counts / draws - exact).abs() <= 5 * (exact * (1 - exact) / draws).sqrt() + 1e-12).all()


def test_bad_words_are_never_completed(ours, prompts, expected):
    single, (first, second) = expected[0][4], expected[0][7:9]
    result = ours.generate(to_batch(prompts[:1], TINY), max_new_tokens=60, stop_tokens=(), bad_words=[[single], [first, second]])
    tokens = result.tokens[0]
    assert tokens[:4] == expected[0][:4]
    assert single not in tokens
    assert (first, second) not in itertools.pairwise(tokens)


def test_bad_words_equal_transformers(theirs, ours, prompts, expected):
    words = [[expected[0][4]], expected[0][7:9], [prompts[0].tokens[-1], expected[0][0]]]
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    reference = theirs.generate(**to_hf(prompts[:1]), bad_words_ids=words, **settings)[0, len(prompts[0].tokens) :].tolist()
    assert ours.generate(to_batch(prompts[:1], TINY), max_new_tokens=40, stop_tokens=(), bad_words=words).tokens[0] == reference


def with_tokenizer(batch: Batch, tokenizer) -> Batch:
    return Batch(**{**vars(batch), "tokenizer": tokenizer})


def test_streamed_text_is_the_text(ours, prompts, tokenizer, expected):
    pieces: dict[int, list] = {0: [], 1: [], 2: []}
    batch = with_tokenizer(to_batch(prompts[:3], TINY), tokenizer)
    result = ours.generate(batch, max_new_tokens=80, stop_tokens=(), on_token=lambda i, token, text: pieces[i].append((token, text)))
    for index in range(3):
        assert [token for token, _ in pieces[index]] == result.tokens[index] == expected[index][:80]
        whole = tokenizer.decode(result.tokens[index], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(text for _, text in pieces[index]) == result.texts[index] == whole


def test_a_character_of_several_tokens_is_streamed_whole(tokenizer):
    from idefics2_fast.generate import _Text

    text = _Text(tokenizer, [])
    ids = tokenizer.encode("naïve 🦊 fox 漢字", add_special_tokens=False)
    pieces = [text.extend(token, last=i == len(ids) - 1) for i, token in enumerate(ids)]
    assert "".join(pieces) == "naïve 🦊 fox 漢字"
    assert not any("\ufffd" in piece for piece in pieces)
    assert any(piece == "" for piece in pieces)  # some byte had to wait


def test_a_stop_string_ends_the_text_before_it(ours, prompts, tokenizer):
    batch = with_tokenizer(to_batch(prompts[:2], TINY), tokenizer)
    free = ours.generate(batch, max_new_tokens=60, stop_tokens=())
    stop = free.texts[0][50:58]  # crosses tokens
    streamed: list[str] = []
    result = ours.generate(
        batch,
        max_new_tokens=60,
        stop_tokens=(),
        stop_strings=[stop],
        on_token=lambda i, token, text: streamed.append(text if i == 0 else ""),
    )
    assert result.texts[0] == free.texts[0][: free.texts[0].index(stop)] == "".join(streamed)
    assert result.finish[0] == "stop"
    assert len(result.tokens[0]) < 60
    assert result.tokens[1] == free.tokens[1] or stop in free.texts[1]


def test_a_stop_string_that_is_a_special_token_counts_as_it(ours, prompts, tokenizer):
    batch = with_tokenizer(to_batch(prompts[:1], TINY), tokenizer)
    only = [[t] for t in range(TINY.text.vocab_size) if t != 32002]
    result = ours.generate(batch, max_new_tokens=5, stop_tokens=(), stop_strings=["<end_of_utterance>"], bad_words=only)
    assert (result.tokens, result.texts, result.finish) == ([[32002]], [""], ["stop"])


def test_end_tokens_of_the_checkpoint_stop(ours, prompts):
    only = [[t] for t in range(TINY.text.vocab_size) if t != 2]
    assert ours.generate(to_batch(prompts[:1], TINY), max_new_tokens=5, bad_words=only).tokens == [[2]]


def test_the_last_position_ends_the_text():
    config = Idefics2Config(TINY.vision, TINY.perceiver, type(TINY.text)(**{**vars(TINY.text), "max_position_embeddings": 20}))
    model = engine_of(random_model(config), config)
    result = model.generate(to_batch([sample([], config, text=13), sample([], config, text=4)], config), max_new_tokens=10, stop_tokens=())
    assert [len(tokens) for tokens in result.tokens] == [6, 10]
    with pytest.raises(ValueError, match="document 1 has 20 tokens: expected fewer than the model's 20 positions"):
        model.generate(to_batch([sample([], config, text=4), sample([], config, text=19)], config))


def test_the_decode_step_can_be_captured(ours, prompts):
    """One graph, no wait for the device: what a CUDA graph needs. fullgraph refuses both a break and a read of a value."""
    batch = to_batch(prompts[:2], TINY)
    with torch.no_grad(), ops.using(decode_attention="sdpa_static"):
        cache = KVCache(TINY.text, [len(p.tokens) + 8 for p in prompts[:2]], dtype=torch.float32, device="cpu")
        tokens, sequences = prefill(ours, batch, cache).argmax(-1), torch.tensor([0, 1])
        before = cache.lengths.clone()
        eager = [decode_step(ours, cache, tokens, sequences) for _ in range(3)]
        cache.lengths.copy_(before)
        step = torch.compile(decode_step, backend="eager", fullgraph=True, dynamic=False)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for logits in eager:
                torch.testing.assert_close(step(ours, cache, tokens, sequences), logits)


def test_a_full_sequence_rides_along_without_harm(ours, prompts, expected):
    """On a GPU finished sequences stay in the captured step: they must not write into their neighbours' rows."""
    pair = prompts[:2]
    with torch.no_grad():
        cache = KVCache(TINY.text, [len(pair[0].tokens) + 1, len(pair[1].tokens) + 30], dtype=torch.float32, device="cpu")
        tokens = prefill(ours, to_batch(pair, TINY), cache).argmax(-1)
        produced = []
        for _ in range(20):
            produced.append(tokens[1].item())
            tokens = decode_step(ours, cache, tokens, torch.tensor([0, 1])).argmax(-1)
    assert produced == expected[1][:20]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected 1 or more"),
        ({"temperature": -1.0}, "temperature is -1.0, expected 0"),
        ({"top_p": 0.0}, "top_p is 0.0, expected more than 0"),
        ({"stop_strings": ["x"]}, "need a tokenizer"),
        ({"bad_words": ["x"]}, "need a tokenizer"),
        ({"bad_words": [[]]}, "has no tokens"),
        ({"bad_words": [[40000]]}, r"\[40000\] holds ids outside the vocabulary of 32003"),
        ({"seed": [1, 2]}, "seed holds 2 numbers, expected one for each of the 1 documents"),
        ({"seed": [2**64]}, "seed holds 18446744073709551616, expected an integer from"),
        ({"seed": 1.5}, "seed is 1.5, expected an integer, or one for each document"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5, expected an integer"),
        ({"max_new_tokens": True}, "max_new_tokens is True, expected an integer"),
        ({"temperature": "1"}, "temperature is '1', expected a number"),
        ({"stop_tokens": 2}, "stop_tokens is 2, expected a list of token ids"),
        ({"stop_tokens": [2, -1]}, "stop_tokens holds -1, expected ids of the vocabulary of 32003"),
        ({"stop_strings": [5]}, r"stop_strings is \[5\], expected a list of texts"),
        ({"bad_words": "word"}, "bad_words is 'word', expected a list of texts and lists of token ids"),
        ({"bad_words": [1]}, r"bad_words is \[1\], expected a list of texts and lists of token ids"),
        ({"bad_words": iter(["word"])}, "bad_words is .*iterator.*, expected a list"),
        ({"generation_config": [1]}, r"generation_config is \[1\], expected an object"),
    ],
)
def test_wrong_settings_are_named(ours, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        ours.generate(to_batch(prompts[:1], TINY), **settings)


def test_empty_batches_are_named(ours):
    with pytest.raises(ValueError, match="the batch has no documents"):
        ours.generate(Batch.from_documents([]))
    with pytest.raises(ValueError, match="document 1 is empty"):
        ours.generate(Batch.from_documents([[1, 5], []]))


def test_an_interrupt_leaves_what_was_streamed(ours, prompts):
    """Whoever streams keeps every token made before an exception."""
    made: list[int] = []

    def stop_after_five(index: int, token: int, text: str) -> None:
        made.append(token)
        if len(made) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ours.generate(to_batch(prompts[:1], TINY), max_new_tokens=50, stop_tokens=(), on_token=stop_after_five)
    assert len(made) == 5


def test_segments_refuse_what_falls():
    with pytest.raises(ValueError, match="must not be negative"):
        Segments.of_lengths([3, -1])
    with pytest.raises(ValueError, match="rising list that starts with 0"):
        Segments.of_offsets([0, 4, 2])
