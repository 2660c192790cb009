"""The report page: figures and tables of an evaluation in one self-contained HTML file, and its pictures as PNGs."""

import base64
import html
import os
from pathlib import Path

import torch
from torch import Tensor

import engine
import figures
import metrics
from measure import Side
from tables import (
    ADAPTED_HEADER,
    KNOWN_CLASSES,
    adapted_rows,
    adapted_text,
    few_shot_row,
    start_text,
    threshold_text,
    with_interval,
)

MAP_IMAGES = 1000  # of the embedding map: its cost is quadratic
BARS = 40  # classes with a bar of their own
PAIR_IMAGES = 4000  # among which the hardest pairs are looked for
STYLE = Path(__file__).with_name("report.css")


def write(folder: str | os.PathLike, report: dict, sides: dict[str, Side | None], names: list[str]) -> Path:
    """Write index.html and a light and a dark PNG of each figure into `folder`; return the page's path.

    `report` and `sides` are evaluate.py's, `names` those of all classes. Raises OSError.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw_figures(report, {name: side for name, side in sides.items() if side is not None}, names)
    for name, (files, _, _) in drawn.items():
        for theme, file in files.items():
            with engine.writing(folder / (f"{name}.png" if theme == "light" else f"{name}-{theme}.png")) as path:
                path.write_bytes(file)
    with engine.writing(folder / "index.html") as path:
        path.write_text(page(report, drawn), encoding="utf-8")
    return folder / "index.html"


# ------------------------------------------------------------------------------------------------------------- figures


def draw_figures(report: dict, sides: dict[str, Side], names: list[str]) -> dict[str, tuple[dict, str, str]]:
    """PNG files by theme, title and description of each figure, by name."""
    threshold = report["threshold"]["value"]
    points, counts = {}, {}
    for name, side in sides.items():
        accept, reject = metrics.pair_errors(side.z, side.images.labels, [threshold])
        points[name] = (float(accept), 1 - float(reject))
        counts[name] = metrics.pair_histogram(side.z, side.images.labels, 100)
    lines = {row["name"]: row["value"] for row in report["thresholds"] if row["value"] is not None}
    curves = {name: side.curve for name, side in sides.items()}
    drawn = {
        "roc": (
            figures.draw(lambda figure: figures.roc(figure, curves, points), 4.6, 4.4),
            "ROC curve",
            "Share of same-class pairs accepted against share of different-class pairs accepted, over all thresholds. "
            "The dot is the threshold in force.",
        ),
        "similarity": (
            figures.draw(lambda figure: figures.histogram(figure, counts, lines), 5.2, 2.6 * len(counts) + 0.3),
            "Similarities and thresholds",
            "Distributions of the similarity of pairs of one class and of two. Where they overlap no threshold helps.",
        ),
    }
    if "unseen" in sides:
        drawn |= unseen_figures(report, sides["unseen"], names)
    return drawn


def unseen_figures(report: dict, side: Side, names: list[str]) -> dict[str, tuple[dict, str, str]]:
    """The figures about unseen classes."""
    rows = sorted(report["per_class"], key=lambda row: row["pair_accuracy"])[:BARS]
    rows = sorted(rows, key=lambda row: row["label"])
    known = KNOWN_CLASSES.get((report["data"], report["split"]), {})
    classes = side.images.labels.unique()
    own_names = [names[label] for label in classes.tolist()]
    chosen = spread(len(side.z), MAP_IMAGES)
    index = torch.searchsorted(classes, side.images.labels)
    places = figures.tsne(side.z[chosen]) if len(chosen) > 3 else side.z[chosen, :2]
    drawn = {
        "classes": (
            figures.draw(lambda figure: figures.class_bars(figure, rows, known, 50), 5.2, 1 + 0.36 * len(rows)),
            "Class by class",
            "Triplet and pair accuracy of each unseen class"
            + (f", the {BARS} hardest" if len(report["per_class"]) > BARS else "")
            + (", with the published figures of Reptile as diamonds." if known else "."),
        ),
        "map": (
            figures.draw(lambda figure: figures.embedding_map(figure, places, index[chosen], own_names), 5.2, 4.6),
            "Map of the embeddings",
            f"Test images of the unseen classes ({len(chosen)} of {len(side.z)}) by t-SNE: near means similar, empty "
            "space between groups means nothing.",
        ),
        "hardest": hardest_figure(side, names),
    }
    shares = one_shot_confusion(side)
    if shares is not None:
        size = min(4.4 + 0.1 * len(classes), 9)
        drawn["confusion"] = (
            figures.draw(lambda figure: figures.confusion(figure, shares, own_names), size, size - 0.4),
            f"{len(classes)}-way one-shot confusions",
            "Percent of the queries of each class that went to each class, with one support image a class.",
        )
        drawn["episodes"] = episode_figure(side, own_names)
    return drawn


def spread(n: int, most: int) -> Tensor:
    """At most `most` of n rows, evenly."""
    return torch.arange(n) if n <= most else torch.linspace(0, n - 1, most).long()


def one_shot_confusion(side: Side, episodes: int = 1000) -> Tensor | None:
    """Percent of queries by class and answer (C, C) with one support a class, all classes in each episode."""
    labels = side.images.labels
    way = len(labels.unique())
    counts = torch.zeros(way * way, dtype=torch.float64)
    for rows, images in metrics.draw_episodes(labels, way, 1, episodes=episodes):
        answers = rows.gather(1, metrics.classify(side.z, images, 1).flatten(1))
        truth = rows.repeat_interleave(images.shape[2] - 1, 1)
        counts += torch.bincount((truth * way + answers).flatten(), minlength=way * way)
    counts = counts.view(way, way)
    return 100 * counts / counts.sum(1, keepdim=True) if counts.sum() else None


def episode_figure(side: Side, own_names: list[str], queries: int = 2) -> tuple[dict, str, str]:
    """The first two episodes of a seed, unselected: the examples are neither better nor worse than the rest."""
    way = min(5, len(own_names))
    rows, images = next(metrics.draw_episodes(side.images.labels, way, 1, queries=queries, episodes=2, seed=1))
    predicted = metrics.classify(side.z, images, 1)
    names = [[own_names[row] for row in episode] for episode in rows.tolist()]
    pictures = side.images.images[images]
    files = figures.draw(lambda figure: figures.episodes(figure, pictures, predicted, names), 4.6, 2.0 * (queries + 1))
    right = int((predicted == torch.arange(way)[:, None]).sum())
    text = (
        f"Two episodes as they were drawn, {way} unseen classes each. Top row: the one picture of a class that the "
        f"network is shown. Below: new pictures of the same class, right (✓) or taken for another (✗); {right} of "
        f"{predicted.numel()} are right."
    )
    return files, f"{way}-way one-shot, two examples", text


def hardest_figure(side: Side, names: list[str], pairs: int = 8) -> tuple[dict, str, str]:
    """Same-class pairs of the lowest similarity, different-class pairs of the highest; each image at most once."""
    chosen = spread(len(side.z), PAIR_IMAGES)
    labels, images = side.images.labels[chosen], side.images.images[chosen]
    similarity = side.z[chosen] @ side.z[chosen].T
    once = torch.triu(torch.ones_like(similarity, dtype=torch.bool), 1)
    same = labels[:, None] == labels
    rows = []
    for title, wanted, order in (
        ("one class, thought different", same, -similarity),
        ("two classes, thought the same", ~same, similarity),
    ):
        scores = order.masked_fill(~(wanted & once), -torch.inf).flatten()
        found: list[tuple[Tensor, Tensor, str]] = []
        used: set[int] = set()
        for place in scores.topk(min(2000, int((wanted & once).sum()))).indices.tolist():
            a, b = divmod(place, len(chosen))
            if len(found) < pairs and not used & {a, b}:
                used |= {a, b}
                label_a, label_b = names[int(labels[a])], names[int(labels[b])]
                text = label_a if label_a == label_b else f"{label_a} / {label_b}"
                found.append((images[a], images[b], f"{text}, {float(similarity[a, b]):.2f}"))
        rows.append((title, found))
    files = figures.draw(lambda figure: figures.hardest(figure, rows), 5.2, 4.4)
    text = (
        "The pairs of unseen classes' test images that the network gets most wrong, with their similarity; each image "
        "once."
    )
    return files, "Hardest pairs", text


# ---------------------------------------------------------------------------------------------------------------- page


def page(report: dict, drawn: dict[str, tuple[dict, str, str]]) -> str:
    """The HTML page, with its style and pictures inside."""
    title = f"{report['data']}, split {report['split']}"
    commit = f", commit {report['commit']}" if report["commit"] else ""
    parts = [
        f"<header><p class=kicker>One-Shot evaluation</p><h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(str(report['checkpoint']) + start_text(report) + commit)}</p>",
        f"<p>{html.escape(threshold_text(report['threshold']).replace(chr(10), ' '))}.</p></header>",
        cards(report),
        section("Pairs and triplets", side_table(report), threshold_table(report)),
    ]
    if report["unseen"] is not None:
        rows = [few_shot_row(report, name) for name in report["unseen"]["few_shot"]]
        few_shot = html_table("Unseen classes, one or five pictures each", ["", "accuracy", "95 %", "chance"], rows)
        parts.append(section("Unseen classes", few_shot, adapted_table(report), class_table(report)))
    parts += ["<main>", *(picture(name, *drawn[name]) for name in drawn), "</main>"]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{html.escape(title)}</title><link rel="icon" href="data:,"><style>{STYLE.read_text()}</style>'
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def cards(report: dict) -> str:
    """The figures one looks for first."""
    side_name = "seen" if report["unseen"] is None else "unseen"
    side = report[side_name]
    if side is None:
        return ""
    found = [
        (f"pairs, {side_name}", side["pair_accuracy"], span(side["ci95"]["pair_accuracy"])),
        (f"triplets, {side_name}", side["triplet_accuracy"], span(side["ci95"]["triplet_accuracy"])),
        (f"AUC, {side_name}", side["auc"], f"EER {side['eer']:.1f} %"),
    ]
    for name in side.get("few_shot", {}):
        setting, accuracy, interval, chance = few_shot_row(report, name)
        if accuracy is not None and name != "all1s":
            found.append((setting, accuracy, f"{interval}, chance {chance:.0f} %"))
    items = (f"<li><span>{name}</span><b>{value:.1f}<i> %</i></b><small>{note}</small>" for name, value, note in found)
    return f"<ul class=cards>{''.join(items)}</ul>"


def span(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"95 %: {interval[0]:.1f} to {interval[1]:.1f}"


def section(title: str, *content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2><div class=tables>{''.join(content)}</div></section>"


def html_table(caption: str, header: list[str], rows: list[list]) -> str:
    """A table whose first column names its rows; floats with one decimal, None as a dash."""

    def text(value: object) -> str:
        return "–" if value is None else f"{value:.1f}" if isinstance(value, float) else html.escape(str(value))

    head = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in header)
    body = "".join(
        f"<tr><th scope=row>{text(row[0])}</th>{''.join(f'<td>{text(value)}</td>' for value in row[1:])}</tr>"
        for row in rows
    )
    return (
        f"<table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def side_table(report: dict) -> str:
    rows = []
    for name in ("seen", "unseen"):
        side = report[name]
        if side is not None:
            accuracies = [
                with_interval(side[figure], side["ci95"][figure]) for figure in ("triplet_accuracy", "pair_accuracy")
            ]
            rows.append([name, *accuracies, side["auc"], side["eer"]])
    adapted = report["unseen"] and report["unseen"]["adapted"]["published"]
    if adapted:
        accuracies = [with_interval(adapted[key], adapted["ci95"][key]) for key in adapted["ci95"]]
        rows.append(["unseen, adapted (published variant)", *accuracies, None, None])
    return html_table(
        "Percent, with 95 % intervals by resampling classes", ["classes", "triplets", "pairs", "AUC", "EER"], rows
    )


def adapted_table(report: dict) -> str:
    """Few-shot accuracy after adaptation to the support images; empty if it was not asked for."""
    support = report["unseen"]["adapted"]["support"]
    return html_table(adapted_text(support), ADAPTED_HEADER, adapted_rows(report)) if support else ""


def threshold_table(report: dict) -> str:
    sides = [name for name in ("seen", "unseen") if report[name] is not None]
    rows = []
    for row in report["thresholds"]:
        value = None if row["value"] is None else f"{row['value']:.3f}"
        rows.append([row["name"], value, *(row[side][ratio] for side in sides for ratio in ("1:1", "1:9"))])
    header = ["threshold", "value", *(f"{side} {ratio}" for side in sides for ratio in ("1:1", "1:9"))]
    return html_table("Pair accuracy where same to different pairs are 1:1 or 1:9", header, rows)


def class_table(report: dict) -> str:
    known = KNOWN_CLASSES.get((report["data"], report["split"]), {})
    rows = []
    for row in report["per_class"]:
        others = ["{:.0f} / {:.0f}".format(*known[row["label"]])] if known else []
        name = f"{row['label']} {row['name'].replace('_', ' ')}"
        rows.append([name, row["triplet_accuracy"], row["pair_accuracy"], *others])
    header = ["class", "triplets", "pairs", *(["published Reptile"] if known else [])]
    return html_table("Unseen classes" + (", beside published triplets / pairs" if known else ""), header, rows)


def picture(name: str, files: dict[str, bytes], title: str, text: str) -> str:
    """A figure that follows the reader's light or dark setting."""
    data = {theme: f"data:image/png;base64,{base64.b64encode(file).decode()}" for theme, file in files.items()}
    return (
        f'<figure id="{name}"><h2>{html.escape(title)}</h2><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{data["dark"]}">'
        f'<img src="{data["light"]}" alt="{html.escape(title + ": " + text)}"></picture>'
        f"<figcaption>{html.escape(text)}</figcaption></figure>"
    )
