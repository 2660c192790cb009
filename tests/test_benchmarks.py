"""The programs in benchmarks/ run: each with a moment's work on a tiny data set."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import evaluate
import tiny
import train_classic
from tiny import CLASSIC, SMALL

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.slow


def script(name: str) -> ModuleType:
    """The program as a module, whose constants a test can make small."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look for themselves
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def main(monkeypatch):
    """Runs a program's main in this process, which keeps its number of threads."""
    threads = torch.get_num_threads()

    def run(module: ModuleType, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()

    yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A data set of 24 classes, and best.pt of a training on the first three."""
    folder = tmp_path_factory.mktemp("many")
    npz = tiny.write_npz(folder / "tiny.npz", classes=24, train=8, test=6)
    more = ["--split", "3-21", "--width", 32, "--epochs", 2, "--batch-classes", 3]
    tiny.run(train_classic, "--data", npz, "--out", folder, *SMALL, *more)
    return npz, folder / "best.pt"


def test_a_picture_of_runs(train, tmp_path):
    out = train(train_classic, CLASSIC, tmp_path / "run", "--epochs", "2")
    for metric, code in (("triplet_accuracy", 0), ("new_triplet_accuracy", 1)):  # no validation classes
        command = [sys.executable, BENCHMARKS / "plot_runs.py", out, "--metric", metric, "--against", "images"]
        done = subprocess.run([*command, "--out", tmp_path / "a.png"], capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert "log.csv has no new_triplet_accuracy" in done.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_step(npz, tmp_path):
    command = [sys.executable, BENCHMARKS / "bench_step.py", "--data", npz, "--seconds", "0.1"]
    subprocess.run([*command, "--device", "cpu", "--json", tmp_path / "a.json"], check=True)
    found = json.loads((tmp_path / "a.json").read_text())
    assert all(found[name]["milliseconds"] > 0 for name in ("classic", "reptile"))


def test_folds(many, tmp_path, monkeypatch, capsys):
    """The trainings and evaluations of folds are stand-ins; one of them was done before, one was stopped."""
    npz, best = many
    tiny.run(evaluate, best, "--data", npz, "--json", tmp_path / "report.json")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(
        "import pathlib, sys\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "assert ('--resume' in sys.argv) == (out.name == '2')\n"
        "assert sys.argv[sys.argv.index('--split') + 1] == f'{out.name}/10' and out.name != '1'\n"
        "out.mkdir(parents=True, exist_ok=True)\n"
        "(out / 'last.pt').touch()\n"
    )
    (tmp_path / "evaluate.py").write_text(
        "import json, pathlib, sys\n"
        "assert sys.argv[2:4] == ['--data', 'my.npz'] and pathlib.Path(sys.argv[1]).exists()\n"
        "report = json.load(open('report.json'))\n"
        "report['unseen']['pair_accuracy'] = 70 + int(sys.argv[1].split('/')[2])\n"
        "json.dump(report, open(sys.argv[sys.argv.index('--json') + 1], 'w'))\n"
    )
    for fold in (1, 2):
        (tmp_path / "runs" / "folds" / f"{fold}").mkdir(parents=True)
    report = json.loads(Path("report.json").read_text())
    report["unseen"]["pair_accuracy"] = 71
    Path("runs/folds/1/report.json").write_text(json.dumps(report))
    Path("runs/folds/2/last.pt").touch()
    folds = script("folds")
    folds.run_folds("folds.json", "train.py", "--data", "my.npz", "--epochs", "4")
    found = json.loads(Path("folds.json").read_text())
    assert found["command"] == "train.py --data my.npz --epochs 4" and len(found["folds"]) == 10
    pairs = found["mean"]["unseen pair_accuracy"]
    assert pairs["mean"] == 75.5 and (pairs["lowest"], pairs["highest"]) == (71, 80)
    assert pairs["ci95"] == pytest.approx(2.262 * 3.02765 / 10**0.5, rel=1e-5)  # of 71..80
    capsys.readouterr()
    folds.compare("folds.json", "folds.json")
    with pytest.raises(ValueError, match="has folds of train.py --data my.npz --epochs 4"):
        folds.run_folds("folds.json", "train.py", "--data", "my.npz", "--epochs", "5")
    assert "unseen pair_accuracy: 0.0 +- 0.0 (0.0 to 0.0)" in capsys.readouterr().out


def test_views(many, main, tmp_path):
    npz, best = many
    main(script("views"), best, "--data", npz, "--first", 3, "--last", 23, "--out", tmp_path / "a.json")
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert len(rows) == 20 and all(50 < row[side]["triplets"] <= 100 for row in rows for side in ("new", "seen"))


def test_small_sets(many, main, tmp_path, capsys):
    npz, best = many
    usual = ["--cifar", npz, "--weights", best, "--first", 4, "--pictures", 6, "--iters", 2]
    usual += ["--arms", "fine-tuned", "by Reptile, --freeze 0", "--out", tmp_path / "a.json"]
    for _ in range(2):  # what is done is not repeated
        main(script("small_sets"), *usual, "--seeds", 0)
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["as it is", "fine-tuned", "by Reptile, --freeze 0"]
    assert all(0 < row[side][figure] <= 100 for row in rows for side in ("own", "new") for figure in row[side])
    with pytest.raises(SystemExit) as stop:
        main(script("small_sets"), *usual, "--seeds", 0, "--iters", 3)
    assert stop.value.code == 2 and "has rows of another --iters, 2; give another --out" in capsys.readouterr().err


def test_photographs(monkeypatch, tmp_path, capsys):
    module = script("photographs")
    for name, value in {"COUNT": 80, "CLASSES": 8, "DRAWN": 8, "SIZE": 98, "STEPS": 1}.items():
        monkeypatch.setattr(module, name, value)
    module.main(tmp_path / "drawn")
    found = json.loads(capsys.readouterr().out.partition("\n{")[2].join(("{", "")))
    assert found["pictures"] == 80 and found["peak_resident_gigabytes"] > 0


def test_a_gallery(main, capsys):
    main(script("bench_gallery"), "--classes", 50)
    out = capsys.readouterr().out
    assert out.startswith("50 classes, ") and "1000 pictures, the 5 most similar classes: " in out


def test_the_op_on_the_cpu(main, monkeypatch, tmp_path, capsys):
    module = script("bench_triplet")
    monkeypatch.setattr(module, "QUICK", [module.Case(64, 128)])
    monkeypatch.setattr(module, "sgemm_rate", lambda: 100.0)
    main(module, "--quick", "--threads", 1, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["milliseconds"].keys() == {"native", "torch", "compiled", "pml", "product"}
    assert "   64 x 128 hard" in capsys.readouterr().out and (tmp_path / "a.png").exists()
