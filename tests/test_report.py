"""The report page in a real browser, and the figures' content."""

import html
import itertools
import os
import re
import warnings
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from torch.nn.functional import normalize

import adapt
import browser
import cli
import evaluate
import figures
import metrics
import report
from sources import Images

needs_browser = pytest.mark.skipif(
    browser.chromium() is None and os.environ.get("CI") != "true", reason="no Chromium here; required where CI=true"
)


NAMES = ["short", "a_rather_long_<class>_name,_$x^2$_and_$", "東京タワーの夜景", "한국어", "שלום עולם", "bad\udcffbyte"]
NAMES += ["Rindfleischetikettierungsüberwachungsaufgabenübertragungsgesetz", "\u202eevil"]


def sides(unseen_classes):
    """Seen and unseen test images around class centres, measured at a threshold of 0.5; all class names."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, first, classes in (("seen", 0, 6), ("unseen", 6, unseen_classes)):
        labels = first + torch.arange(classes).repeat_interleave(10)
        x = torch.randn(len(labels), 16, generator=generator)
        z = normalize(x + 1.5 * torch.randn(classes, 16, generator=generator)[labels - first])
        pixels = torch.randint(0, 256, (len(labels), 3, 16, 16), generator=generator, dtype=torch.uint8)
        shots = (z, labels) if name == "unseen" else None
        if classes:
            found[name] = metrics.measure(Images(pixels, labels), z, 0.5, shots)
    return found, [f"seen {label}" for label in range(6)] + [f"{NAMES[i % 8]} {i}" for i in range(unseen_classes)]


def make(unseen_classes):
    """What `report.write` takes."""
    measured, names = sides(unseen_classes)
    threshold = {"mode": "auto", "criterion": "balanced", "value": 0.5, "false_accept": 12.0, "false_reject": 9.0}
    threshold |= {"logistic": [9.0, -4.0], "calibrated_on": "60 held-back training images of 6 seen classes"}
    facts = {"checkpoint": "runs/" + "x" * 80 + "/best.pt", "commit": "0123456789ab", "data": "own", "split": "60-40"}
    facts |= {"network": {"backbone": "resnet20", "width": 8, "size": 16, "parameters": 70_000}, "date": "2026-01-31"}
    facts["training"] = {"step": 300, "images": 76800, "seconds": 630.0, "threads": 2, "options": {}}
    facts["notes"] = ["seen: 60 images", "2 <copies>"]
    thresholds = {"auto balanced": 0.5, "auto eer": 0.52, "auto far:0.00001": 1.0, "fixed 0.2": 0.2, "fixed -1.0": -1.0}
    made = evaluate.make_report(facts, threshold, thresholds, measured, names)
    if unseen_classes:
        ci95 = {"triplet_accuracy": (70.5, 79.5), "pair_accuracy": (60.5, 69.5)}
        published = {"triplet_accuracy": 75.25, "pair_accuracy": 65.0, "ci95": ci95}
        few_shot = {"5w1s": adapt.gain(torch.tensor([40.0, 50]), torch.tensor([42.0, 54])), "10w1s": None}
        support = {"steps": 4, "lr": 3e-4, "episodes": 2, "few_shot": few_shot}
        made["unseen"]["adapted"] = {"support": support, "published": published}
    return made, measured, names


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("unseen_classes", [8, 0])
def test_the_page_in_a_browser(tmp_path, unseen_classes):
    """Nothing overflows at two widths, in light and dark; images load and are described; no errors, no network."""
    assert browser.look(report.write(tmp_path, [make(unseen_classes)])) == []


@pytest.mark.slow
@needs_browser
def test_several_checkpoints_have_one_page(tmp_path):
    """It has the facts of all, what the second has more than the first, and a link to the page of each."""
    evaluated = [make(8), make(8), make(0)]
    measured = evaluated[0][1]
    evaluated[1][0]["compared_with"] = {"checkpoint": "first.pt"} | report.compare(measured, measured)
    page = report.write(tmp_path, evaluated)
    text = page.read_text()
    assert page == tmp_path / "index.html" and "3 checkpoints" in text and "best.pt minus first.pt" in text
    assert re.findall('href="(\\d/index.html)"', text) == [f"{number}/index.html" for number in (1, 2, 3)]
    assert all((tmp_path / str(number) / "index.html").exists() for number in (1, 2, 3))
    assert text.count("trained for 300 steps") == text.count("seen: 60 images") == 3
    assert browser.look(page) == []


@pytest.mark.slow
@needs_browser
def test_the_browser_sees_faults(tmp_path):
    (tmp_path / "bad.html").write_text(
        '<!doctype html><body style="background: #eee"><img src="missing.png"><p style="width: 2000px">wide</p>'
        '<p style="color: #ccc">pale</p><img src="http://localhost:9/x.png" alt="x"><script>console.error(1)</script>'
    )
    found = "\n".join(browser.look(tmp_path / "bad.html", (390,), ("light",)))
    for text in ("the page is 2", "sticks out", "no alt text", "does not load", "P pale has little contrast"):
        assert text in found
    assert "an error on the console" in found and "asks the network for http://localhost:9/x.png" in found


@pytest.mark.slow
def test_files_and_figures(tmp_path):
    made, measured, names = make(8)
    page = report.write(tmp_path, [(made, measured, names)])
    text = page.read_text(encoding="utf-8")
    drawings, all_figures = {"roc", "similarity", "map", "confusion"}, re.findall(r'<figure id="(\w+)">', text)
    expected = {f"{name}{theme}.png" for name in drawings for theme in ("", "-dark")} | {"index.html"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert all_figures == ["roc", "similarity", "map", "hardest", "confusion", "episodes"]
    for name in drawings:
        light, dark = (Image.open(tmp_path / f"{name}{theme}.png").convert("RGB") for theme in ("", "-dark"))
        assert light.size == dark.size and light.getpixel((0, 0)) == (255, 255, 255) != dark.getpixel((0, 0))
    assert not re.search(r"<class>|https?:|src=\"(?!data:)", text) and "a rather long &lt;class&gt; name, $x^2$" in text
    assert "seen: 60 images" in text and "2 &lt;copies&gt;" in text
    for label, name in enumerate(names[6:], 6):
        shown = html.escape(cli.printable(name.replace("_", " ")))
        assert text.count(f"<li value={label}><bdi>{shown}</bdi>") == 2  # the legends of map and confusions
        assert f"<th scope=row><bdi>{label} {shown}</bdi>" in text
    assert "unseen, adapted (published variant)" in text and "65.0 (60.5..69.5)" in text
    assert "4 steps (learning rate 0.0003) of the last block" in text and "+3.00" in text and "+1.61..+4.39" in text
    for fact in ("resnet20, width 8, 0.07 M", "300 steps, 76800 images, 10.5 minutes", "commit 0123456789ab"):
        assert fact in text
    assert "evaluated on 2026-01-31" in text
    unseen = made["unseen"]
    for value in (unseen["pair_accuracy"], unseen["auc"], unseen["few_shot"]["5w1s"]["accuracy"]):
        assert f"{value:.1f}" in text
    assert len(report.write(tmp_path / "new", [make(0)]).read_text()) < len(text)


@pytest.mark.slow
@pytest.mark.parametrize("unseen_classes", [2, 8, 162])
def test_drawings_can_be_read(monkeypatch, tmp_path, unseen_classes):
    """Without warnings; at 350 pixels of width no letter is smaller than 10 pixels; texts are apart, and inside."""
    drawn, draw = [], Text.draw
    monkeypatch.setattr(Text, "draw", lambda text, *more: (draw(text, *more), drawn.append(text)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = report.write(tmp_path, [make(unseen_classes)])
    texts = [text for text in dict.fromkeys(drawn) if text.get_text()]
    assert len(texts) > 100 and all(max(text.get_text().replace("−", "-")) < "\u0530" for text in texts)
    boxes = []
    for text in texts:
        name, box, figure = text.get_text(), text.get_window_extent(), text.get_figure()
        assert text.get_fontsize() * 350 / (72 * figure.get_figwidth()) >= 10
        whole = text.axes.bbox if name.startswith(("auto", "fixed")) else figure.bbox
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1, name
        boxes += [(figure, name, box)] if text.get_rotation() in (0, 90) else []
    for (figure, name, a), (same, other, b) in itertools.combinations(boxes, 2):
        wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert figure != same or wide <= 1 or high <= 1, (name, other)
    if unseen_classes == 162:
        text = page.read_text()
        assert "the 40 of 162 with the lowest pair accuracy" in text
        parts = ("25 of 162 unseen classes.*?</figcaption>", "<li value=", "<td class=bar")
        assert [len(re.findall(part, text)) for part in parts] == [2, 50, 80]


def test_a_class_may_have_no_image_on_the_map(monkeypatch):
    monkeypatch.setattr(figures, "MAP_IMAGES", 3)
    labels, pixels = torch.tensor([0, 1, 1, 0, 1, 1, 0]), torch.zeros(7, 3, 4, 4, dtype=torch.uint8)
    side = metrics.measure(Images(pixels, labels), normalize(torch.randn(7, 4, generator=torch.manual_seed(0))), 0.5)
    assert "3 of 7 test images, 1 of 2 unseen classes" in figures.of_map(side, ["a", "b"]).text


def test_names_are_drawn_where_they_fit():
    classes = torch.tensor([3, 5])
    assert figures.short_names(classes, list("abcdef")) == (["d", "f"], {})
    assert figures.short_names(classes, ["", "", "", "maple_tree", "", "Ёжик"]) == (["maple tree", "Ёжик"], {})
    for name in NAMES[1:]:
        names = ["", "", "", "plain", "", name]
        assert figures.short_names(classes, names) == (["3", "5"], {"3": "plain", "5": name})


def test_without_pairs_there_is_still_a_page(tmp_path):
    """Two unseen classes of one image each have no pair of one class."""
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert metrics.measure(Images(pixels, torch.tensor([0, 1])), torch.eye(2), 0.5) is None
    measured, names = sides(0)
    facts = {"checkpoint": "a.pt", "commit": None, "data": "own", "split": "60-40", "training": None, "notes": []}
    facts |= {"network": {"backbone": "resnet18", "size": 64, "parameters": 11_000_000}, "date": "2026-01-31"}
    threshold = {"mode": "fixed", "value": 0.5, "criterion": None}
    made = evaluate.make_report(facts, threshold, {}, measured, names)
    assert report.write(tmp_path, [(made, measured, names)]).exists()


def test_confusions_by_hand():
    """Classes on the axes of space: no confusion. Two classes at one place: each query is a coin's toss."""
    labels = torch.arange(3).repeat_interleave(20)
    pixels = torch.zeros(60, 3, 4, 4, dtype=torch.uint8)
    side = metrics.measure(Images(pixels, labels), torch.eye(3)[labels], 0.5)
    assert torch.equal(figures.one_shot_confusion(side, 10), 100 * torch.eye(3, dtype=torch.float64))
    z = torch.eye(3)[torch.tensor([0, 0, 2])[labels]]
    shares = figures.one_shot_confusion(metrics.measure(Images(pixels, labels), z, 0.5))
    assert shares[2].tolist() == [0, 0, 100]  # rows are the truth: ties go to whichever class an episode lists first
    assert shares[:2, :2].flatten().tolist() == pytest.approx([50] * 4, abs=5) and (shares[:2, 2] == 0).all()


