"""Class cross-validation: each class is unseen once. Trains and evaluates ten folds, one after the other.

    python benchmarks/folds.py results/classic.json train_classic.py --epochs 4 --rotate 0 --cutout 0 --compile
    python benchmarks/folds.py results/reptile.json train_reptile.py --iters 668 --rotate 0 --cutout 0 --compile
    python benchmarks/folds.py --compare results/classic.json results/reptile.json

What comes after the script's name goes to it. A fold that is done is not repeated, one that was stopped goes on.
Figures are of the last checkpoint: their mean over folds, and its 95 % interval, by Student's t over the folds. The
third command prints the differences of the second file from the first, fold by fold, in the same way.
"""

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import cli

FOLDS, T95 = 10, 2.262  # Student's t with 9 degrees of freedom
FIGURES = ("triplet_accuracy", "pair_accuracy")


def figures(report: dict) -> dict[str, float]:
    found = {f"{side} {name}": report[side][name] for side in ("seen", "unseen") for name in FIGURES}
    return found | {name: report["unseen"]["few_shot"][name]["accuracy"] for name in ("5w1s", "5w5s", "10w1s")}


def mean_of(values: list[float]) -> dict[str, float]:
    half = T95 * statistics.stdev(values) / math.sqrt(FOLDS)
    return {"mean": statistics.mean(values), "ci95": half, "lowest": min(values), "highest": max(values)}


def show(means: dict[str, dict[str, float]]) -> None:
    for name, of in means.items():
        print(f"{name}: {of['mean']:.1f} +- {of['ci95']:.1f} ({of['lowest']:.1f} to {of['highest']:.1f})")


def run_folds(out: str, script: str, *options: str) -> None:
    rows, trainings, command = [], [], " ".join((script, *options))
    folder = Path("runs") / Path(out).stem
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "command"
    if note.exists() and note.read_text() != command:
        raise ValueError(f"{folder} has folds of {note.read_text()}; remove it, or give another OUT")
    note.write_text(command)
    for fold in range(1, FOLDS + 1):
        run = folder / f"{fold}"
        report = run / "report.json"
        if not report.exists():
            more = ["--resume"] if (run / "last.pt").exists() else []
            train = [script, *options, "--split", f"{fold}/{FOLDS}", "--out", str(run), *more]
            subprocess.run([sys.executable, *train], check=True)
            data = [
                options[place : place + 2] for place, each in enumerate(options) if each in ("--data", "--data-root")
            ]
            known = [word for pair in data for word in pair]
            evaluate = ["evaluate.py", str(run / "last.pt"), *known, "--json", str(report)]
            subprocess.run([sys.executable, *evaluate], check=True)
        found = json.loads(report.read_text())
        rows.append(figures(found))
        trainings.append({name: found["training"][name] for name in ("images", "seconds", "threads")})
        print(f"fold {fold}: {rows[-1]}", flush=True)
    means = {name: mean_of([row[name] for row in rows]) for name in rows[0]}
    show(means)
    found = {"command": command, "trainings": trainings, "folds": rows, "mean": means}
    cli.write_json(out, found)


def compare(first: str, second: str) -> None:
    pairs = list(zip(*(json.loads(Path(each).read_text())["folds"] for each in (first, second)), strict=True))
    show({name: mean_of([new[name] - old[name] for old, new in pairs]) for name in pairs[0][0]})


if __name__ == "__main__":
    with cli.user_errors():
        compare(*sys.argv[2:]) if sys.argv[1:2] == ["--compare"] else run_folds(*sys.argv[1:])
