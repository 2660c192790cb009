"""An evaluation as tables, in text or HTML, and as one self-contained page with figures; comparisons of two."""

import html
import json
import os
from dataclasses import dataclass
from pathlib import Path
from string import Template

import torch

import cli
import metrics
from metrics import FEW_SHOT, SHARES, Side

PAGE = Path(__file__).with_name("report.html")
PUBLISHED = Path(__file__).with_name("results") / "published.json"  # figures of others on CIFAR-100
LISTED = 40  # classes with a row of their own
UNMEASURED = {"seen": None, "unseen": None}

# --------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Table:
    """The first column names the rows; the cells of the others are as in `cli.cell`."""

    title: str
    header: list[str]
    rows: list[list]
    note: str = ""
    bars: bool = False  # numbers are percentages, drawn as bars

    def text(self) -> str:
        title = self.title.replace("±", "+-")  # in ASCII
        return "\n".join(filter(None, [title, cli.text_table(self.header, self.rows), self.note]))

    def html(self) -> str:
        head = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in self.header)
        body = ""
        for name, *cells in self.rows:
            text = ""
            for cell in cells:
                bar = f' class=bar style="--share: {cell:.1f}%"' if self.bars and isinstance(cell, float) else ""
                text += f"<td{bar}>{html.escape(cli.cell(cell, 1, '–'))}</td>"
            body += f"<tr><th scope=row><bdi>{html.escape(cli.printable(name))}</bdi></th>{text}</tr>"
        caption = ". ".join(filter(None, [self.title, self.note]))
        return (
            f"<section><table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></section>"
        )


def tables(report: dict) -> list[Table]:
    """The tables of a report."""
    unseen, measured = report["unseen"], report["seen"] or report["unseen"]
    wanted = {
        side_table: measured,
        threshold_table: measured,
        runs_table: report.get("runs"),
        few_shot_table: unseen,
        adapted_table: unseen and unseen["adapted"]["support"],
        open_set_table: unseen and report["open_set"],
        class_table: unseen,
        known_table: unseen and report["seen"] and published(report),
        comparison_table: report["compared_with"],
    }
    return [table(report) for table, rows in wanted.items() if rows]


def with_interval(figures: dict, name: str) -> str:
    """A figure with its 95 % interval."""
    value, interval = figures[name], figures["ci95"][name]
    return cli.cell(value) + ("" if interval is None else f" ({interval[0]:.1f}..{interval[1]:.1f})")


def side_table(report: dict) -> Table:
    sides = {name: report[name] for name in UNMEASURED if report[name]}
    if report["unseen"] and report["unseen"]["adapted"]["published"]:
        sides["unseen, adapted (published variant)"] = report["unseen"]["adapted"]["published"]
    rows = []
    for name, side in sides.items():
        accuracies = [with_interval(side, "triplet_accuracy"), with_interval(side, "pair_accuracy")]
        rows.append([name, *accuracies, *map(side.get, ("pair_accuracy_oracle", "auc", "eer"))])
    title = "Test images, percent; (low..high) is the 95 % interval by resampling classes"
    return Table(title, ["classes", "triplets", "pairs", "pairs, best threshold", "AUC", "EER"], rows)


def runs_table(report: dict) -> Table:
    runs, trials = report["measured"]["runs"], report["measured"]["trials"]
    row = [f"{runs} runs, {trials // runs}-way", with_interval(report["runs"], "error"), trials]
    title = "Omniglot's one-shot test, percent wrong; (low..high) is the 95 % interval by resampling runs"
    return Table(title, ["one picture of each class", "wrong", "trials"], [row])


def threshold_table(report: dict) -> Table:
    columns = [(side, name) for side in UNMEASURED if report[side] for name in (*SHARES, "false_accept")]
    rows = []
    for row in report["thresholds"]:
        value = None if row["value"] is None else f"{row['value']:.3f}"
        rows.append([row["name"], value, *(row[side].get(name) for side, name in columns)])
    header = ["threshold", "value", *(f"{side} {name.replace('_', ' ')}" for side, name in columns)]
    title = "Pair accuracy where same-class to different-class pairs are 1:1 or 1:9, and false accepts"
    return Table(title, header, rows)


