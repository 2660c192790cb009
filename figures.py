"""The figures of a report, what each shows and how: curves and maps are drawn with matplotlib, light and dark; pictures
and their classes' names are set as HTML, where any name finds a font and its lines are broken."""

import base64
import html
import io
from collections.abc import Callable
from dataclasses import dataclass, field

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import cli
import metrics
from metrics import Side

MAP_IMAGES = 1000  # images on the map of embeddings, whose cost is quadratic
DRAWN_CLASSES = 25  # classes that a drawing has room to name
NAME_LENGTH = 12  # letters of a name in a drawing
PAIR_IMAGES = 4000  # images among which the hardest pairs are looked for
COMPARISONS = 50_000_000  # of queries with support images, about, from which the confusions are counted
THUMBNAIL = 96  # pixels; larger pictures are scaled down
SEEN, UNSEEN, GOOD, BAD = "#4a7fd6", "#e8833a", "#2e9e6b", "#d8434e"
WIDTH, DOTS_PER_INCH = 3.6, 200  # inches: with letters of 8 points or more, readable on a phone
INKS = {"": ("#ffffff", "#1d2330", "#d9dde5"), "-dark": ("#171b24", "#e3e7ef", "#3a4150")}  # paper, ink, lines
DIFFERENT, SAME = "#8a93a6", GOOD


def draw(paint: Callable[[Figure], None], height: float) -> dict[str, bytes]:
    """PNG files of a figure `height` inches high, by the theme's suffix; `paint` draws on it."""
    files = {}
    for theme, (paper, ink, lines) in INKS.items():
        style = {
            **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), paper),
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "lines.color"), ink),
            **dict.fromkeys(("axes.edgecolor", "grid.color", "legend.edgecolor"), lines),
            **{"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
            **{"axes.titlesize": 9, "legend.framealpha": 0.85, "legend.fontsize": 8, "text.parse_math": False},
        }
        with matplotlib.rc_context(style):
            figure = Figure((WIDTH, height), dpi=DOTS_PER_INCH, layout="constrained")
            paint(figure)
            file = io.BytesIO()
            figure.savefig(file, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})
        files[theme] = file.getvalue()
    return files


@dataclass(frozen=True)
class Picture:
    title: str
    text: str  # what it shows
    files: dict[str, bytes] = field(default_factory=dict)  # of a drawing: PNG by the theme's suffix
    body: str = ""  # HTML, where there are no files
    legend: dict[str, str] = field(default_factory=dict)  # names of classes for which numbers stand in the files

    def html(self, name: str) -> str:
        """The figure as HTML; a drawing follows the reader's light or dark setting."""
        title, text, body = html.escape(self.title), html.escape(self.text), self.body
        if self.files:
            body = (
                f'<picture><source media="(prefers-color-scheme: dark)" srcset="{embedded(self.files["-dark"])}">'
                f'<img src="{embedded(self.files[""])}" alt="{title}: {text}"></picture>'
            )
        if self.legend:
            items = (f"<li value={number}>{caption(name)}</li>" for number, name in self.legend.items())
            body += f"<ol>{''.join(items)}</ol>"
        return f'<figure id="{name}"><h2>{title}</h2>{body}<figcaption>{text}</figcaption></figure>'


def of_report(report: dict, sides: dict[str, Side], names: list[str]) -> dict[str, Picture]:
    """The figures of a report by name; `names` of all classes."""
    if "runs" in sides:
        return {"run": of_run(sides["runs"], names)}
    lines = {row["name"]: row["value"] for row in report["thresholds"] if row["value"] is not None}
    drawn = {"roc": of_roc(sides, report["threshold"]["value"]), "similarity": of_similarities(sides, lines)}
    if "unseen" in sides:
        side = sides["unseen"]
        drawn |= {"map": of_map(side, names), "hardest": of_hardest_pairs(side, names)}
        shares = one_shot_confusion(side)
        if shares is not None:
            drawn["confusion"] = of_confusion(shares, side.labels.unique(), names)
            drawn["episodes"] = of_episodes(side, names)
    return drawn


