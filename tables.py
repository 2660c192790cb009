"""A report of evaluate.py as tables of text, beside what others reached."""

from measure import EPISODES, SHARES

# Figures of others on CIFAR-100 with the last classes unseen: triplet seen, pairs seen, triplet unseen, pairs unseen,
# 10-way 1-shot, 5-way 1-shot, all-way 1-shot. "published" is what the authors printed, whose score for unseen pairs is
# on unbalanced pairs; "measured" is what their networks reach by the definitions used here.
KNOWN = {
    ("90-10", "published, classic"): (88.34, 80.95, None, "83.06*", None, None, None),
    ("90-10", "published, Reptile"): (73.44, 67.60, 80.0, "68.80*", None, None, None),
    ("90-10", "measured, classic"): (87.9, 81.1, 83.4, 76.0, 49.7, 63.3, 50.0),
    ("80-20", "published, classic"): (88.27, 80.96, None, "77.81*", None, None, None),
    ("80-20", "measured, classic"): (88.1, 81.0, 79.8, 72.6, 38.5, 54.0, 25.8),
    ("50-50", "published, classic"): (86.79, 78.26, None, "76.77*", None, None, None),
    ("50-50", "measured, classic"): (86.3, 79.3, 74.3, 67.4, 31.5, 46.9, 10.9),
    ("70-30", "published, classic"): (88.58, 81.24, None, "76.51*", None, None, None),
    ("60-40", "published, classic"): (88.01, 81.63, None, "72.73*", None, None, None),
    ("40-60", "published, classic"): (86.15, 79.56, None, "69.72*", None, None, None),
    ("30-70", "published, classic"): (85.11, 79.13, None, "67.23*", None, None, None),
    ("20-80", "published, classic"): (85.33, 77.95, None, "61.72*", None, None, None),
    ("10-90", "published, classic"): (86.90, 78.82, None, "45.32*", None, None, None),
}
# Published for Reptile on each unseen class: triplets, pairs.
KNOWN_CLASSES = {
    ("cifar100", "90-10"): {
        **{90: (82, 68), 91: (68, 60), 92: (86, 80), 93: (76, 54), 94: (88, 64)},
        **{95: (96, 90), 96: (76, 84), 97: (72, 76), 98: (78, 62), 99: (78, 50)},
    }
}


