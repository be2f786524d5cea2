"""What a call chooses and derives is the call's: adapters and norms beside other calls, threads and training."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from support.hf import sample, to_batch
from torch.utils.checkpoint import checkpoint

from idefics2_fast import Batch, Idefics2, Idefics2Config
from idefics2_fast.adapters import adapted, attach_adapters, use_adapter

CONFIG = Idefics2Config.named("tiny")


def carrying(*names: str | None) -> Idefics2:
    torch.manual_seed(0)
    model = Idefics2(CONFIG).eval()
    for seed, name in enumerate(names):
        attach_adapters(model, name=name, rank=2, alpha=6, dora=name != "de", targets=("vision", "connector", "text", "head"))
        draw = torch.Generator().manual_seed(seed)
        for place, layer in adapted(model).items():
            if name is None or place.endswith(f".{name}"):
                layer.b.data.normal_(std=0.1, generator=draw)
    return model


@pytest.fixture(scope="module")
def model() -> Idefics2:
    return carrying("fr", "de").requires_grad_(False)


def batch(*names: str | None, picture: bool = False) -> Batch:
    samples = [sample([(56, 42 + 14 * index)] if picture else [], CONFIG, text=4 + index, seed=index) for index, _ in enumerate(names)]
    return replace(to_batch(samples, CONFIG), adapters=names)


ASKED = [batch("fr"), batch("de"), batch(None), batch("de", "fr"), batch("fr", None, "de"), batch("de", "fr", picture=True)]


def forwards(model: Idefics2, asked: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(asked)


def generates(model: Idefics2, asked: Batch) -> torch.Tensor:
    return torch.tensor(model.generate(asked, max_new_tokens=3, stop_tokens=[]).tokens)


@pytest.mark.parametrize("calls", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_named_adapters_in_threads(calls, model):
    """8 threads, each with adapters of its own: every answer is that of the call alone."""
    work = [(call, asked) for call in (forwards, generates) for asked in ASKED]
    alone = [call(model, asked) for call, asked in work]
    together = threading.Barrier(8)

    def serve(thread: int) -> int:
        together.wait(timeout=60)
        right = 0
        for number in range(calls):
            index = (5 * thread + 7 * number) % len(work)
            call, asked = work[index]
            use_adapter(model, ("fr", "de", None)[number % 3])
            right += torch.allclose(call(model, asked).double(), alone[index].double(), rtol=0, atol=1e-4)
        return right

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(serve, range(8))) == 8 * calls


def test_named_adapters_within_another_call(model):
    """Calls in the middle of one, which choose others, and `use_adapter`, which is for the next."""
    use_adapter(model, "fr")
    said, unsaid = batch("fr"), replace(batch("fr"), adapters=())
    for asked, meant in ((batch("fr", None), batch("fr", None)), (unsaid, said)):
        expected = generates(model, meant)

        def disturb(*_: object) -> None:
            forwards(model, batch("de", "fr", "de"))
            use_adapter(model, "de")

        tokens = model.generate(asked, max_new_tokens=3, stop_tokens=[], on_token=disturb).tokens
        assert torch.equal(torch.tensor(tokens), expected)
        use_adapter(model, "fr")


def test_attach_adapters_beside_generate():
    """A server takes adapters while it answers: no answer fails or changes."""
    model, asked = carrying("fr"), batch("fr")
    expected, done = generates(model, asked), threading.Event()

    def serve() -> int:
        answers = 0
        while not done.is_set() or not answers:
            assert torch.equal(generates(model, asked), expected)
            answers += 1
        return answers

    with ThreadPoolExecutor(2) as threads:
        served = [threads.submit(serve) for _ in range(2)]
        try:
            for seed in range(6):
                attach_adapters(model, name=f"new {seed}", rank=1, targets=("text",))
        finally:
            done.set()
        assert all(answers.result(timeout=60) for answers in served)


def test_attach_adapters_of_one_name_in_threads():
    model = carrying("fr")

    def attach(seed: int) -> bool:
        try:
            attach_adapters(model, name="de", rank=1, targets=("vision", "text"), seed=seed)
        except ValueError:
            return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(attach, range(4))) == 1
    assert model.choice.names == ["fr", "de"]


def test_norms_after_concurrent_generate():
    """Two calls that overlap, the first ends first, then a step of training: the norms are those of the new weights."""
    model, asked = carrying(None), replace(batch(None), adapters=())
    ended, begun = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        begun.set()
        ended.wait(timeout=60)

    with ThreadPoolExecutor(1) as threads:
        others = []

        def begin(*_: object) -> None:
            others.append(threads.submit(model.generate, asked, max_new_tokens=2, stop_tokens=[], on_token=wait))
            begun.wait(timeout=60)

        model.generate(asked, max_new_tokens=1, stop_tokens=[], on_token=begin)
        ended.set()
        others[0].result(timeout=60)
    with torch.no_grad():
        for layer in adapted(model).values():
            layer.b.add_(0.5)
    fresh = carrying(None)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(forwards(model, asked), forwards(fresh, asked))


def gradients(model: Idefics2, elsewhere: bool) -> list[torch.Tensor]:
    """Of a batch's logits, after another batch has gone through the model."""
    model.zero_grad()
    first, other = model(batch("fr", "de", picture=True)), model(batch("de", "de", None))
    if elsewhere:
        thread = threading.Thread(target=first.sin().sum().backward)
        thread.start()
        thread.join()
    else:
        first.sin().sum().backward()
    assert other.shape[0]
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_named_adapters_recomputed():
    """Activations made again in the backward pass, in another thread too, take the adapters of their own batch."""
    model = carrying("fr", "de")
    for layer in adapted(model).values():
        layer.a.requires_grad_(True)
    expected = gradients(model, False)
    for layer in (*model.text_model.layers, *model.vision_model.layers):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    for elsewhere in (False, True):
        ours = gradients(model, elsewhere)
        assert len(ours) == len(expected) > 20
        assert all(torch.allclose(mine, theirs, rtol=0, atol=1e-5) for mine, theirs in zip(ours, expected, strict=True))
