"""Accuracy during training, of one or several runs, as a picture.

    python benchmarks/plot_runs.py runs/classic runs/reptile --out docs/training.png
    python benchmarks/plot_runs.py runs/a runs/b --metric new_triplet_accuracy --against images --out picture.png

Reads each run's log.csv. The default metric is of held-back images of seen classes; those that begin with "new" are of
validation classes (--withhold).
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import tyro

matplotlib.use("agg")
import matplotlib.pyplot as plt

AXES = {"minutes": ("seconds", 60.0), "images": ("images", 1e3)}  # column of log.csv, what it is divided by
NAMES = {"minutes": "minutes of training", "images": "thousand images"}


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[str, ...]]  # folders of runs
    out: str  # the picture (PNG, SVG or PDF)
    labels: tuple[str, ...] = ()  # of the runs; by default the folders' names
    metric: str = "triplet_accuracy"  # a column of log.csv
    against: Literal["minutes", "images"] = "minutes"


def curve(folder: str, metric: str, against: str) -> tuple[list[float], list[float]]:
    """Points (x, metric) of a run's log, where it was validated. Raises ValueError or OSError."""
    column, unit = AXES[against]
    with open(Path(folder) / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    points = [(float(row[column]) / unit, float(row[metric])) for row in rows if row.get(metric) and row.get(column)]
    if not points:
        raise ValueError(f"{folder}/log.csv has no {metric} against {column}")
    x, y = zip(*points, strict=True)
    return list(x), list(y)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.labels and len(options.labels) != len(options.runs):
        sys.exit(f"error: {len(options.labels)} labels for {len(options.runs)} runs")
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for folder, label in zip(options.runs, options.labels or [Path(run).name for run in options.runs], strict=True):
        try:
            axes.plot(*curve(folder, options.metric, options.against), marker="o", markersize=3, label=label)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
    axes.set(xlabel=NAMES[options.against], ylabel=f"{options.metric.replace('_', ' ')}, %")
    axes.grid(True, alpha=0.3)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    try:
        figure.savefig(options.out, dpi=130)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
