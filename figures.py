"""The figures of a report: what each shows (`of_report`), and how it is drawn with matplotlib, light and dark."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

import metrics
from metrics import Side

MAP_IMAGES = 1000  # images on the map of embeddings, whose cost is quadratic
BARS = 40  # classes with a bar of their own
PAIR_IMAGES = 4000  # images among which the hardest pairs are looked for
SEEN, UNSEEN, GOOD, BAD = "#4a7fd6", "#e8833a", "#2e9e6b", "#d8434e"
DOTS_PER_INCH = 140
INKS = {"light": ("#ffffff", "#1d2330", "#d9dde5"), "dark": ("#171b24", "#e3e7ef", "#3a4150")}  # paper, ink, lines
DIFFERENT, SAME = "#8a93a6", GOOD


def draw(paint: Callable[[Figure], None], width: float, height: float) -> dict[str, bytes]:
    """PNG files of a figure of `width` x `height` inches, by theme; `paint` draws on it."""
    files = {}
    for theme, (paper, ink, lines) in INKS.items():
        style = {
            **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), paper),
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "lines.color"), ink),
            **dict.fromkeys(("axes.edgecolor", "grid.color", "legend.edgecolor"), lines),
            **{"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
            **{"axes.titlesize": 9.5, "legend.framealpha": 0.85, "legend.fontsize": 8},
        }
        with matplotlib.rc_context(style):
            figure = Figure((width, height), dpi=DOTS_PER_INCH, layout="constrained")
            paint(figure)
            file = io.BytesIO()
            figure.savefig(file, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})
        files[theme] = file.getvalue()
    return files


@dataclass(frozen=True)
class Picture:
    files: dict[str, bytes]  # PNG by theme
    title: str
    text: str  # what it shows


# ------------------------------------------------------------------------------------------------------ what is shown


def of_report(
    report: dict, sides: dict[str, Side], names: list[str], known: dict[int, tuple[float, float]]
) -> dict[str, Picture]:
    """The figures of a report by name; `names` of all classes, `known`: published triplets and pairs by label."""
    threshold = report["threshold"]["value"]
    points, counts = {}, {}
    for name, side in sides.items():
        accept, reject = metrics.pair_errors(side.z, side.labels, [threshold])
        points[name] = (float(accept), 1 - float(reject))
        counts[name] = metrics.pair_histogram(side.z, side.labels, 100)
    lines = {row["name"]: row["value"] for row in report["thresholds"] if row["value"] is not None}
    curves = {name: side.curve for name, side in sides.items()}
    drawn = {
        "roc": Picture(
            draw(lambda figure: roc(figure, curves, points), 4.6, 4.4),
            "ROC curve",
            "Share of same-class pairs accepted against share of different-class pairs accepted, over all thresholds. "
            "The dot is the threshold in force.",
        ),
        "similarity": Picture(
            draw(lambda figure: histogram(figure, counts, lines), 5.2, 2.6 * len(counts) + 0.3),
            "Similarities and thresholds",
            "Distributions of the similarity of same-class and different-class pairs. Where they overlap no threshold "
            "helps.",
        ),
    }
    if "unseen" in sides:
        drawn |= of_unseen(report["per_class"], sides["unseen"], names, known)
    return drawn


def of_unseen(
    per_class: list[dict], side: Side, names: list[str], known: dict[int, tuple[float, float]]
) -> dict[str, Picture]:
    """The figures about unseen classes."""
    rows = sorted(per_class, key=lambda row: row["pair_accuracy"])[:BARS]
    rows = sorted(rows, key=lambda row: row["label"])
    classes = side.labels.unique()
    own_names = [names[label] for label in classes.tolist()]
    chosen = spread(len(side.z), MAP_IMAGES)
    index = torch.searchsorted(classes, side.labels)
    places = tsne(side.z[chosen]) if len(chosen) > 3 else side.z[chosen, :2]
    drawn = {
        "classes": Picture(
            draw(lambda figure: class_bars(figure, rows, known, 50), 5.2, 1 + 0.36 * len(rows)),
            "Class by class",
            "Triplet and pair accuracy of each unseen class"
            + (f", the {BARS} hardest" if len(per_class) > BARS else "")
            + (", with the published figures of Reptile as diamonds." if known else "."),
        ),
        "map": Picture(
            draw(lambda figure: embedding_map(figure, places, index[chosen], own_names), 5.2, 4.6),
            "Map of the embeddings",
            f"Test images of the unseen classes ({len(chosen)} of {len(side.z)}) by t-SNE: near means similar, empty "
            "space between groups means nothing.",
        ),
        "hardest": of_hardest_pairs(side, names),
    }
    shares = one_shot_confusion(side)
    if shares is not None:
        size = min(4.4 + 0.1 * len(classes), 9)
        drawn["confusion"] = Picture(
            draw(lambda figure: confusion(figure, shares, own_names), size, size - 0.4),
            f"{len(classes)}-way one-shot confusions",
            "Percent of the queries of each class that went to each class, with one support image a class.",
        )
        drawn["episodes"] = of_episodes(side, own_names)
    return drawn


def spread(n: int, most: int) -> Tensor:
    """At most `most` of n rows, evenly."""
    return torch.arange(n) if n <= most else torch.linspace(0, n - 1, most).long()


def one_shot_confusion(side: Side, episodes: int = 1000) -> Tensor | None:
    """Percent of queries by class and answer (C, C) with one support a class, all classes in each episode."""
    labels = side.labels
    way = len(labels.unique())
    counts = torch.zeros(way * way, dtype=torch.float64)
    for rows, images in metrics.draw_episodes(labels, way, 1, episodes=episodes):
        answers = rows.gather(1, metrics.classify(side.z, images, 1).flatten(1))
        truth = rows.repeat_interleave(images.shape[2] - 1, 1)
        counts += torch.bincount((truth * way + answers).flatten(), minlength=way * way)
    counts = counts.view(way, way)
    return 100 * counts / counts.sum(1, keepdim=True) if counts.sum() else None


def of_episodes(side: Side, own_names: list[str], queries: int = 2) -> Picture:
    """The first two episodes of a seed, unselected: the examples are neither better nor worse than the rest."""
    way = min(5, len(own_names))
    rows, images = next(metrics.draw_episodes(side.labels, way, 1, queries=queries, episodes=2, seed=1))
    predicted = metrics.classify(side.z, images, 1)
    names = [[own_names[row] for row in episode] for episode in rows.tolist()]
    pictures = side.images[images]
    files = draw(lambda figure: episodes(figure, pictures, predicted, names), 4.6, 2.0 * (queries + 1))
    right = int((predicted == torch.arange(way)[:, None]).sum())
    text = (
        f"Two episodes as they were drawn, {way} unseen classes each. Top row: the one picture of a class that the "
        f"network is shown. Below: new pictures of the same class, right (✓) or taken for another (✗); {right} of "
        f"{predicted.numel()} are right."
    )
    return Picture(files, f"{way}-way one-shot, two examples", text)


def of_hardest_pairs(side: Side, names: list[str], pairs: int = 8) -> Picture:
    """Same-class pairs of the lowest similarity, different-class pairs of the highest; each image at most once."""
    chosen = spread(len(side.z), PAIR_IMAGES)
    labels, images = side.labels[chosen], side.images[chosen]
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
    files = draw(lambda figure: hardest(figure, rows), 5.2, 4.4)
    text = (
        "The pairs of unseen classes' test images that the network gets most wrong, with their similarity; each image "
        "once."
    )
    return Picture(files, "Hardest pairs", text)


# --------------------------------------------------------------------------------------------------------------- curves


def roc(figure: Figure, curves: dict[str, metrics.Roc], points: dict[str, tuple[float, float]]) -> None:
    """ROC curves of the sides, with a point each: (false accepts, true accepts), shares 0..1, at the threshold."""
    axes = figure.subplots()
    for (name, curve), colour in zip(curves.items(), (SEEN, UNSEEN), strict=False):
        chosen = torch.linspace(0, len(curve.thresholds) - 1, min(400, len(curve.thresholds))).long()
        x, y = curve.false_accept[chosen].tolist(), (1 - curve.false_reject[chosen]).tolist()
        axes.plot([1, *x, 0], [1, *y, 0], color=colour, lw=1.8, label=f"{name} classes, AUC {curve.auc:.1f} %")
        axes.plot(*points[name], "o", color=colour, ms=7, mec="white", mew=1.2)
    axes.plot([0, 1], [0, 1], ":", color=DIFFERENT, lw=1)
    axes.set(xlabel="different-class pairs accepted", ylabel="same-class pairs accepted", xlim=(0, 1), ylim=(0, 1.005))
    axes.set_aspect("equal")
    axes.grid(lw=0.5)
    axes.legend(loc="lower right")


def histogram(figure: Figure, counts: dict[str, Tensor], thresholds: dict[str, float]) -> None:
    """Densities of pair similarities, `counts` by side as of `metrics.pair_histogram`, with thresholds as lines."""
    every_axes = np.atleast_1d(figure.subplots(len(counts), sharex=True))
    edges = np.linspace(-1, 1, next(iter(counts.values())).shape[1] + 1)
    common = sum(kinds / kinds.sum(1, keepdim=True) for kinds in counts.values()).sum(0) > 1e-3
    left = max(-1.0, float(edges[int(common.int().argmax())]) - 0.05)
    for axes, (name, kinds) in zip(every_axes, counts.items(), strict=True):
        for values, colour, label in zip(kinds, (DIFFERENT, SAME), ("different classes", "same class"), strict=True):
            density = (values / values.sum()).numpy() / (edges[1] - edges[0])
            axes.stairs(density, edges, fill=True, alpha=0.3, color=colour)
            axes.stairs(density, edges, color=colour, lw=1.2, label=label)
        mark_thresholds(axes, thresholds)
        axes.set_title(f"{name} classes", loc="left")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    axes.set(xlabel="similarity (cosine)", xlim=(left, 1))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)


def mark_thresholds(axes: Axes, thresholds: dict[str, float]) -> None:
    """Vertical lines above the curves, each with its name at a height of its own."""
    peak = axes.get_ylim()[1]
    step = 0.12 * peak
    box = {"boxstyle": "round,pad=0.1", "fc": matplotlib.rcParams["axes.facecolor"], "ec": "none"}
    for place, (name, value) in enumerate(sorted(thresholds.items(), key=lambda item: -item[1])):
        auto, height = name.startswith("auto"), peak + step * (place + 0.5)
        style = {"color": BAD, "ls": "-"} if auto else {"color": DIFFERENT, "ls": "--"}
        axes.plot([value, value], [0, height], lw=1, **style)
        side = {"ha": "right", "x": value - 0.012} if value > 0.3 else {"ha": "left", "x": value + 0.012}
        text = f"{name}: {value:.2f}" if auto else name
        axes.text(y=height, s=text, va="center", fontsize=7.5, bbox=box, zorder=3, **side)
    axes.set_ylim(0, peak + step * (len(thresholds) + 0.3))


def class_bars(figure: Figure, rows: list[dict], published: dict[int, tuple[float, float]], constant: float) -> None:
    """Triplet and pair accuracy of each unseen class; `published`: the same of others, by label."""
    axes = figure.subplots()
    places = np.arange(len(rows))
    for offset, key, column, colour, text in (
        (-0.2, "triplet_accuracy", 0, SEEN, "triplets"),
        (0.2, "pair_accuracy", 1, UNSEEN, "pairs"),
    ):
        values = [row[key] for row in rows]
        axes.barh(places + offset, values, 0.36, color=colour, label=text)
        marks = [
            (published[row["label"]][column], place) for place, row in enumerate(rows) if row["label"] in published
        ]
        if marks:
            x, y = np.array(marks).T
            axes.plot(x, y + offset, "D", color=colour, mec="white", mew=1, ms=5.5, label=f"{text}, published Reptile")
    axes.axvline(constant, color=DIFFERENT, ls=":", lw=1)
    axes.set(yticks=places, yticklabels=[row["name"].replace("_", " ") for row in rows], xlim=(40, 100))
    axes.set(xlabel="accuracy in percent (dotted: chance)", ylim=(len(rows) - 0.4, -0.6))
    axes.grid(axis="x", lw=0.5)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)


def confusion(figure: Figure, shares: Tensor, names: list[str]) -> None:
    """Percent of the queries of each class (rows) that went to each class (columns), (C, C)."""
    axes = figure.subplots()
    axes.imshow(
        shares.numpy(), cmap="magma_r" if matplotlib.rcParams["text.color"] == INKS["light"][1] else "magma", vmin=0
    )
    names = [name.replace("_", " ") for name in names]
    axes.set(xticks=range(len(names)), yticks=range(len(names)), yticklabels=names)
    axes.set_xticklabels(names, rotation=50, ha="right", rotation_mode="anchor")
    axes.set(xlabel="taken for", ylabel="class of the query")
    axes.spines[:].set_visible(False)
    if len(names) > 15:
        return
    dark_is_high = matplotlib.rcParams["text.color"] == INKS["light"][1]
    for (row, column), share in np.ndenumerate(shares.numpy()):
        colour = "white" if (share > 0.5 * float(shares.max())) == dark_is_high else "black"
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7.5, color=colour)


# ------------------------------------------------------------------------------------------------------------------ map


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
        low, high = (
            torch.where(entropy > np.log(min(perplexity, (n - 1) / 3)), precision, low),
            torch.where(entropy > np.log(min(perplexity, (n - 1) / 3)), high, precision),
        )
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


def embedding_map(figure: Figure, places: Tensor, index: Tensor, names: list[str]) -> None:
    """Points (N, 2) coloured by class (N,), each class's name near the median of its points."""
    axes = figure.subplots()
    colours = matplotlib.colormaps["tab20" if len(names) > 10 else "tab10"]
    for row in range(len(names)):
        axes.scatter(*places[index == row].T.numpy(), s=9, color=colours(row % colours.N), lw=0, alpha=0.8)
    medians = torch.stack([places[index == row].median(0).values for row in range(len(names))])
    paper = matplotlib.rcParams["axes.facecolor"]
    for row, (x, y) in enumerate(apart(medians, places.amax(0) - places.amin(0)).tolist() if len(names) <= 25 else []):
        box = {"boxstyle": "round,pad=0.2", "fc": paper, "ec": colours(row % colours.N), "alpha": 0.85}
        axes.text(x, y, names[row].replace("_", " "), ha="center", va="center", fontsize=8, bbox=box)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def apart(places: Tensor, extent: Tensor, rounds: int = 50) -> Tensor:
    """Places (C, 2) of labels, moved up and down until none covers another, on a map of `extent` (2,)."""
    places, room = places.clone(), extent * torch.tensor([0.16, 0.055])
    for _ in range(rounds):
        for a in range(len(places)):
            for b in range(a):
                gap = places[a] - places[b]
                if (gap.abs() < room).all():
                    push = (room[1] - gap[1].abs()) / 2 * (1 if gap[1] >= 0 else -1)
                    places[a, 1] += push
                    places[b, 1] -= push
    return places