def test_the_map_keeps_clusters_apart():
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(4).repeat_interleave(30)
    z = normalize(torch.randn(120, 8, generator=generator) + 4 * torch.randn(4, 8, generator=generator)[index])
    places = figures.tsne(z, perplexity=15)
    assert places.shape == (120, 2) and places.isfinite().all()
    distances = torch.cdist(places, places).fill_diagonal_(torch.inf)
    assert (index[distances.argmin(1)] == index).float().mean() > 0.95
    assert torch.equal(places, figures.tsne(z, perplexity=15))


@pytest.fixture(scope="module")
def made():
    """A report with figures that are all different, its sides and names."""
    return make(8)


def by_name(table):
    """Rows of a table, as dicts from its header, by name."""
    return {row[0]: dict(zip(table.header[1:], row[1:], strict=True)) for row in table.rows}


def test_columns_of_the_tables_hold_what_their_header_says(made):
    found, measured, _ = made
    for name, row in by_name(report.side_table(found)).items():
        side = found[name] if name in found else found["unseen"]["adapted"]["published"]
        for column, figure in (("triplets", "triplet_accuracy"), ("pairs", "pair_accuracy")):
            assert row[column].startswith(f"{side[figure]:.1f} ({side['ci95'][figure][0]:.1f}..")
        for column, figure in (("pairs, best threshold", "pair_accuracy_oracle"), ("AUC", "auc"), ("EER", "eer")):
            assert row[column] == side.get(figure)
    for row in found["thresholds"]:
        cells = by_name(report.threshold_table(found))[row["name"]]
        for side in ("seen", "unseen"):
            assert [cells[f"{side} {of}"] for of in ("1:1", "1:9")] == [row[side][of] for of in ("1:1", "1:9")]
            assert cells[f"{side} false accept"] == row[side].get("false_accept")
    assert list(report.threshold_table(found).header)[2:4] == ["seen 1:1", "seen 1:9"]
    for label, row in zip(range(6, 14), report.class_table(found).rows, strict=True):
        cells = dict(zip(report.class_table(found).header, row, strict=True))
        assert cells["class"].startswith(f"{label} ")
        for column, figure in (("triplets", "triplet_accuracy"), ("pairs", "pair_accuracy")):
            assert cells[column] == float(measured["unseen"].accuracies[figure].per_class[label - 6])
    rows = by_name(report.few_shot_table(found))
    assert [rows[f"{way} 1-shot"]["chance"] for way in ("5-way", "10-way", "all 8,")] == [20, 10, 12.5]
    row = by_name(report.adapted_table(found))["5-way 1-shot"]
    assert (row["zero steps"][:4], row["adapted"][:4]) == ("45.0", "48.0")


