"""What only the native op on the CPU has: its registration, narrower instruction sets, memory, gradients at once."""

import contextlib
import os
import subprocess
import sys
import weakref
from itertools import product
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import triplet
from contract import MININGS, NATIVE, batch
from triplet import DISTANCES, triplet_loss

pytestmark = pytest.mark.skipif(not NATIVE and os.environ.get("ONESHOT_NATIVE") != "1", reason="pure Python install")
NARROW = "larger_batches or implementation_at_size or gradcheck or doubt or integers or close_rows or half_precision"
NARROW = f"native and ({NARROW} or non_finite or (oracle and float32))"


@pytest.mark.slow
def test_opcheck():
    x, labels, (far, far_labels) = batch(9, dtype=torch.float32, others=4)
    for mining, reduction, others in product((0, 1, 2), (0, 1, 2), (False, True)):
        codes = (0, mining, False, 0.3, 1.0, reduction)
        candidates = torch.cat((x, far)) if others else x
        names = torch.cat((labels, far_labels)) if others else labels
        for gradient_rows in {9, len(candidates)}:
            arguments = (candidates.requires_grad_(), names, 9, gradient_rows, *codes)
            opcheck = torch.library.opcheck
            if gradient_rows == len(candidates):  # without a gradient for some rows, autograd gives zeros for these
                opcheck(torch.ops.oneshot.triplet_forward.default, arguments)
            if reduction:
                plain = (candidates.detach(), *arguments[1:])
                opcheck(torch.ops.oneshot.triplet_loss_and_gradient.default, plain)


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("reduction", ("none", "mean"))
@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_is_computed_for_others_without_gradient(mining, reduction, compiled):
    """The op then returns the gradients of the anchors alone, and they are the same as with those of the others."""
    x, labels, (far, far_labels) = batch(20, dtype=torch.float32, others=9)
    shapes, found = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if "triplet_backward" in str(function) or "triplet_loss_and_gradient" in str(function):
                shapes.append(tuple((out if isinstance(out, torch.Tensor) else out[1]).shape))
            return out

    def watch_graph(graph, inputs):
        nodes = [node for node in graph.graph.nodes if "triplet_backward" in str(node.target)]
        shapes.extend(tuple(node.meta["val"].shape) for node in nodes)
        return make_boxed_func(graph)

    def loss(a, b):
        return triplet_loss(a, labels, mining=mining, reduction=reduction, others=(b, far_labels), impl="native").sum()

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=watch_graph)
    function = torch.compile(loss, backend=backend, fullgraph=True) if compiled else loss
    for needed in (False, True):
        leaf, other = x.clone().requires_grad_(), far.clone().requires_grad_(needed)
        with contextlib.nullcontext() if compiled else Watch():
            found.append(torch.autograd.grad(function(leaf, other), [leaf, other] if needed else [leaf]))
    assert shapes == [(20, 5), (29, 5)]
    assert torch.equal(found[0][0], found[1][0]) and found[1][1].abs().sum() > 0


