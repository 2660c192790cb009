"""The report page in a real browser, and the figures' content."""

import html
import itertools
import os
import re
import warnings

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