def test_columns_of_the_open_set_table():
    values = {"auroc": 90.0, "right@0.01": 1.0, "right@0.1": 10.0, "named@0.05": 5.0, "named@0.1": 11.0}
    row = {"enrolled": "seen", "classes": 6, "pictures": 1} | {name: (value, None) for name, value in values.items()}
    (cells,) = by_name(report.open_set_table({"open_set": [row]})).values()
    assert cells == {
        "AUROC": "90.0",
        "right, 1 %": "1.0",
        "right, 10 %": "10.0",
        "named, 5 %": "5.0",
        "named, 10 %": "11.0",
    }


def test_the_worst_classes_are_listed(monkeypatch, made):
    """Those without a pair come last."""
    monkeypatch.setattr(report, "LISTED", 3)
    accuracies = 9, 1, 8, 2, 7, 3, 6, torch.nan
    found = [row | {"pair_accuracy": each} for row, each in zip(made[0]["per_class"], accuracies, strict=True)]
    table = report.class_table(made[0] | {"per_class": found})
    assert [row[2] for row in table.rows] == [1, 2, 3]


def test_figures_stand_beside_published_ones_in_the_same_columns(made):
    few_shot = made[0]["unseen"]["few_shot"] | {"10w1s": {"accuracy": 33.0, "ci95": None}}
    found = made[0] | {"data": "cifar100", "split": "90-10", "unseen": made[0]["unseen"] | {"few_shot": few_shot}}
    cells = by_name(report.known_table(found))["this checkpoint"]
    for side in ("seen", "unseen"):
        for kind in ("triplet", "pair"):
            assert cells[f"{kind}s {side}"] == found[side][f"{kind}_accuracy"]
    assert (cells["10-way"], cells["5-way"]) == (33.0, few_shot["5w1s"]["accuracy"])
    known = report.published(found)["classes"]
    for row in report.class_table(found | {"per_class": [row | {"label": 90} for row in found["per_class"]]}).rows:
        assert row[-1] == known["90"]