def spread(n: int, most: int) -> Tensor:
    """At most `most` of n rows, evenly."""
    return torch.arange(n) if n <= most else torch.linspace(0, n - 1, most).long()


def short_names(classes: Tensor, names: list[str]) -> tuple[list[str], dict[str, str]]:
    """What to call classes (C,) in a drawing, and the legend that this needs.

    Their names, if all are short and of letters that matplotlib's font has and sets one after the other (Latin, Greek,
    Cyrillic), else their numbers.
    """
    found = {str(label): names[label] for label in classes.tolist()}
    if all(len(name) <= NAME_LENGTH and max(name, default="") < "\u0530" for name in found.values()):
        return [plain(name) for name in found.values()], {}
    return list(found), found


# --------------------------------------------------------------------------------------------------------------- curves


def of_roc(sides: dict[str, Side], threshold: float) -> Picture:
    """ROC curves of the sides, with a point each at the threshold."""
    errors = {name: metrics.pair_errors(side.z, side.labels, [threshold]) for name, side in sides.items()}

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for name, side in sides.items():
            curve, colour, (accept, reject) = side.curve, SEEN if name == "seen" else UNSEEN, errors[name]
            chosen = spread(len(curve.thresholds), 400)
            x, y = curve.false_accept[chosen].tolist(), (1 - curve.false_reject[chosen]).tolist()
            axes.plot([1, *x, 0], [1, *y, 0], color=colour, lw=1.8, label=f"{name} classes, AUC {curve.auc:.1f} %")
            axes.plot(accept, 1 - reject, "o", color=colour, ms=7, mec="white", mew=1.2)
        axes.plot([0, 1], [0, 1], ":", color=DIFFERENT, lw=1)
        axes.set(xlabel="different-class pairs accepted", ylabel="same-class pairs accepted")
        axes.set(xlim=(0, 1), ylim=(0, 1.005), aspect="equal")
        axes.grid(lw=0.5)
        axes.legend(loc="lower right")

    text = (
        "Share of same-class pairs accepted against share of different-class pairs accepted, over all thresholds. "
        "The dot is the threshold in force."
    )
    return Picture("ROC curve", text, draw(paint, 3.6))


