"""Several processes, started as torchrun does, on the CPU: the step that one process takes, runs, resuming."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoints
import tiny
import train_classic
from tiny import CLASSIC, REPTILE, same

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent

STEP = """
import torch, distributed, train_reptile
from triplet import triplet_loss

assert distributed.join("auto") == "auto" and distributed.world() == 2
torch.manual_seed(0)
whole, labels = torch.randn(12, 5, dtype=torch.float64), torch.arange(6).repeat_interleave(2)
net = torch.nn.Linear(5, 4).double()
expected = torch.autograd.grad(triplet_loss(net(whole), labels, mining="all"), list(net.parameters()))
own = net(distributed.share(whole))
assert len(own) == 6
loss = triplet_loss(distributed.gather(own), distributed.gather(distributed.share(labels)), mining="all")
loss.backward()
gradients = [parameter.grad for parameter in net.parameters()]
assert not torch.allclose(gradients[0], expected[0])  # half of it, so far
distributed.add(gradients)
assert all(torch.allclose(a, b, rtol=0, atol=1e-14) for a, b in zip(gradients, expected))

for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8):
    gathered = distributed.gather(torch.full((2, 3), distributed.rank() + 5, dtype=dtype))
    assert gathered.dtype == dtype and gathered[:, 0].tolist() == [5, 5, 6, 6]
assert distributed.from_first(distributed.rank() + 0.25, 7) == [0.25, 7]

weights = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
tasks = [[2.0, 0.0, 5.0], [4.0, 2.0, 3.0], [0.0, 0.0, 0.0], [6.0, 6.0, 4.0]]
own = [[torch.tensor(task[:2]), torch.tensor([task[2:]])] for task in tasks[2 * distributed.rank() :][:2]]
train_reptile.meta_step(weights, own, 0.5)
assert weights[0].tolist() == [2.0, 2.0] and weights[1].tolist() == [[3.0]]
"""

RUN = """
import importlib, signal, sys
import torch, distributed, training

name, interrupt_at = sys.argv[1], int(sys.argv[2])
script = importlib.import_module(name)
original, Run, calls, runs = script.triplet_loss, training.Run, [], []

def counting(*args, **kwargs):
    calls.append(1)
    if len(calls) == interrupt_at and distributed.rank() == 0:
        signal.raise_signal(signal.SIGINT)
    return original(*args, **kwargs)

script.triplet_loss = counting
training.Run = lambda *args, **kwargs: runs.append(Run(*args, **kwargs)) or runs[-1]
script.main(sys.argv[3:])
for parameter in runs[0].net.parameters():  # the same on both
    assert len(distributed.gather(parameter.detach()[None]).unique(dim=0)) == 1
states = distributed.gather(runs[0].train.generator.get_state()[None])
assert not torch.equal(*states) and len(runs[0].losses) == 0
"""


def launch(tmp_path: Path, code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run the code in two processes."""
    (tmp_path / "worker.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += [str(tmp_path / "worker.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_two_processes_take_the_step_of_one(tmp_path):
    done = launch(tmp_path, STEP)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "taught"),
    [
        ("train_classic", CLASSIC, False),
        ("train_classic", [*CLASSIC, "--triplet-weight", "1e-6", "--softmax-weight", "0"], True),
        ("train_reptile", [*REPTILE, "--meta-batch", "2"], False),
    ],
)
def test_two_processes_train_one_network(tmp_path, script, arguments, taught):
    npz = tiny.write_npz(tmp_path / "tiny.npz")
    options = ["--data", npz, *arguments, *(["--iters", "24"] if script == "train_reptile" else [])]
    if taught:  # by a teacher alone, or nearly so
        tiny.run(train_classic, "--data", npz, *CLASSIC, "--epochs", 20, "--out", tmp_path / "teacher")
        options += ["--teacher", tmp_path / "teacher" / "best.pt"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = launch(tmp_path, RUN, script, 0, "--out", whole, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training images of 6 seen classes") == 1
    with open(whole / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["triplet_accuracy"]) > 80  # 50 is chance

    done = launch(tmp_path, RUN, script, 20, "--out", parts, *options)
    assert done.returncode != 0 and done.stderr.count("go on with --resume") == 1
    stopped = checkpoints.read(parts / "last.pt")
    done = launch(tmp_path, RUN, script, 0, "--out", parts, *options, "--resume")
    assert done.returncode == 0, done.stderr
    ends = [checkpoints.read(out / "last.pt") for out in (whole, parts)]
    assert 0 < stopped["step"] < ends[0]["step"]
    assert same(*ends)
    assert len(ends[0]["training"]["generator"]) == 2
    alone = subprocess.run(
        [sys.executable, f"{script}.py", "--out", str(parts), *map(str, options), "--resume"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 2 and "was trained by 2 processes" in alone.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train_classic", [*CLASSIC, "--batch-classes", "3"], "2 processes cannot share the 3 classes of a batch"),
        ("train_reptile", REPTILE, "--meta-batch must be a multiple of 2"),
    ],
)
def test_work_that_cannot_be_split_is_refused_once(tmp_path, script, arguments, message):
    npz = tiny.write_npz(tmp_path / "tiny.npz")
    done = launch(tmp_path, RUN, script, 0, "--out", tmp_path / "run", "--data", npz, *arguments)
    assert done.returncode != 0 and done.stderr.count(message) == 1
    assert not (tmp_path / "run").exists() and "Traceback" not in done.stderr.split("error: ")[1].split("\n")[0]