def test_the_facts_and_cards_of_a_report(made):
    found = made[0]
    text = report.threshold_text(found["threshold"])
    assert "accepts 12.0 % of different-class pairs and refuses 9.0 % of same-class pairs" in text
    cards = report.cards(found)
    for kind in ("pair", "triplet"):
        low, high = found["unseen"]["ci95"][f"{kind}_accuracy"]
        value = f"{found['unseen'][f'{kind}_accuracy']:.1f}"
        assert f"{kind}s, unseen</span><b>{value}<i> %</i></b><small>95 %: {low:.1f} to {high:.1f}<" in cards
    bars = re.findall(r'--share: ([\d.]+)%">([\d.]+)<', report.class_table(found).html())
    assert bars and all(share == shown for share, shown in bars)


def test_a_difference_differs_where_its_interval_leaves_out_zero(made):
    compared = {"a": (1.0, 2.0), "b": (-2.0, -1.0), "c": (-1.0, 1.0), "d": None}
    rows = {name: {"difference": 0.5, "ci95": ci95} for name, ci95 in compared.items()}
    found = made[0] | {"compared_with": {"checkpoint": "first.pt", "seen": rows, "unseen": None}}
    cells = by_name(report.comparison_table(found))
    assert [cells[f"seen {name}"][""] for name in compared] == ["differs", "differs", "", ""]
    assert [cells[f"seen {name}"]["95 %"] for name in "ad"] == ["+1.0..+2.0", ""]


