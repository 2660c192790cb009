"""Several processes that train one network together, started by torchrun. In a single process nothing here acts.

    torchrun --nproc-per-node 4 train_classic.py                   # splits the classes of each batch
    torchrun --nproc-per-node 4 train_reptile.py --meta-batch 4    # splits the tasks of each meta-iteration

All processes hold the same weights and take the same steps: they start from the same seed, and each gets the gradient,
or the meta-step, of the whole batch. Batch norm normalises the images of each process separately. The first process
validates, logs and saves. Each process uses the GPU of its local rank, or the CPU.
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
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 to world() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def join(device: str) -> str:
    """Join the process group if torchrun started this process; return its device: for "auto" or "cuda" its own GPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return device
    on_gpu = torch.cuda.is_available() and device in ("auto", "cuda")
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    atexit.register(dist.destroy_process_group)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # one process prints
    if on_gpu:
        device = f"cuda:{local_rank()}"
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """The block runs in the first process of each machine and then in the others, which find its files."""
    if world() > 1 and local_rank() > 0:
        dist.barrier()
    yield
    if world() > 1 and local_rank() == 0:
        dist.barrier()


def share(whole: Tensor) -> Tensor:
    """This process's part of (N, ...): N / world() consecutive rows; N must be a multiple of world()."""
    return whole.unflatten(0, (world(), -1))[rank()]


def gather(own: Tensor) -> Tensor:
    """The rows (N, ...) of all processes, in order: (world() * N, ...).

    Gradients flow to this process's rows only. If all processes compute the same loss of the gathered rows, these rows
    get their whole gradient, and the weights' gradients, summed over processes, are those of the whole batch.
    """
    if world() == 1:
        return own
    parts = [torch.empty_like(own) for _ in range(world())]
    dist.all_gather(parts, own.detach().contiguous())
    parts[rank()] = own
    return torch.cat(parts)


def add(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the processes; all must have one data type."""
    if world() == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.detach().copy_(part.view_as(tensor))


def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over the processes; all must have one data type."""
    add(tensors)
    for tensor in tensors if world() > 1 else ():
        tensor.detach().div_(world())


def from_first(*values: float) -> list[float]:
    """The values of the first process."""
    if world() == 1:
        return list(values)
    said = torch.tensor(values, dtype=torch.float64)  # on the CPU: nothing waits for a GPU
    dist.broadcast(said, 0)
    return said.tolist()
