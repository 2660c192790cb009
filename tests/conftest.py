"""What several tests share: a tiny data set, and scripts run on it."""

import sys
from pathlib import Path

import pytest

import tiny


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return str(tiny.write_npz(tmp_path_factory.mktemp("data") / "tiny.npz"))


@pytest.fixture
def train(npz, monkeypatch):
    """Runs a script's main with arguments, in this process; returns the folder of the run."""

    def run(script, arguments, out, *more):
        argv = [f"{script.__name__}.py", "--data", npz, "--out", str(out), *arguments, *more]
        monkeypatch.setattr(sys, "argv", argv)
        script.main()
        return Path(out)

    return run