def test_comparisons_are_of_the_same_images_and_their_intervals_in_order():
    measured, _ = sides(8)
    side = measured["unseen"]
    shots = {name: None if a is None else a - torch.arange(len(a)) % 3 for name, a in side.episodes.items()}
    other = metrics.Side(side.images, side.z, side.curve, side.accuracies, shots)
    row = report.compare({"unseen": side}, {"unseen": other})["unseen"]["5w1s"]
    assert row["ci95"][0] < row["difference"] < row["ci95"][1]
    changed = metrics.Side(Images(side.images.store ^ 1, side.labels), side.z, side.curve, side.accuracies, shots)
    assert report.compare({"unseen": side}, {"unseen": changed}) is None


def test_a_report_has_the_figures_of_its_side(made):
    found, measured, _ = made
    for name, side in measured.items():
        assert (found[name]["auc"], found[name]["eer"]) == (side.curve.auc, side.curve.eer)
    for row, label in zip(found["per_class"], range(6, 14), strict=True):
        own = measured["unseen"].accuracies
        assert [row[name] for name in own] == [float(of.per_class[label - 6]) for of in own.values()]
    mean, half = metrics.mean_interval(measured["unseen"].episodes["5w1s"])
    assert found["unseen"]["few_shot"]["5w1s"] == {"accuracy": mean, "ci95": half, "episodes": 10_000}


def test_the_rows_of_recognition_with_strangers(monkeypatch):
    """Of 24 seen and 12 unseen classes; the thresholds are adapted as a gallery's for the unseen ones alone."""
    given = []

    def open_set(enrolled, others, way, shot, table, adapt):
        given.append((len(enrolled[1].unique()), len(others[1].unique()), way, shot, adapt))
        return {"auroc": torch.tensor([50.0, 60.0])}

    monkeypatch.setattr(evaluate.metrics, "open_set", open_set)
    monkeypatch.setattr(evaluate, "Strangers", lambda table: table)
    for unseen, interval in ((12, True), (4, False)):
        given.clear()
        made = {
            name: SimpleNamespace(z=None, labels=torch.arange(n).repeat(5))
            for name, n in (("seen", 24), ("unseen", unseen))
        }
        rows = evaluate.open_set_rows(made, {"strangers": [1]})
        way = min(5, unseen // 2)
        assert given == [
            *((unseen, unseen, way, shot, True) for shot in (1, 5)),
            *((24, unseen, way, shot, False) for way in (20, 24) for shot in (1, 5)),
        ]
        assert all((row["auroc"][1] is not None) == interval for row in rows)


@pytest.fixture
def axes_of(monkeypatch):
    """Draws a picture; returns the axes of its light version."""
    drawn = []

    def draw(paint, height):
        figure = matplotlib.figure.Figure()
        paint(figure)
        drawn.append(figure)
        return {"": b"", "-dark": b""}

    monkeypatch.setattr(figures, "draw", draw)

    def run(function, *arguments):
        function(*arguments)
        return drawn.pop().axes

    return run


def test_the_roc_curve_is_the_share_of_same_class_pairs_by_that_of_others(made, axes_of):
    measured = made[1]
    (axes,) = axes_of(figures.of_roc, measured, 0.5)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("different-class pairs accepted", "same-class pairs accepted")
    for place, (name, side) in enumerate(measured.items()):
        curve, dot = axes.lines[2 * place : 2 * place + 2]
        accept, reject = metrics.pair_errors(side.z, side.labels, [0.5])
        assert dot.get_xydata().tolist() == [[float(accept), 1 - float(reject)]]
        x, y = curve.get_xydata().T
        assert 100 * abs(np.trapezoid(y, x)) == pytest.approx(side.curve.auc, abs=0.5) and side.curve.auc > 60
        assert (np.diff(x) <= 0).all() and curve.get_color() == {"seen": figures.SEEN, "unseen": figures.UNSEEN}[name]


def test_similarities_of_one_class_are_the_higher_ones(made, axes_of):
    every = axes_of(figures.of_similarities, made[1], {"auto": 0.5, "fixed": -0.2})
    assert [axes.get_title(loc="left") for axes in every] == ["seen classes", "unseen classes"]
    for axes, side in zip(every, made[1].values(), strict=True):
        kinds = metrics.pair_histogram(side.z, side.labels, 100)
        assert [line.get_xdata()[0] for line in axes.lines] == [0.5, -0.2]
        outlines = {patch.get_label(): patch.get_data().values for patch in axes.patches if patch.get_label()}
        for values, label in zip(kinds, ("different classes", "same class"), strict=True):
            assert np.allclose(outlines[label], 50 * values / values.sum())
        middle = {label: (values * np.arange(100)).sum() / values.sum() for label, values in outlines.items()}
        assert middle["same class"] > middle["different classes"]


def test_names_on_the_map_are_near_their_points(monkeypatch, axes_of):
    monkeypatch.setattr(figures, "tsne", lambda z: 100 * z)
    labels, corners = torch.arange(4).repeat_interleave(20), torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    z = normalize(corners[labels] + 0.05 * torch.randn(80, 2, generator=torch.Generator().manual_seed(0)))
    side = metrics.measure(Images(torch.zeros(80, 3, 4, 4, dtype=torch.uint8), labels), z, 0.5)
    (axes,) = axes_of(figures.of_map, side, list("abcd"))
    middles = np.stack([points.get_offsets().mean(0) for points in axes.collections])
    for place, text in enumerate(axes.texts):
        assert text.get_text() == "abcd"[place]
        assert np.square(middles - text.get_position()).sum(1).argmin() == place


def test_rows_of_the_confusions_are_the_classes_of_the_queries(monkeypatch, axes_of):
    shares = torch.tensor([[90.0, 10, 0, 0], [30, 70, 0, 0], [0, 0, 99, 1], [0, 0, 0, 100]])
    monkeypatch.setattr(figures, "DRAWN_CLASSES", 2)
    (axes,) = axes_of(figures.of_confusion, shares, torch.arange(4), list("abcd"))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("taken for", "class of the query")
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]  # which are confused most
    assert axes.images[0].get_array().tolist() == [[90, 10], [30, 70]]
    assert {text.get_position(): text.get_text() for text in axes.texts}[1, 0] == "10"