def of_similarities(sides: dict[str, Side], thresholds: dict[str, float]) -> Picture:
    """Densities of pair similarities, with thresholds as lines."""
    counts = [metrics.pair_histogram(side.z, side.labels, 100) for side in sides.values()]
    edges = np.linspace(-1, 1, 101)
    common = sum(kinds / kinds.sum(1, keepdim=True) for kinds in counts).sum(0) > 1e-3
    left = min([float(edges[int(common.int().argmax())]), *thresholds.values()]) - 0.05

    def paint(figure: Figure) -> None:
        every_axes = figure.subplots(len(sides), sharex=True, squeeze=False)[:, 0]
        for axes, name, kinds in zip(every_axes, sides, counts, strict=True):
            for values, colour, label in zip(
                kinds, (DIFFERENT, SAME), ("different classes", "same class"), strict=True
            ):
                density = (values / values.sum()).numpy() / (edges[1] - edges[0])
                axes.stairs(density, edges, fill=True, alpha=0.3, color=colour)
                axes.stairs(density, edges, color=colour, lw=1.2, label=label)
            axes.set(xlim=(left, 1), yticks=[])
            mark_thresholds(axes, thresholds)
            axes.set_title(f"{name} classes", loc="left")
            axes.spines["left"].set_visible(False)
        axes.set(xlabel="similarity (cosine)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)

    text = (
        "Distributions of the similarity of same-class and different-class pairs. Where they overlap no threshold "
        "helps."
    )
    return Picture("Similarities and thresholds", text, draw(paint, 2.2 * len(sides) + 0.3))


def mark_thresholds(axes: Axes, thresholds: dict[str, float]) -> None:
    """Vertical lines above the curves, each with its name at a height of its own, on the side that has more room."""
    peak, middle = axes.get_ylim()[1], sum(axes.get_xlim()) / 2
    step = 0.16 * peak
    box = {"boxstyle": "round,pad=0.1", "fc": matplotlib.rcParams["axes.facecolor"], "ec": "none"}
    for place, (name, value) in enumerate(sorted(thresholds.items(), key=lambda item: -item[1])):
        auto, height = name.startswith("auto"), peak + step * (place + 0.5)
        style = {"color": BAD, "ls": "-"} if auto else {"color": DIFFERENT, "ls": "--"}
        axes.plot([value, value], [0, height], lw=1, **style)
        side, shift = ("right", -4) if value > middle else ("left", 4)  # points
        text = f"{name}: {value:.2f}" if auto else name
        axes.annotate(text, (value, height), (shift, 0), textcoords="offset points", ha=side, va="center", bbox=box)
    axes.set_ylim(0, peak + step * (len(thresholds) + 0.3))


# ------------------------------------------------------------------------------------------------------ map, confusions


def of_map(side: Side, names: list[str]) -> Picture:
    """Where images of the classes lie: points coloured by class, each class's name near the median of its points."""
    every = side.labels.unique()
    among = torch.isin(side.labels, every[spread(len(every), DRAWN_CLASSES)]).nonzero()[:, 0]
    chosen = among[spread(len(among), MAP_IMAGES)]
    places = tsne(side.z[chosen]) if len(chosen) > 3 else side.z[chosen, :2]
    classes = side.labels[chosen].unique()
    points = [places[side.labels[chosen] == label] for label in classes]  # (n, 2) each
    labels, legend = short_names(classes, names)
    room = (places.amax(0) - places.amin(0)) * torch.tensor([0.03 + 0.02 * max(map(len, labels)), 0.07])
    label_places = apart(torch.stack([each.median(0).values for each in points]), room).tolist()
    colours = matplotlib.colormaps["tab20" if len(classes) > 10 else "tab10"]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for row, each in enumerate(points):
            axes.scatter(*each.T.numpy(), s=9, color=colours(row % colours.N), lw=0, alpha=0.8)
        box = {"boxstyle": "round,pad=0.2", "fc": matplotlib.rcParams["axes.facecolor"], "alpha": 0.85}
        for row, (x, y) in enumerate(label_places):
            axes.text(x, y, labels[row], ha="center", va="center", bbox=box | {"ec": colours(row % colours.N)})
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)

    text = (
        f"{len(chosen)} of {len(side.z)} test images, {len(classes)} of {len(every)} unseen classes, by t-SNE: near "
        "means similar, empty space between groups means nothing."
    )
    return Picture("Map of the embeddings", text, draw(paint, 3.4), legend=legend)


def tsne(z: Tensor, perplexity: float = 30.0, steps: int = 400, rate: float = 200.0) -> Tensor:
    """Places (N, 2) of rows `z` (N, D) such that near rows stay near (van der Maaten and Hinton 2008, JMLR 9).

    Exact, quadratic in N; starts from the two principal components, so the same rows give the same map.
    """
    n = len(z)
    distances = torch.cdist(z.double(), z.double()).square()
    low, high = torch.full((n, 1), 1e-6).double(), torch.full((n, 1), 1e6).double()
    for _ in range(60):  # the precision of each row's Gaussian that gives the perplexity, by bisection
        precision = (low * high).sqrt()
        p = torch.softmax((-precision * distances).fill_diagonal_(-torch.inf), 1)
        entropy = -torch.special.xlogy(p, p).sum(1, keepdim=True)
        wide = entropy > np.log(min(perplexity, (n - 1) / 3))
        low, high = torch.where(wide, precision, low), torch.where(wide, high, precision)
    p = ((p + p.T) / (2 * n)).float()
    centred = z - z.mean(0)
    y = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
    y = 1e-4 * y / y.std()
    velocity = torch.zeros_like(y)
    for step in range(steps):
        kernel = 1 / (1 + torch.cdist(y, y).square())
        kernel.fill_diagonal_(0)
        early = 12 if step < steps // 4 else 1  # exaggeration: clusters form first
        force = (early * p - kernel / kernel.sum()) * kernel
        gradient = 4 * (force.sum(1, keepdim=True) * y - force @ y)
        velocity = (0.5 if early > 1 else 0.8) * velocity - rate * gradient
        y = y + velocity
    return y


