"""What several tests share: a tiny data set, trainings on it, scripts that must refuse their arguments."""

from pathlib import Path

import pytest
import torch

import tiny


@pytest.fixture(autouse=True)
def process_settings():
    """A test leaves PyTorch as it found it: with other threads or algorithms, later tests round differently."""

    def settings():
        return torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype()

    before = settings()
    yield
    after = settings()
    torch.set_num_threads(before[0])
    assert after == before, "threads, deterministic algorithms, dtype"


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return str(tiny.write_npz(tmp_path_factory.mktemp("data") / "tiny.npz"))


@pytest.fixture
def train(npz):
    """Runs a training script with arguments; returns the folder of the run."""

    def run(script, arguments, out, *more):
        tiny.run(script, "--data", npz, "--out", out, *arguments, *more)
        return Path(out)

    return run


@pytest.fixture
def refusal(capsys):
    """Runs a script that must end with this exit status and without a traceback; returns its standard error."""

    def run(script, *arguments, status=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            tiny.run(script, *arguments)
        errors = capsys.readouterr().err
        assert stop.value.code == status and "Traceback" not in errors, errors
        return errors

    return run
