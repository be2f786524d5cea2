"""Norms that are kept between passes: never after a change, in any of the ways that weights change."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from idefics2_fast import ops, row_norm
from idefics2_fast.row_norm import OptimizerSteps, RowNorm, expire


@pytest.fixture
def computed(monkeypatch):
    """What was computed: "norm" and "square", in order."""
    made = []
    norm, square = ops.dora_norm, ops.dora_square
    monkeypatch.setattr(ops, "dora_norm", lambda *args: made.append("norm") or norm(*args))
    monkeypatch.setattr(ops, "dora_square", lambda *args: made.append("square") or square(*args))
    return made


@pytest.fixture
def counted():
    steps = OptimizerSteps()
    yield steps
    steps.remove()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.a, self.b = (nn.Parameter(torch.randn(*shape)) for shape in ((6, 5), (2, 5), (6, 2)))
        self.w.requires_grad_(False)
        self.scaling, self.norm = 0.5, RowNorm()

    def forward(self) -> torch.Tensor:
        return self.norm(self.w, self.a, self.b, self.scaling, self.training)

    def expected(self) -> torch.Tensor:
        return torch.linalg.vector_norm(self.w + self.scaling * self.b @ self.a, dim=1).detach()

    def assert_right(self) -> None:
        torch.testing.assert_close(self(), self.expected())


class ThroughData(torch.optim.Optimizer):
    """Writes as some optimizers do, so that no tensor's version changes."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {})

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(0.1)


def in_place(layer):
    with torch.no_grad():
        layer.b.mul_(2)


def new_data(layer):
    layer.a.data = layer.a.data + 1


def new_parameter(layer):
    layer.b = nn.Parameter(layer.b.detach() + 1)


def scaled(layer):
    layer.scaling = 0.25


def evaluated(layer):
    layer.a.data.add_(1)
    layer.eval()


def expired(layer):
    layer.a.data.add_(1)
    expire()


CHANGES = {
    "an optimizer": lambda layer: torch.optim.SGD([layer.a, layer.b], lr=0.1).step(),
    "an optimizer that writes through .data": lambda layer: ThroughData([layer.a, layer.b]).step(),
    "in place": in_place,
    "initialised": lambda layer: nn.init.normal_(layer.b),
    "loaded": lambda layer: layer.load_state_dict(Layer().state_dict()),
    "loaded by assignment": lambda layer: layer.load_state_dict(Layer().state_dict(), assign=True),
    "new .data": new_data,
    "a new parameter": new_parameter,
    "the base weight, in place": lambda layer: nn.init.normal_(layer.w),
    "scaling": scaled,
    ".data, then evaluation": evaluated,
    ".data, then expire": expired,
    "another dtype": lambda layer: layer.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(counted, computed, change):
    layer = Layer()
    layer.a.grad, layer.b.grad = torch.ones_like(layer.a), torch.ones_like(layer.b)
    first = layer()
    assert layer() is first
    CHANGES[change](layer)
    layer.assert_right()
    assert not torch.equal(layer(), first)
    assert computed.count("norm") == 2


def test_a_change_while_it_is_computed_is_seen(counted, monkeypatch):
    """Another thread's optimizer, between the norm and its being kept."""
    layer, norm = Layer(), ops.dora_norm

    def overtaken(*args):
        made = norm(*args)
        in_place(layer)
        return made

    monkeypatch.setattr(ops, "dora_norm", overtaken)
    layer()
    monkeypatch.setattr(ops, "dora_norm", norm)
    layer.assert_right()


def test_a_frozen_weights_part_is_kept_over_steps(counted, computed):
    layer = Layer()
    layer()
    expire()
    layer()
    assert computed == ["square", "norm", "norm"]


def test_a_trained_weights_part_is_not(counted):
    layer = Layer()
    layer.w.requires_grad_(True)
    layer()
    ThroughData([layer.w]).step()
    layer.assert_right()


def test_nothing_is_kept_where_nobody_counts(computed, monkeypatch):
    monkeypatch.setattr(OptimizerSteps, "counters", 0)  # models of other tests may be patched still
    monkeypatch.setattr(OptimizerSteps, "hook", None)
    layer = Layer()
    layer()
    layer()
    steps, others = OptimizerSteps(), OptimizerSteps()
    layer()
    layer()
    steps.remove()
    steps.remove()
    layer()
    assert computed.count("norm") == 3
    others.remove()
    layer.a.data.add_(1)
    layer.assert_right()
    assert computed.count("norm") == 4


def test_steps_between_two_counts_are_seen():
    layer = Layer()
    for _ in range(2):
        steps = OptimizerSteps()
        layer.assert_right()
        steps.remove()
        ThroughData([layer.a]).step()


def test_removing_leaves_no_hook(monkeypatch):
    """All who count share one."""
    monkeypatch.setattr(OptimizerSteps, "counters", 0)
    monkeypatch.setattr(OptimizerSteps, "hook", None)
    before = dict(_global_optimizer_post_hooks)
    steps = [OptimizerSteps(), OptimizerSteps()]
    assert len(_global_optimizer_post_hooks) == len(before) + 1
    steps[0].remove()
    assert len(_global_optimizer_post_hooks) == len(before) + 1
    steps[1].remove()
    assert dict(_global_optimizer_post_hooks) == before


def test_layers_do_not_share(counted):
    layers = [Layer(), Layer()]
    for layer in layers * 2:
        layer.assert_right()
    in_place(layers[0])
    for layer in layers:
        layer.assert_right()


def test_a_step_within_the_backward_pass_changes_nothing_that_it_recomputes(counted):
    layer, other = Layer(), Layer()
    first = layer()
    ThroughData([other.a]).step()
    assert torch.equal(layer(), first)


def test_a_norm_of_inference_mode_serves_training_next(counted, computed):
    layer = Layer()
    with torch.inference_mode():
        layer()
    (layer() * layer.a.sum()).sum().backward()
    assert computed.count("norm") == 1


def test_weights_made_in_inference_mode_are_never_trusted(counted):
    with torch.inference_mode():
        layer = Layer()
        layer()
        layer.a.mul_(2)
        layer.assert_right()


def test_evaluation_among_processes_keeps_nothing(counted, computed, monkeypatch):
    monkeypatch.setattr(row_norm, "torch", SimpleNamespace(**vars(torch) | {"distributed": SimpleNamespace()}))
    row_norm.torch.distributed.is_available = row_norm.torch.distributed.is_initialized = lambda: True
    layer = Layer()
    assert layer() is layer()
    layer.eval()
    layer()
    layer.a.data.add_(1)
    layer.assert_right()


def test_copies_start_empty(counted):
    layer = Layer()
    layer()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.norm is not layer.norm
        twin.a.data.add_(1)
        for each in (twin, layer):
            each.assert_right()


def test_no_tensor_outlives_its_layer(counted):
    layer = Layer()
    norm, weight = layer.norm, weakref.ref(layer.w)
    layer()
    del layer
    gc.collect()
    assert weight() is None
    other = Layer()
    other.norm = norm
    other.assert_right()
