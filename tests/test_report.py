"""The report page in a real browser, and the figures' content."""

import os
import re

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

import adapt
import browser
import evaluate
import figures
import metrics
import report

needs_browser = pytest.mark.skipif(
    browser.chromium() is None and os.environ.get("CI") != "true", reason="no Chromium here; required where CI=true"
)


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
        found[name] = metrics.measure(pixels, labels, z, 0.5, shots) if classes else None
    return found, [f"a_rather_long_<class>_name_{label}" for label in range(6 + unseen_classes)]


def make(folder, unseen_classes):
    measured, names = sides(unseen_classes)
    threshold = {"mode": "auto", "criterion": "balanced", "value": 0.5, "false_accept": 12.0, "false_reject": 9.0}
    threshold |= {"logistic": [9.0, -4.0], "calibrated_on": "60 held-back training images of 6 seen classes"}
    facts = {"checkpoint": "runs/" + "x" * 80 + "/best.pt", "commit": "0123456789ab", "data": "own", "split": "60-40"}
    facts |= {"training": None, "notes": ["seen: 60 images", "2 <copies>"]}
    thresholds = {"auto balanced": 0.5, "auto eer": 0.52, "fixed 0.2": 0.2}
    made = evaluate.make_report(facts, threshold, thresholds, measured, names)
    if unseen_classes:
        ci95 = {"triplet_accuracy": (70.5, 79.5), "pair_accuracy": (60.5, 69.5)}
        published = {"triplet_accuracy": 75.25, "pair_accuracy": 65.0, "ci95": ci95}
        few_shot = {"5w1s": adapt.gain(torch.tensor([40.0, 50]), torch.tensor([42.0, 54])), "10w1s": None}
        support = {"steps": 4, "lr": 3e-4, "episodes": 2, "few_shot": few_shot}
        made["unseen"]["adapted"] = {"support": support, "published": published}
    return report.write(folder, made, measured, names), made


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("unseen_classes", [7, 0])
def test_the_page_in_a_browser(tmp_path, unseen_classes):
    """Nothing overflows at two widths, in light and dark; images load and are described; no errors, no network."""
    page, _ = make(tmp_path, unseen_classes)
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
    page, made = make(tmp_path, 7)
    text = page.read_text()
    names = {"roc", "similarity", "classes", "map", "hardest", "confusion", "episodes"}
    expected = {f"{name}{theme}.png" for name in names for theme in ("", "-dark")} | {"index.html"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert set(re.findall(r'<figure id="(\w+)">', text)) == names
    for name in names:
        light, dark = (Image.open(tmp_path / f"{name}{theme}.png").convert("RGB") for theme in ("", "-dark"))
        assert light.size == dark.size and light.getpixel((0, 0)) == (255, 255, 255) != dark.getpixel((0, 0))
    assert not re.search(r"<class>|https?:|src=\"(?!data:)", text) and "a rather long &lt;class&gt; name 12" in text
    assert "seen: 60 images" in text and "2 &lt;copies&gt;" in text
    assert "unseen, adapted (published variant)" in text and "65.0 (60.5..69.5)" in text
    assert "4 steps (learning rate 0.0003) of the last block" in text and "+3.00" in text and "+1.61..+4.39" in text
    unseen = made["unseen"]
    for value in (unseen["pair_accuracy"], unseen["auc"], unseen["few_shot"]["5w1s"]["accuracy"]):
        assert f"{value:.1f}" in text
    assert len(make(tmp_path / "new", 0)[0].read_text()) < len(text)


def test_without_pairs_there_is_still_a_page(tmp_path):
    """Two unseen classes of one image each have no pair of one class."""
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert metrics.measure(pixels, torch.tensor([0, 1]), torch.eye(2), 0.5) is None
    measured, names = sides(3)
    measured["unseen"] = None
    facts = {"checkpoint": "a.pt", "commit": None, "data": "own", "split": "60-40", "training": None, "notes": []}
    threshold = {"mode": "fixed", "value": 0.5, "criterion": None}
    made = evaluate.make_report(facts, threshold, {}, measured, names)
    assert report.write(tmp_path, made, measured, names).exists()


def test_confusions_by_hand():
    """Classes on the axes of space: no confusion. Two classes at one place: each query is a coin's toss."""
    labels = torch.arange(3).repeat_interleave(20)
    pixels = torch.zeros(60, 3, 4, 4, dtype=torch.uint8)
    side = metrics.measure(pixels, labels, torch.eye(3)[labels], 0.5)
    assert torch.equal(figures.one_shot_confusion(side, 10), 100 * torch.eye(3, dtype=torch.float64))
    z = torch.eye(3)[torch.tensor([0, 0, 2])[labels]]
    shares = figures.one_shot_confusion(metrics.measure(pixels, labels, z, 0.5))
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
