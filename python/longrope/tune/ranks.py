"""One training over several processes, under torchrun, by FSDP2 (`torch.distributed.fsdp.fully_shard`).

Each rank reads its part of a step's sequences and holds its part of the weights, their gradients and the optimizer's
state. A checkpoint has all of them, as one process would write it, and any number of ranks goes on from it.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .. import team
from .loss import CausalLoss

SHARDED = "is_distributed_loading_by_transformers"  # what the Trainer looks for


def join(place: int, count: int) -> None:
    """Make the ranks a group, once a process, of NCCL on GPUs and of Gloo on CPUs.

    By `team.meet`: where torchrun has started all anew, its own store may still have the addresses of those before.
    """
    if count > 1 and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if cuda else "gloo", store=team.meet(), rank=place, world_size=count)


def shard(trained: CausalLoss, device: torch.device) -> None:
    """Spread the weights over all ranks: a layer's are together for its forward and its backward alone.

    transformers' Trainer is told that the model is spread already, and leaves it as it is.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    trained.to(device)
    body = getattr(trained.model, trained.model.base_model_prefix)
    for layer in body.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(trained, mesh=mesh)
    setattr(trained, SHARDED, True)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, on every rank; those of the ranks' parts meet here."""
    tensor = tensor.detach()
    return (tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor).contiguous()


def like(full: Tensor, weight: Tensor) -> Tensor:
    """Return this rank's part of a tensor that all ranks hold, spread as `weight` is."""
    if isinstance(weight, DTensor) and full.shape == weight.shape:
        return distribute_tensor(full.to(weight.device), weight.device_mesh, weight.placements)
    return full


def agreed(value: int, device: torch.device) -> int:
    """Return rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    told = torch.tensor(value, device=device)
    dist.broadcast(told, 0)
    return int(told)


def meet() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has spread the model."""
    return bool(getattr(model, SHARDED, False))


def set_gradient_sync(model: Any, on: bool) -> None:
    """Have gradients summed over the ranks by the next backward, or kept until a later one."""
    model.set_requires_gradient_sync(on)
