"""What only the native op on the CPU has: its registration, narrower instruction sets, memory, gradients at once."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

import triplet
from test_triplet import MININGS, NATIVE, batch
from triplet import DISTANCES, triplet_loss

pytestmark = pytest.mark.skipif(not NATIVE and os.environ.get("ONESHOT_NATIVE") != "1", reason="pure Python install")
CONTRACT = str(Path(__file__).with_name("test_triplet.py"))
NARROW = "native and (larger_batches or implementation_at_size or gradcheck or (oracle and float32))"


def test_opcheck():
    x, labels, others = batch(9, dtype=torch.float32, others=4)
    for mining, reduction in product((0, 1, 2), (0, 1, 2)):
        codes = (0, mining, False, 0.3, 1.0, reduction)
        far = (others[0].requires_grad_(), others[1])
        for tail in ((None, None), far):
            arguments = (x.requires_grad_(), labels, *tail, *codes)
            torch.library.opcheck(torch.ops.oneshot.triplet_forward.default, arguments)
            if reduction:
                plain = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments)
                torch.library.opcheck(torch.ops.oneshot.triplet_loss_and_gradient.default, plain)


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("mining", MININGS)
def test_gradients_at_once_are_those_of_the_backward_op(kind, mining):
    """Small batches take the one op, large ones the other two; both must say the same, also scaled."""
    x, labels, others = batch(40, width=24, dtype=torch.float32, others=9)
    settings = triplet.Settings(kind, mining, mining == "all", 0.3, 0.5, "mean")
    results = []
    for function in (triplet.Native, triplet.NativeAtOnce):
        leaves = [x.clone().requires_grad_(), others[0].clone().requires_grad_()]
        loss = function.apply(leaves[0], labels, leaves[1], others[1], triplet.codes_of(settings))
        results.append((loss.detach(), *torch.autograd.grad(loss * -3, leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_second_derivatives_are_refused():
    x, labels, _ = batch(12)
    (grad,) = torch.autograd.grad(triplet_loss(x.requires_grad_(), labels, impl="torch"), x, create_graph=True)
    assert grad.requires_grad
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(triplet_loss(x, labels, impl="native"), x, create_graph=True)


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