def apart(places: Tensor, room: Tensor, rounds: int = 50) -> Tensor:
    """Places (C, 2) of labels of the size `room` (2,), moved up and down until none covers another."""
    places = places.clone()
    for _ in range(rounds):
        for a in range(len(places)):
            for b in range(a):
                gap = places[a] - places[b]
                if (gap.abs() < room).all():
                    push = (room[1] - gap[1].abs()) / 2 * (1 if gap[1] >= 0 else -1)
                    places[a, 1] += push
                    places[b, 1] -= push
    return places


def one_shot_confusion(side: Side, episodes: int = 1000) -> Tensor | None:
    """Percent of queries by class and answer (C, C) with one support a class, all classes in each episode.

    Fewer episodes where the classes are many.
    """
    way = len(side.labels.unique())
    counts = torch.zeros(way * way, dtype=torch.float64)
    queries = min(15, 1 + COMPARISONS // way**2)
    episodes = min(episodes, 1 + COMPARISONS // (way**2 * queries))
    for rows, images in metrics.draw_episodes(side.labels, way, 1, queries, episodes):
        answers = rows.gather(1, metrics.classify(side.z, images, 1).flatten(1))
        truth = rows.repeat_interleave(images.shape[2] - 1, 1)
        counts += torch.bincount((truth * way + answers).flatten(), minlength=way * way)
    counts = counts.view(way, way)
    return 100 * counts / counts.sum(1, keepdim=True) if counts.sum() else None


def of_confusion(shares: Tensor, classes: Tensor, names: list[str]) -> Picture:
    """Which of `classes` (C,) are taken for which, `shares` (C, C) as of `one_shot_confusion`."""
    mutual = (shares + shares.T).fill_diagonal_(0).amax(1)
    chosen = mutual.topk(min(DRAWN_CLASSES, len(classes))).indices.sort().values
    labels, legend = short_names(classes[chosen], names)
    shown = shares[chosen][:, chosen].numpy()

    def paint(figure: Figure) -> None:
        axes, light = figure.subplots(), matplotlib.rcParams["axes.facecolor"] == INKS[""][0]
        axes.imshow(shown, cmap="magma_r" if light else "magma", vmin=0)
        axes.set(xticks=range(len(labels)), yticks=range(len(labels)), yticklabels=labels)
        axes.set_xticklabels(labels, rotation=50, ha="right", rotation_mode="anchor")
        axes.set(xlabel="taken for", ylabel="class of the query")
        axes.spines[:].set_visible(False)
        if len(labels) <= 10:
            for (row, column), share in np.ndenumerate(shown):
                colour = "white" if (share > 0.5 * shown.max()) == light else "black"
                axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour)

    text = "Percent of the queries of each class that went to each class, with one support image a class."
    if len(chosen) < len(classes):
        text += f" Shown are the {len(chosen)} of {len(classes)} unseen classes that are confused most."
    return Picture(f"{len(classes)}-way one-shot confusions", text, draw(paint, 3.5), legend=legend)


# ------------------------------------------------------------------------------------------------------------- pictures


def of_episodes(side: Side, names: list[str], queries: int = 2) -> Picture:
    """The first two episodes of a seed, unselected: the examples are neither better nor worse than the rest.

    A column a class: the support on top, queries below, framed by right and wrong.
    """
    way = min(5, len(side.labels.unique()))
    _, images = next(metrics.draw_episodes(side.labels, way, 1, queries=queries, episodes=2, seed=1))
    predicted = metrics.classify(side.z, images, 1)  # (2, way, queries)
    right = int((predicted == torch.arange(way)[:, None]).sum())
    text = (
        f"Two episodes as they were drawn, {way} unseen classes each. Top row: the one picture of a class that the "
        f"network is shown. Below: new pictures of the same class, right (✓) or taken for another (✗); {right} of "
        f"{predicted.numel()} are right."
    )
    body = "".join(board(side, *each, names) for each in zip(images, predicted, strict=True))
    return Picture(f"{way}-way one-shot, two examples", text, body=body)


def of_run(side: Side, names: list[str]) -> Picture:
    """The run of the most errors."""
    wrong = side.accuracies["error"].per_class
    images = torch.arange(len(side.z)).view(len(wrong), -1, 2)[wrong.argmax()]  # (way, 2)
    text = (
        f"Of {len(wrong)} runs the one with the most errors, {wrong.max():.0f} % of its {len(images)} queries. Above: "
        "the one picture of a class that the network is shown. Below: its query, right (✓) or taken for another (✗)."
    )
    own = [name.rpartition("/")[2] for name in names]
    body = board(side, images, metrics.classify(side.z, images[None], 1)[0], own)
    return Picture("A run of Omniglot's one-shot test", text, body=body)


def board(side: Side, episode: Tensor, answers: Tensor, names: list[str], most: int = 10) -> str:
    """An episode of images (way, 1 + queries) as HTML, a column a class: its name and support on top, queries below,
    framed by right and wrong. `answers` (way, queries): the class, 0..way-1, given to each query."""
    own, columns = [names[label] for label in side.labels[episode[:, 0]].tolist()], []
    for place, (support, *queries) in enumerate(episode.tolist()):
        column = [f"<th>{caption(own[place])}</th>", f"<td>{thumbnail(side.images.pixels(support), own[place])}</td>"]
        for image, answer in zip(queries, answers[place].tolist(), strict=True):
            kind, mark = ("right", "✓") if answer == place else ("wrong", f"✗ {caption(own[answer])}")
            column.append(f"<td>{thumbnail(side.images.pixels(image), own[place], kind)}<small>{mark}</small></td>")
        columns.append(column)
    body = ""
    for first in range(0, len(columns), most):
        lines = map("".join, zip(*columns[first : first + most], strict=True))
        body += f"<table class=board>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
    return body


def of_hardest_pairs(side: Side, names: list[str], pairs: int = 8) -> Picture:
    """Same-class pairs of the lowest similarity, different-class pairs of the highest; each image once at most in each
    list."""
    chosen = spread(len(side.z), PAIR_IMAGES)
    labels, images = side.labels[chosen], side.images.pixels(chosen)
    similarity, same = side.z[chosen] @ side.z[chosen].T, labels[:, None] == labels
    body = ""
    for title, wanted, order in (
        ("least similar, of one class", same, -similarity),
        ("most similar, of two classes", ~same, similarity),
    ):
        scores, items = order.masked_fill(~wanted.triu(1), -torch.inf), ""
        for _ in range(pairs):
            a, b = divmod(int(scores.argmax()), len(chosen))
            if scores[a, b] == -torch.inf:
                break
            text = " / ".join(caption(names[label]) for label in dict.fromkeys((int(labels[a]), int(labels[b]))))
            shown = thumbnail(images[a], names[labels[a]]) + thumbnail(images[b], names[labels[b]])
            items += f"<li>{shown}<small>{text} <b>{float(similarity[a, b]):.2f}</b></small></li>"
            scores[[a, b]] = scores[:, [a, b]] = -torch.inf
        body += f"<h3>{title}</h3><ul class=pairs>{items}</ul>"
    text = (
        f"Pairs among {len(chosen)} of {len(side.z)} test images of unseen classes, with their similarity; each image "
        "once in a list."
    )
    return Picture("Hardest pairs", text, body=body)


def caption(name: str) -> str:
    """A class's name as HTML; it may run from right to left."""
    return f"<bdi>{html.escape(plain(name))}</bdi>"


def thumbnail(image: Tensor, name: str, kind: str = "") -> str:
    """An image (3, H, W) uint8 of the class `name` as HTML."""
    picture, file = Image.fromarray(image.permute(1, 2, 0).numpy()), io.BytesIO()
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(file, "PNG")
    return f'<img class="{kind}" src="{embedded(file.getvalue())}" alt="{html.escape(plain(name))}">'


def plain(name: str) -> str:
    """A class's name as a reader sees it."""
    return cli.printable(name.replace("_", " "))


def embedded(file: bytes) -> str:
    """A PNG file as an address."""
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"