def few_shot_table(report: dict) -> Table:
    most = max(10, len(report["per_class"]))
    rows = [few_shot_row(report, name) for name, (way, _) in FEW_SHOT.items() if (way or 0) <= most]
    title = "One or five pictures of each unseen class; ± is the 95 % interval of the draw of episodes only"
    return Table(title, ["", "accuracy", "95 %", "chance"], rows)


def few_shot_row(report: dict, name: str) -> list:
    """Setting, accuracy, interval and chance of one setting of FEW_SHOT."""
    way, shot = FEW_SHOT[name]
    setting = f"{way}-way" if way else f"all {len(report['per_class'])},"
    found = report["unseen"]["few_shot"][name] or {"accuracy": None, "ci95": None}
    interval = None if found["ci95"] is None else f"± {found['ci95']:.2f}"
    return [f"{setting} {shot}-shot", found["accuracy"], interval, 100 / (way or len(report["per_class"]))]


def adapted_table(report: dict) -> Table:
    """Few-shot accuracy without and with adaptation to the support images, and the difference."""
    support, rows = report["unseen"]["adapted"]["support"], []
    for name, found in support["few_shot"].items():
        cells = [None] * 3
        if found is not None:
            low, high = found["difference"]["ci95"]
            cells = [f"{found[of]['accuracy']:.1f} ± {found[of]['ci95']:.1f}" for of in ("zero_steps", "adapted")]
            cells.append(f"{found['difference']['difference']:+.2f} ({low:+.2f}..{high:+.2f})")
        rows.append([few_shot_row(report, name)[0], *cells])
    title = (
        f"{support['steps']} steps (learning rate {support['lr']:g}) of the last block on augmented support images, "
        f"each query alone; intervals are of the draw of {support['episodes']} episodes only"
    )
    return Table(title, ["adapted to support images", "zero steps", "adapted", "difference"], rows)


def open_set_table(report: dict) -> Table:
    rows = []
    for row in report["open_set"]:
        name = f"{row['classes']} {row['enrolled']}, {row['pictures']} each"
        figures = list(row.values())[3:]
        rows.append([name, *(f"{mean:.1f}" + (f" ± {half:.1f}" if half else "") for mean, half in figures)])
    header = ["enrolled classes, pictures", "AUROC", "right, 1 %", "right, 10 %", "named, 5 %", "named, 10 %"]
    title = "Half of the queries, or as many as there are, are strangers, of unseen classes that are not enrolled"
    note = (
        "right: queries of enrolled classes that get their class where this share of the strangers is given a name; "
        "named: strangers given a name at the threshold for this share; ranges are of the draw of episodes"
    )
    return Table(title, header, rows, note)


def class_table(report: dict) -> Table:
    known, found = published(report).get("classes"), report["per_class"]
    accuracy = torch.tensor([row["pair_accuracy"] for row in found]).nan_to_num(100)
    rows = []
    for row in map(found.__getitem__, accuracy.argsort(stable=True)[:LISTED].sort().values.tolist()):
        others = [known.get(str(row["label"]))] if known else []
        name = f"{row['label']} {row['name'].replace('_', ' ')}"
        rows.append([name, row["triplet_accuracy"], row["pair_accuracy"], *others])
    header = ["class", "triplets", "pairs", *(["published Reptile"] if known else [])]
    title = "Unseen classes" + (", beside published triplets / pairs" if known else "")
    if len(rows) < len(found):
        title += f", the {len(rows)} of {len(found)} with the lowest pair accuracy; --json FILE holds all"
    return Table(title, header, rows, bars=True)


def published(report: dict) -> dict:
    """What others reached on the same split of CIFAR-100, if anything is known."""
    known = json.loads(PUBLISHED.read_text())["splits"] if report["data"] == "cifar100" else {}
    return known.get(report["split"], {})