def test_thumbnails_stand_upright():
    image = torch.randint(0, 256, (3, 6, 4), dtype=torch.uint8)
    file = re.search('base64,([^"]+)', figures.thumbnail(image, "a"))[1]
    shown = Image.open(figures.io.BytesIO(figures.base64.b64decode(file)))
    assert np.array_equal(np.array(shown), image.permute(1, 2, 0))


def test_a_wrong_answer_is_named_on_the_board():
    labels, z = torch.tensor([0, 0, 1, 1]), torch.eye(3)[[0, 1, 1, 1]]
    side = SimpleNamespace(z=z, labels=labels, images=Images(torch.zeros(4, 3, 4, 4, dtype=torch.uint8), labels))
    body = figures.board(side, torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1], [1]]), ["a", "b"])
    assert re.findall("<small>(.*?)</small>", body) == ["✗ <bdi>b</bdi>", "✓"]


def test_examples_say_how_many_are_right(made):
    picture = figures.of_episodes(made[1]["unseen"], made[2])
    right = picture.body.count('class="right"')
    assert f"{right} of 20 are right" in picture.text and right > 0


def test_the_hardest_pairs():
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    angle = torch.tensor([0.0, 0.1, 1.2, 1.5, 2.0, 2.1])
    pixels = (40 * torch.arange(6, dtype=torch.uint8)).view(6, 1, 1, 1).expand(6, 3, 2, 2)
    side = SimpleNamespace(z=torch.stack((angle.cos(), angle.sin()), 1), labels=labels, images=Images(pixels, labels))
    body = figures.of_hardest_pairs(side, ["a", "b"], pairs=1).body
    assert re.findall("<b>(.*?)</b>", body) == [f"{np.cos(1.2):.2f}", f"{np.cos(0.3):.2f}"]
    files = [figures.base64.b64decode(file) for file in re.findall('base64,([^"]+)', body)]
    assert [np.array(Image.open(figures.io.BytesIO(file)))[0, 0, 0] // 40 for file in files] == [0, 2, 2, 3]
