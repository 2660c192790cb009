"""Class cross-validation: each class is unseen once. Trains and evaluates ten folds, one after the other.

    python benchmarks/folds.py results/folds-classic.json train_classic.py --minutes 10 --compile
    python benchmarks/folds.py results/folds-reptile.json train_reptile.py --minutes 10 --compile

What comes after the script's name goes to it. A fold that is done is not repeated, one that was stopped goes on.
Figures are of the last checkpoint: their mean over folds, and its 95 % interval, by Student's t over the folds.
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


def main(out: str, script: str, *options: str) -> None:
    rows = []
    for fold in range(1, FOLDS + 1):
        run = Path("runs") / Path(out).stem / f"{fold}"
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
        rows.append(figures(json.loads(report.read_text())))
        print(f"fold {fold}: {rows[-1]}", flush=True)
    means = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        half = T95 * statistics.stdev(values) / math.sqrt(FOLDS)
        means[name] = {"mean": statistics.mean(values), "ci95": half, "lowest": min(values), "highest": max(values)}
        print(f"{name}: {means[name]['mean']:.1f} +- {half:.1f} ({min(values):.1f} to {max(values):.1f})")
    cli.write_json(out, {"command": " ".join((script, *options)), "folds": rows, "mean": means})


if __name__ == "__main__":
    main(*sys.argv[1:])