def known_table(report: dict) -> Table:
    seen, unseen = report["seen"], report["unseen"]
    pairs = [side[figure] for side in (seen, unseen) for figure in ("triplet_accuracy", "pair_accuracy")]
    shots = [few_shot_row(report, name)[1] for name in ("10w1s", "5w1s", "all1s")]
    header = "|triplets seen|pairs seen|triplets unseen|pairs unseen|10-way|5-way|all-way".split("|")
    others = published(report)["networks"].items()
    rows = [["this checkpoint", *pairs, *shots], *([name, *figures] for name, figures in others)]
    return Table("Beside published figures", header, rows, "* on unbalanced pairs, by the published protocol")


def comparison_table(report: dict) -> Table:
    """How a checkpoint differs from the first one."""
    other, rows = report["compared_with"]["checkpoint"], []
    for side in ("seen", "unseen", "runs"):
        for figure, found in (report["compared_with"].get(side) or {}).items():
            low, high = found["ci95"] or (-torch.inf, torch.inf)
            interval = f"{low:+.1f}..{high:+.1f}" if found["ci95"] else ""
            verdict = "" if low <= 0 <= high else "differs"
            text = few_shot_row(report, figure)[0] if figure in FEW_SHOT else figure.replace("_", " ")
            rows.append([f"{side} {text}", f"{found['difference']:+.1f}", interval, verdict])
    title = (
        f"{report['checkpoint']} minus {other}, on the same images and episodes; intervals are by resampling classes "
        "or runs, for few-shot accuracy of the draw of episodes only"
    )
    return Table(title, ["points", "difference", "95 %", ""], rows)


def compare(sides: dict[str, Side], other: dict[str, Side]) -> dict | None:
    """Figures of `sides` minus those of `other`, in points, with 95 % intervals of the differences, (low, high).

    Paired: both sets of figures are taken on the same resamples of the classes, and on the same episodes. None if they
    were measured on different images.
    """
    both = {name: (side, other.get(name)) for name, side in sides.items()}
    if sides.keys() != other.keys() or not all(a.images.same(b.images) for a, b in both.values()):
        return None
    compared = dict(UNMEASURED)
    for name, (side, theirs) in both.items():
        compared[name] = rows = {}
        for figure, a in side.accuracies.items():
            b = theirs.accuracies[figure]
            rows[figure] = {"difference": a.value - b.value, "ci95": metrics.interval(a.resampled - b.resampled)}
        for setting, accuracies in side.episodes.items():
            if accuracies is not None:
                mean, half = metrics.mean_interval(accuracies - theirs.episodes[setting])
                interval = (mean - half, mean + half) if metrics.enough(side.labels) else None
                rows[setting] = {"difference": mean, "ci95": interval}
    return compared


# ------------------------------------------------------------------------------------------------------- text and page


def show(report: dict) -> None:
    """Print a report."""
    print("", *map(cli.printable, facts(report)), sep="\n")
    for table in tables(report):
        print("\n" + table.text())
    unseen = report["unseen"]
    if unseen and unseen["published_protocol"] is not None:
        print(
            f"\npublished few-shot protocol (one pair in {len(report['per_class'])} is of one class): "
            f'{unseen["published_protocol"]:.2f}; always answering "different": {unseen["constant_answer"]:.2f}'
        )


def facts(report: dict) -> list[str]:
    """What was evaluated, and when, in lines."""
    network, training = report["network"], report["training"] or {"options": {}}
    title = f"{report['checkpoint']}: {report['data']}, split {report['split']} (seen-unseen)"
    given = "ImageNet" if training["options"].get("pretrained") else training["options"].get("weights")
    if given:
        title += f", trained on from the weights of {given}"
    if training["options"].get("teacher"):
        title += f", with the teachers {', '.join(training['options']['teacher'])}"
    text = network["backbone"] + (f", width {network['width']}" if "width" in network else "")
    text += f", {network['parameters'] / 1e6:.2f} M parameters, images of {network['size']} x {network['size']} pixels"
    if training.get("seconds") is not None:
        minutes = training["seconds"] / 60
        text += f"; trained for {training['step']} steps, {training['images']} images, {minutes:.1f} minutes"
    if report["commit"]:
        text += f"; commit {report['commit']}"
    threshold = [threshold_text(report["threshold"])] if report["threshold"] else []
    return [title, text, f"evaluated on {report['date']}", *report["notes"], *threshold]