def test_wrong_arguments_of_the_op_itself_are_refused():
    x, labels, _ = batch(9, dtype=torch.float32)
    codes = (0, 0, False, 0.3, 1.0, 1)
    op = torch.ops.oneshot
    loss, count, positive, negative = op.triplet_forward(x, labels, 9, 9, *codes)
    good = {"grad": torch.ones(()), "count": count, "positive": positive, "negative": negative}
    for changes, anchors, rows, message in (
        ({}, 10, 10, r"anchors must be in 1..9, got 10"),
        ({}, 9, 8, r"gradient_rows must be in 9..9, got 8"),
        ({}, 9, 10, r"gradient_rows must be in 9..9, got 10"),
        ({"positive": positive[:5]}, 9, 9, r"positive must be \(9,\), got 1 dimensions and 5 values"),
        ({"negative": negative.int()}, 9, 9, "negative must be int64"),
        ({"count": count.double()}, 9, 9, "count must be one int64"),
        ({"grad": torch.ones(9)}, 9, 9, "the gradient must have the shape and type of the loss"),
        ({"positive": positive + 9}, 9, 9, r"mined rows must be in -1..8"),
        ({"negative": negative + 9}, 9, 9, r"mined rows must be in -1..8"),
        ({"negative": torch.full_like(negative, -1)}, 9, 9, r"mined rows must be in -1..8"),
    ):
        given = good | changes
        with pytest.raises((ValueError, RuntimeError), match=message):
            mined = given["count"], given["positive"], given["negative"]
            op.triplet_backward(given["grad"], x, labels, *mined, anchors, rows, *codes)
    with pytest.raises((ValueError, RuntimeError), match="candidates must be contiguous"):
        op.triplet_forward(x.T.contiguous().T, labels, 9, 9, *codes)


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("mining", MININGS)
def test_gradients_at_once_are_those_of_the_backward_op(kind, mining):
    """Small batches take the one op, large ones the other two; both must say the same, also scaled."""
    x, labels, others = batch(40, width=24, dtype=torch.float32, others=9)
    settings = triplet.Settings(kind, mining, mining == "all", 0.3, 0.5, "mean")
    results = []
    for at_once in (False, True):
        leaves = [x.clone().requires_grad_(), others[0].clone().requires_grad_()]
        loss = triplet.Native.apply(leaves[0], leaves[1], labels, others[1], triplet.codes_of(settings), at_once)
        results.append((loss.detach(), *torch.autograd.grad(loss * -3, leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mining", ["hard", "all"])
def test_a_loss_that_is_kept_holds_no_gradient(mining):
    """After the backward pass, as in a list of losses to be logged; a second one needs retain_graph."""
    x, labels, _ = batch(40)
    loss = triplet_loss(x.requires_grad_(), labels, mining=mining, impl="native")
    loss.backward(retain_graph=True)
    (held,) = loss.grad_fn.saved_tensors
    held = weakref.ref(held)
    loss.backward()
    assert held() is None
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["none", "mean"])  # two autograd functions
def test_second_derivatives_are_refused(reduction):
    x, labels, _ = batch(12)
    losses = triplet_loss(x.requires_grad_(), labels, reduction=reduction, impl="torch")
    (grad,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
    assert grad.requires_grad
    losses = triplet_loss(x, labels, reduction=reduction, impl="native")
    with pytest.raises(RuntimeError, match="differentiated only once"):
        torch.autograd.grad(losses.sum(), x, create_graph=True)


def test_transforms_and_forward_gradients_fall_back_or_are_refused():
    """The op knows neither: impl "auto" takes plain PyTorch, "native" raises instead of giving 0."""
    x, labels, _ = batch(12)
    tangent = torch.randn_like(x)

    def loss(impl):
        return lambda x: triplet_loss(x, labels, impl=impl)

    def dual(impl):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            return torch.autograd.forward_ad.unpack_dual(triplet_loss(dual, labels, impl=impl)).tangent

    (expected,) = torch.autograd.grad(loss("torch")(leaf := x.clone().requires_grad_()), leaf)
    slope = (expected * tangent).sum()
    assert torch.allclose(torch.func.grad(loss("auto"))(x), expected)
    assert torch.allclose(torch.func.jvp(loss("auto"), (x,), (tangent,))[1], slope) and slope.abs() > 1e-3
    assert torch.allclose(dual("auto"), slope)
    assert torch.allclose(torch.func.vmap(loss("auto"))(torch.stack((x, x))), loss("torch")(x))
    for refused in (
        lambda: torch.func.grad(loss("native"))(x),
        lambda: torch.func.jvp(loss("native"), (x,), (tangent,)),
        lambda: torch.func.vmap(loss("native"))(torch.stack((x, x))),
        lambda: dual("native"),
    ):
        with pytest.raises(RuntimeError, match="use impl='torch'"):
            refused()


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_narrower_instruction_sets(isa):
    """The kernels for other processors, in a process that is told to take them."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name("test_triplet.py")),
        "-k",
        NARROW,
    ]
    environment = os.environ | {"ONESHOT_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="there is one set only")
def test_narrower_instruction_sets_are_taken():
    """They add in another order: the last digits tell."""
    code = (
        "import torch; from triplet import triplet_loss; x = torch.randn(64, 37, generator=torch.manual_seed(0))\n"
        "print(triplet_loss(x, torch.arange(64) // 4, reduction='none', impl='native').double().sum().item().hex())"
    )
    run, folder = [sys.executable, "-c", code], os.path.dirname(triplet.__file__)
    sets = [os.environ | {"ONESHOT_ISA": isa} for isa in ("avx2", "portable")]
    assert len({subprocess.check_output(run, env=environment, cwd=folder) for environment in sets}) == 2


@pytest.mark.slow
def test_no_square_matrix_is_held():
    """Peak memory of forward and backward at B = 20000 grows by far less than the (B, B) matrix's 1.6 GB."""
    code = (
        "import resource, torch; from triplet import triplet_loss\n"
        "def run(n):\n"
        "    x = torch.randn(n, 16, requires_grad=True)\n"
        "    triplet_loss(x, torch.arange(n) % (n // 4), impl='native').backward()\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = run(64); print(run(20000) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=os.path.dirname(triplet.__file__)
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64  # MB


def test_native_must_be_there_when_asked_for():
    """With ONESHOT_NATIVE=1, a missing native op is a failure, not a skip."""
    if os.environ.get("ONESHOT_NATIVE") == "1":
        assert triplet.native_library() == ""
        assert triplet.use_native("cpu", "native") and triplet.use_native("cpu", "auto")
