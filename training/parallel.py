"""Ranks: the process group, and the model's weights sharded over it (FSDP2)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from idefics2_fast import Idefics2

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all ranks, in fp64. A collective."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def on_first(self, work: Callable[[], T]) -> T:
        """The result of `work` on the first rank, which alone does it; a ValueError or OSError of it is raised on all. A collective."""
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = work()
            except (ValueError, OSError) as error:
                outcome[1] = error
        if self.world > 1:
            dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


@contextmanager
def ranks() -> Iterator[Ranks]:
    """The process group that torchrun describes in the environment, or this process alone; NCCL on GPUs, gloo on CPUs.

    Raises:
        ValueError: this process has a group already, that of another run for example.
    """
    if dist.is_initialized():
        raise ValueError("this process trains already, or has a process group of its own: expected one run at a time in a process")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def shard(model: Idefics2, ranks: Ranks, dtype: torch.dtype, ignored: set[nn.Parameter]) -> None:
    """Shards the weights over the ranks, layer by layer, in place; arithmetic in `dtype`, gradients reduced in fp32.

    Parameters in `ignored` stay whole, in their own dtype, and their gradients are the caller's to reduce: DoRA's magnitudes, which a
    cast to bf16 would rob of what they have learned.

    Embedding, norms and head form the root's group: the loss uses their weights outside their own forward. The connector is one group,
    because it folds the weights of its layers into one product.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*model.vision_model.layers, model.connector, *model.text_model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=ignored)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with whole tensors, on rank 0's CPU; empty elsewhere. A collective."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