def threshold_text(threshold: dict) -> str:
    """How the threshold in force was chosen, and what to expect of it."""
    text = f"threshold {threshold['value']:.3f}"
    if threshold["mode"] == "fixed":
        return f"{text}, as given"
    return (
        f"{text} ({threshold['criterion']}), calibrated on {threshold['calibrated_on']};\n"
        f"there it accepts {threshold['false_accept']:.1f} % of different-class pairs and refuses "
        f"{threshold['false_reject']:.1f} % of same-class pairs"
    )


def write(folder: str | os.PathLike, evaluated: list[tuple[dict, dict[str, Side], list[str]]]) -> Path:
    """Write pages about reports, each with the sides it was made from and the names of all classes; return the path of
    the page to read first.

    A page is index.html, with a light and a dark PNG of each drawing beside it. That of a single report is in `folder`;
    several have the folders 1, 2, ... there, and a page in `folder` that compares them. Raises OSError.
    """
    import figures  # takes a while to load, and only a page needs it

    folder, pages = Path(folder), {}
    for number, (report, sides, names) in enumerate(evaluated, 1):
        place = folder / str(number) if len(evaluated) > 1 else folder
        place.mkdir(parents=True, exist_ok=True)
        drawn = figures.of_report(report, sides, names) if sides else {}
        for name, picture in drawn.items():
            for theme, file in picture.files.items():
                with cli.writing(place / f"{name}{theme}.png") as path:
                    path.write_bytes(file)
        shown = [table.html() for table in tables(report)] + [picture.html(name) for name, picture in drawn.items()]
        title, about = f"{report['data']}, split {report['split']}", [paragraphs(facts(report)), cards(report)]
        pages[place] = document(title, *about, "<main>", *shown, "</main>")
    if len(evaluated) > 1:
        pages[folder] = overview([report for report, _, _ in evaluated])
    for place, text in pages.items():
        with cli.writing(place / "index.html") as path:
            path.write_text(text, encoding="utf-8", errors="backslashreplace")  # file names may hold any bytes
    return folder / "index.html"


def overview(reports: list[dict]) -> str:
    """The HTML page of several reports: each with a link to its own page, and comparisons."""
    parts = []
    for number, report in enumerate(reports, 1):
        title, *lines = facts(report)
        parts.append(f'<section><h2><a href="{number}/index.html">{html.escape(title)}</a></h2>')
        parts += [paragraphs(lines), cards(report), "</section>"]
    compared = [comparison_table(report).html() for report in reports if report["compared_with"]]
    return document(f"{len(reports)} checkpoints", *parts, "<main>", *compared, "</main>")


def document(title: str, *parts: str) -> str:
    return Template(PAGE.read_text(encoding="utf-8")).substitute(title=html.escape(title), body="\n".join(parts))


def paragraphs(lines: list[str]) -> str:
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def cards(report: dict) -> str:
    """The figures one looks for first."""
    name = "seen" if report["unseen"] is None else "unseen"
    side, found = report[name], []
    if side is None:
        return ""
    for figure in ("pair", "triplet"):
        interval = side["ci95"][f"{figure}_accuracy"]
        note = "" if interval is None else "95 %: {:.1f} to {:.1f}".format(*interval)
        found.append((f"{figure}s, {name}", side[f"{figure}_accuracy"], note))
    found.append((f"AUC, {name}", side["auc"], f"EER {side['eer']:.1f} %"))
    for each in side.get("few_shot", {}):
        setting, accuracy, interval, chance = few_shot_row(report, each)
        if accuracy is not None and each != "all1s":
            episodes = f"{interval} over episodes, " if interval else ""
            found.append((setting, accuracy, f"{episodes}chance {chance:.0f} %"))
    items = (f"<li><span>{text}</span><b>{value:.1f}<i> %</i></b><small>{note}</small>" for text, value, note in found)
    return f"<ul class=cards>{''.join(items)}</ul>"