def table(header: list[str], rows: list[list], decimals: int = 1) -> str:
    """Aligned columns, the first to the left; floats with `decimals`, None as a dash."""

    def text(value: object) -> str:
        return "-" if value is None else f"{value:.{decimals}f}" if isinstance(value, float) else str(value)

    cells = [header, *([text(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def with_interval(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.1f}" if interval is None else f"{value:.1f} ({interval[0]:.1f}..{interval[1]:.1f})"


def show(report: dict) -> None:
    """Print a report."""
    print(f"\n{report['checkpoint']}: {report['data']}, split {report['split']} (seen-unseen){start_text(report)}")
    print(f"{threshold_text(report['threshold'])}\nfigures in percent, (..) 95 % by resampling classes\n")
    rows = []
    for name in ("seen", "unseen"):
        side = report[name]
        if side is not None:
            triplets = with_interval(side["triplet_accuracy"], side["ci95"]["triplet_accuracy"])
            pairs = with_interval(side["pair_accuracy"], side["ci95"]["pair_accuracy"])
            rows.append([name, triplets, pairs, side["pair_accuracy_oracle"], side["auc"], side["eer"]])
    adapted = report["unseen"] and report["unseen"]["adapted"]["published"]
    if adapted:
        figures = [with_interval(adapted[key], adapted["ci95"][key]) for key in ("triplet_accuracy", "pair_accuracy")]
        rows.append(["unseen, adapted (published variant)", *figures, None, None, None])
    print(table(["test images of classes", "triplets", "pairs", "best threshold", "AUC", "EER"], rows))
    show_thresholds(report)
    if report["unseen"] is None:
        return
    rows = [few_shot_row(report, name) for name in EPISODES]
    print("\n" + table(["unseen classes", "accuracy", "95 %", "chance"], rows))
    support = report["unseen"]["adapted"]["support"]
    if support:
        print("\n" + table(ADAPTED_HEADER, adapted_rows(report)) + f"\n{adapted_text(support)}")
    show_known(report)
    rows = [[row["label"], row["name"], row["triplet_accuracy"], row["pair_accuracy"]] for row in report["per_class"]]
    print("\n" + table(["label", "unseen class", "triplets", "pairs"], rows))


def start_text(report: dict) -> str:
    """Whose weights the training began with, to follow a name; empty if none, or if that is not known."""
    options = (report["training"] or {}).get("options", {})
    given = "ImageNet" if options.get("pretrained") else options.get("weights")
    return f", trained on from the weights of {given}" if given else ""


def threshold_text(threshold: dict) -> str:
    """How the threshold in force came to be, and what to expect of it."""
    text = f"threshold {threshold['value']:.3f}"
    if threshold["mode"] == "fixed":
        return f"{text}, as given"
    return (
        f"{text} ({threshold['criterion']}), calibrated on {threshold['calibrated_on']}:\n"
        f"there {threshold['false_accept']:.1f} % of different-class pairs are accepted, "
        f"{threshold['false_reject']:.1f} % of same-class pairs refused"
    )


def show_thresholds(report: dict) -> None:
    """Each threshold's accuracy on balanced pairs and where one in ten is of one class, and its false accepts."""
    sides = [name for name in ("seen", "unseen") if report[name] is not None]
    columns = [*SHARES, "false_accept"]
    rows = []
    for row in report["thresholds"]:
        value = None if row["value"] is None else f"{row['value']:.3f}"
        rows.append([row["name"], value, *(row[side].get(column) for side in sides for column in columns)])
    header = [
        "pair accuracy by",
        "value",
        *(f"{side} {column.replace('_', ' ')}" for side in sides for column in columns),
    ]
    print("\n" + table(header, rows) + "\n1:1, 1:9: same-class to different-class pairs")


def few_shot_row(report: dict, name: str) -> list:
    """Setting, accuracy, interval and chance of one setting of EPISODES."""
    way, shot = EPISODES[name]
    setting = f"{way}-way" if way else f"all {len(report['per_class'])},"
    found = report["unseen"]["few_shot"][name]
    figures = [None, None] if found is None else [found["accuracy"], f"± {found['ci95']:.2f}"]
    return [f"{setting} {shot}-shot", *figures, 100 / (way or len(report["per_class"]))]


ADAPTED_HEADER = ["adapted to support images", "zero steps", "adapted", "difference"]


def adapted_rows(report: dict) -> list[list]:
    """Setting, accuracy without and with adaptation to the support images, difference; each with its interval."""
    rows = []
    for name, found in report["unseen"]["adapted"]["support"]["few_shot"].items():
        row = [few_shot_row(report, name)[0]]
        if found is None:
            rows.append(row + [None] * 3)
            continue
        for accuracy in (found["zero_steps"], found["adapted"]):
            row.append(f"{accuracy['accuracy']:.1f} ± {accuracy['ci95']:.1f}")
        low, high = found["difference"]["ci95"]
        rows.append([*row, f"{found['difference']['difference']:+.2f} ({low:+.2f}..{high:+.2f})"])
    return rows


def adapted_text(support: dict) -> str:
    return (
        f"{support['steps']} steps (learning rate {support['lr']:g}) of the last block on augmented support images, "
        f"each query alone; the same {support['episodes']} episodes"
    )


def show_known(report: dict) -> None:
    """Beside what others reached on the same split of CIFAR-100."""
    seen, unseen = report["seen"], report["unseen"]
    if report["data"] == "cifar100" and any(split == report["split"] for split, _ in KNOWN) and seen is not None:
        shots = unseen["few_shot"]
        pairs = [side[figure] for side in (seen, unseen) for figure in ("triplet_accuracy", "pair_accuracy")]
        ours = [*pairs, *(shots[name] and shots[name]["accuracy"] for name in ("10w1s", "5w1s", "all1s"))]
        rows = [
            ["this checkpoint", *ours],
            *([who, *row] for (split, who), row in KNOWN.items() if split == report["split"]),
        ]
        header = "|triplets seen|pairs seen|triplets unseen|pairs unseen|10-way|5-way|all-way".split("|")
        print("\n" + table(header, rows))
        print("* on unbalanced pairs, by the published protocol")
    print(
        f"\npublished few-shot protocol (one pair in {len(report['per_class'])} is of one class): "
        f'{unseen["published_protocol"]:.2f}; always answering "different": {unseen["constant_answer"]:.2f}'
    )


def show_comparison(report: dict) -> None:
    """How a checkpoint differs from the first one."""
    compared = report["compared_with"]
    rows = []
    for side in ("seen", "unseen"):
        for figure, found in (compared[side] or {}).items():
            interval = found["ci95"]
            text = "" if interval is None else f"{interval[0]:+.1f}..{interval[1]:+.1f}"
            verdict = "" if interval is None or interval[0] <= 0 <= interval[1] else "differs"
            rows.append([f"{side} {figure.replace('_', ' ')}", f"{found['difference']:+.1f}", text, verdict])
    print(f"\n{report['checkpoint']} minus {compared['checkpoint']}, on the same images and episodes")
    print(table(["points", "difference", "95 %", ""], rows))
