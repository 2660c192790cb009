"""Several processes that train one network together, started by torchrun. Alone, everything here does nothing.

    torchrun --nproc-per-node 4 train_classic.py                   # shares out the classes of each batch
    torchrun --nproc-per-node 4 train_reptile.py --meta-batch 4    # and the tasks of each meta-iteration

All processes hold the same weights and make the same steps: they start from the same seed, and each gets the gradient,
or the move of the weights, of the whole batch. Batch norm normalises each process's images by themselves. The first
process validates, logs and saves. A process uses the GPU of its number on its machine, or the CPU.
"""

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this one: 0 to world() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Its number on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def join(device: str) -> str:
    """Meet the other processes, if torchrun started this one; return its device, for "auto" or "cuda" its own GPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return device
    on_gpu = torch.cuda.is_available() and device in ("auto", "cuda")
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    atexit.register(dist.destroy_process_group)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # one of them speaks
    if on_gpu:
        device = f"cuda:{local_rank()}"
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def one_before_the_others() -> Iterator[None]:
    """The block runs in the first process of each machine, then in the others, which find its files there."""
    if world() > 1 and local_rank() > 0:
        dist.barrier()
    yield
    if world() > 1 and local_rank() == 0:
        dist.barrier()


def share(whole: Tensor) -> Tensor:
    """This process's part of (N, ...): N / world() consecutive rows, which must be a whole number."""
    return whole.unflatten(0, (world(), -1))[rank()]


def gather(own: Tensor) -> Tensor:
    """The rows (N, ...) of all processes, of as many each, in order: (world() * N, ...).

    Gradients flow to this process's rows alone. Where all compute the same loss of what is gathered, that is the whole
    gradient by these rows, and the sum over processes of the gradients of the weights is that of the whole batch.
    """
    if world() == 1:
        return own
    parts = [torch.empty_like(own) for _ in range(world())]
    dist.all_gather(parts, own.detach().contiguous())
    parts[rank()] = own
    return torch.cat(parts)


def add(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the processes; all of one data type."""
    if world() == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.detach().copy_(part.view_as(tensor))


def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over the processes; all of one data type."""
    add(tensors)
    for tensor in tensors if world() > 1 else ():
        tensor.detach().div_(world())


def from_first(*values: float) -> list[float]:
    """The values that the first process gives."""
    if world() == 1:
        return list(values)
    said = torch.tensor(values, dtype=torch.float64)  # on the CPU: nothing waits for a GPU
    dist.broadcast(said, 0)
    return said.tolist()
