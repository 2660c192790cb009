"""The triplet op on a GPU, beyond what tests/test_triplet.py checks on every device: size, streams, graphs, devices."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import triplet
from contract import batch
from triplet import DISTANCES, MININGS, mine, triplet_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def on(device, made):
    x, labels, others = made
    return x.to(device), labels.to(device), tuple(t.to(device) for t in others) if others else None


def test_the_native_op_runs():
    for device in range(torch.cuda.device_count()):
        assert triplet.cuda_library(device) == "" and triplet.use_native(f"cuda:{device}", "native")


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_agrees_with_the_torch_implementation(kind, mining, dtype):
    """At a size that fills the device with large tiles; tensor cores take part for cosine on halves."""
    rows = 300 if mining == "all" else 3000
    x, labels, others = on("cuda", batch(rows, width=100, dtype=dtype, others=rows // 2))
    wide = (others[0].double().requires_grad_(), others[1])
    alike = torch.ones(rows, dtype=torch.bool, device="cuda")  # anchors whose mined rows do not depend on rounding
    if mining != "all":
        found = mine(x, labels, distance=kind, mining=mining, others=others, impl="native")
        exact = mine(x.double(), labels, distance=kind, mining=mining, others=wide, impl="torch")
        alike = (found.positive == exact.positive) & (found.negative == exact.negative)
        assert alike.double().mean() > (1 if dtype == torch.float64 else 0.99) - 1e-9
    close = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 3e-3}[dtype]

    def both(reduction):
        """Losses and gradients by the native op, and by plain PyTorch in float64."""
        for a, far, impl in ((x, others, "native"), (x.double(), wide, "torch")):
            leaf = a.detach().requires_grad_()
            loss = triplet_loss(leaf, labels, distance=kind, mining=mining, reduction=reduction, others=far, impl=impl)
            compared = loss if reduction == "mean" else loss[alike].mean()
            yield loss.double(), torch.autograd.grad(compared, leaf)[0].double()

    for reduction in ("none", "mean") if alike.all() else ("none",):
        (loss, grad), (exact, exact_grad) = both(reduction)
        assert torch.isclose(loss.mean(), exact.mean(), rtol=min(close, 1e-4))
        assert (grad - exact_grad).norm() <= 3 * close * exact_grad.norm()


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_triplets_on_tensor_cores(kind, dtype):
    """Against the op in float64, which takes no tensor cores; every tenth row is near another."""
    x, labels, _ = on("cuda", batch(2500, width=64, classes=300, dtype=dtype))
    x[::10] = x[1::10] + x[::10] * 0.01
    found = []
    for rows in (x, x.double()):
        leaf = rows.requires_grad_()
        loss = triplet_loss(leaf, labels, distance=kind, mining="all", impl="native")
        found += [loss.double(), torch.autograd.grad(loss, leaf)[0].double()]
    loss, grad, exact, exact_grad = found
    assert torch.isclose(loss, exact, rtol=1e-4)
    assert (grad - exact_grad).norm() <= (1e-2 if dtype == torch.bfloat16 else 3e-4) * exact_grad.norm()


def test_the_same_bits_on_every_run():
    x, labels, others = on("cuda", batch(5000, width=64, classes=300, dtype=torch.float32, others=3000))
    runs = []
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        triplet_loss(leaf, labels, others=others, impl="native").backward()
        runs.append(leaf.grad)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_the_current_stream_is_used():
    """The input is made on a side stream behind a long wait; the default stream would read it too early."""
    stream = torch.cuda.Stream()
    made, labels, _ = on("cuda", batch(2000, width=64, dtype=torch.float32))
    expected = triplet_loss(made, labels, impl="native")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        x = torch.zeros_like(made)
        torch.cuda._sleep(100_000_000)  # clock cycles
        x.copy_(made)
        loss = triplet_loss(x, labels, impl="native")
    stream.synchronize()
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("mining", MININGS)
def test_forward_and_backward_are_captured_in_a_graph(mining):
    x, labels, _ = on("cuda", batch(200, width=32, dtype=torch.float32))
    leaf = x.clone().requires_grad_()

    def step():
        loss = triplet_loss(leaf, labels, mining=mining, impl="native")
        return loss, torch.autograd.grad(loss, leaf)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # loads the library and warms the allocator
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    for got, fresh in zip(captured, step(), strict=True):
        assert torch.equal(got, fresh)


@pytest.mark.parametrize(("mining", "kernels", "tensors"), [("hard", 4, 3), ("semihard", 6, 3), ("all", 8, 5)])
def test_kernels_and_tensors_of_a_training_call(mining, kernels, tensors):
    x, labels, _ = on("cuda", batch(200, width=32, dtype=torch.float32))
    leaf, grad = x.requires_grad_(), torch.ones((), device="cuda")

    def step():
        torch.autograd.grad(triplet_loss(leaf, labels, mining=mining, impl="native"), leaf, grad)

    step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == tensors
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    ran = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(ran) == kernels, ran


def test_wrong_arguments_of_the_ops_for_training_are_refused():
    x, labels, _ = on("cuda", batch(9, dtype=torch.float32))
    op, codes, grad = torch.ops.oneshot, (0, 0, False, 0.3, 1.0, 1), torch.ones((), device="cuda")
    _, saved = op.triplet_forward_saving(x, labels, 9, 9, *codes)
    for upstream, kept, message in (
        (grad, saved[:-1], "saved must be what the forward pass"),
        (grad, saved.cpu(), "saved must be on the device of candidates"),
        (grad.cpu(), saved, "the gradient must be on the device of candidates"),
        (grad.repeat(9), saved, "the gradient must have the shape and type of the loss"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            op.triplet_backward_saved(upstream, x, labels, kept, 9, 9, *codes)


def test_kernels_that_have_not_run_are_captured_in_a_graph():
    code = (
        "import torch, triplet\n"
        "x = torch.randn(3000, 64, device='cuda', requires_grad=True)\n"
        "labels = torch.arange(3000, device='cuda') // 4\n"
        "triplet.cuda_library()\n"
        "step = lambda: torch.autograd.grad(triplet.triplet_loss(x, labels, impl='native'), x)[0]\n"
        "graph = torch.cuda.CUDAGraph()\n"
        "with torch.cuda.graph(graph):\n"
        "    captured = step()\n"
        "graph.replay()\n"
        "assert torch.equal(captured, step())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(triplet.__file__).parent
    )
    assert done.returncode == 0, done.stderr


def test_no_square_matrix_is_held():
    rows = 40_000  # (B, B) float32: 6.4 GB
    x = torch.randn(rows, 64, device="cuda", requires_grad=True)
    labels = torch.arange(rows, device="cuda") % (rows // 4)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    triplet_loss(x, labels, impl="native").backward()
    assert torch.cuda.max_memory_allocated() - before < 64 << 20


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second GPU")
def test_tensors_on_a_device_that_is_not_current():
    x, labels, _ = batch(300, dtype=torch.float32)
    rows = [mine(x.to(d), labels.to(d), impl="native") for d in ("cuda:0", "cuda:1")]
    assert torch.cuda.current_device() == 0 and rows[1].negative.device.index == 1
    assert torch.equal(rows[0].negative.cpu(), rows[1].negative.cpu())
