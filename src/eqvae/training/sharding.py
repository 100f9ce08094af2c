"""Weights that no single device holds: every process keeps a part of each, and of its gradient, moments and average.

PyTorch's FSDP2 gathers a block's weights when it is their turn, and sends each part of a gradient to who keeps it.
Whole tensors are put together one at a time, for files; so these do not depend on the number of processes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from eqvae.runtime.device import Precision
from eqvae.runtime.processes import Processes


def shard(network: nn.Module, processes: Processes, precision: Precision) -> None:
    """Share a network's weights out in place, each block by itself, whose gradients are then means over processes.

    Blocks travel in the precision in which they compute, gradients are summed in fp32.
    """
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    dtype = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for blocks in [module for module in network.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh)  # what is outside of blocks is small, and stays as it is


def whole(tensors: Mapping[str, Tensor], *, everywhere: bool = True) -> dict[str, Tensor]:
    """Put sharded tensors together, in all processes at once; the first process alone keeps them unless `everywhere`.

    Tensors that are not sharded are passed on.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            full = tensor.full_tensor()
            if everywhere or torch.distributed.get_rank() == 0:
                found[name] = full.cpu()
        else:
            found[name] = tensor
    return found


def whole_tensor(tensor: Tensor) -> Tensor:
    """Put a sharded tensor together; any other is passed on."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """Take this process's part of a whole tensor where another one is sharded."""
    if not isinstance(other, DTensor):
        return tensor
    placed = tensor.to(other.device)
    return distribute_tensor(placed, other.device_mesh, other.placements, src_data_rank=None)


def all_like(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take this process's parts where the tensors of the same names are sharded."""
    return {name: like(tensor, others[name]) if name in others else tensor for name, tensor in tensors.items()}