# ------------------------------------------------------------------------------------------------------------- pictures


def thumbnail(axes: Axes, image: Tensor, x: float, y: float, frame: str | None = None) -> None:
    """An image (3, H, W) uint8 on the unit square whose upper left corner is (x, y), y pointing down."""
    axes.imshow(image.permute(1, 2, 0).numpy(), extent=(x, x + 1, y + 1, y), interpolation="nearest")
    if frame:
        axes.add_patch(Rectangle((x, y), 1, 1, fill=False, ec=frame, lw=2.2))


def board(axes: Axes, width: float, height: float) -> None:
    """Axes without a frame on which x runs to `width` and y down to `height`."""
    axes.set(xlim=(-0.05, width), ylim=(height, 0))
    axes.set_aspect("equal")
    axes.axis("off")


def episodes(figure: Figure, images: Tensor, predicted: Tensor, names: list[list[str]]) -> None:
    """Examples of one-shot episodes: a column a class, the support on top, queries below, framed by right and wrong.

    `images` (E, way, 1 + queries, 3, H, W) uint8, `predicted` (E, way, queries), `names` of each episode's classes.
    """
    _, way, pictures = images.shape[:3]
    step = 1.36  # below a query there is room for the class it was taken for
    for axes, episode, guess, own in zip(
        np.atleast_1d(figure.subplots(len(images))), images, predicted, names, strict=True
    ):
        own = [name.replace("_", " ") for name in own]
        for column in range(way):
            x = 1.15 * column
            axes.text(x + 0.5, 0.3, own[column], ha="center", va="bottom", fontsize=8, weight="bold")
            thumbnail(axes, episode[column, 0], x, 0.38)
            for query in range(pictures - 1):
                y, choice = 1.6 + step * query, int(guess[column, query])
                right = choice == column
                thumbnail(axes, episode[column, 1 + query], x, y, GOOD if right else BAD)
                text = "✓" if right else f"✗ {own[choice]}"
                axes.text(x + 0.5, y + 1.05, text, ha="center", va="top", fontsize=7.5, color=GOOD if right else BAD)
        board(axes, 1.15 * way, 1.6 + step * (pictures - 1))


def hardest(figure: Figure, rows: list[tuple[str, list[tuple[Tensor, Tensor, str]]]]) -> None:
    """Rows of pairs: a title, and for each pair two images (3, H, W) and a text."""
    for axes, (title, pairs) in zip(np.atleast_1d(figure.subplots(len(rows))), rows, strict=True):
        axes.set_title(title, loc="left")
        for place, (first, second, text) in enumerate(pairs):
            x, y = 2.3 * (place % 4), 1.75 * (place // 4)
            thumbnail(axes, first, x, y)
            thumbnail(axes, second, x + 1.03, y)
            axes.text(x + 1, y + 1.06, text.replace("_", " "), ha="center", va="top", fontsize=7.5)
        board(axes, 9.1, 1.75 * ((len(pairs) + 3) // 4))
