"""More pictures than memory: what a training on pictures in a file costs, in memory and in time.

    python benchmarks/photographs.py FOLDER                   # 100 000 pictures, 15 GB in FOLDER/root/cache

Draws pictures into FOLDER, unless they are there, has them decoded, and takes training steps with ResNet-18.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import train_classic
import training

COUNT, CLASSES, DRAWN = 100_000, 1000, 500
SIZE = 196  # pixels; 224 with the border that crops are taken from
STEPS = 10


def draw(folder: Path) -> None:
    """COUNT JPEG files of 320 x 280 pixels, of which DRAWN are different: the others are hard links to them."""
    random, drawn = np.random.default_rng(0), folder / "drawn"
    drawn.mkdir(parents=True)
    for number in range(DRAWN):
        coarse = Image.fromarray(random.integers(0, 256, (14, 16, 3), np.uint8)).resize(
            (320, 280), Image.Resampling.BICUBIC
        )
        noise = random.normal(0, 12, (280, 320, 3))
        Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(
            drawn / f"{number}.jpg", quality=90
        )
    for number in range(COUNT):
        place = folder / "pictures" / f"class {number % CLASSES:04}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.jpg").hardlink_to(drawn / f"{number % DRAWN}.jpg")


def memory(name: str) -> float:
    """A line of /proc/self/status in GB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) / 1e6


def main(folder: Path) -> None:
    if not folder.exists():
        draw(folder)
    options = train_classic.Options(
        data=str(folder / "pictures"),
        data_root=str(folder / "root"),
        backbone="torchvision:resnet18",
        image_size=SIZE,
        batch_classes=16,
        images_per_class=4,
        lr=0.01,
    )
    options = training.with_defaults(options, lr=0.01, muon_lr=0.02)
    start = time.perf_counter()
    device = training.prepare_process(options)
    train = data.load_for_training(options, 0, device)
    loaded = time.perf_counter() - start
    net = training.make_network(options, train).train()
    head = train_classic.NormalisedSoftmax(len(train.facts["seen"]), net.dimension, 16.0)
    optimizers = train_classic.make_optimizers(options, net, head)
    seen = torch.tensor(train.facts["seen"])
    index = [train.sampler.batch(train.sampler.task(16), 4) for _ in range(STEPS)]
    for each in index:
        train.kept.pixels(each, border=True)  # warm
    seconds = {"reading": 0.0, "augmenting": 0.0, "network": 0.0}
    for each in index:
        begin = time.perf_counter()
        train.kept.pixels(each, border=True)
        read = time.perf_counter()
        images, labels = train.batch(net.normalise, each)
        augmented = time.perf_counter()
        z = net(images)
        loss = 3 * train_classic.triplet_loss(z, labels, **options.triplet) + head(z, torch.searchsorted(seen, labels))
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        done = time.perf_counter()
        seconds["reading"] += read - begin
        seconds["augmenting"] += augmented - read - (read - begin)  # `batch` reads once more
        seconds["network"] += done - augmented
    step = sum(seconds.values())
    found = {"pictures": len(train.kept.store), "gigabytes_on_disk": train.kept.store.numel() / 1e9}
    found |= {"seconds_to_start": loaded, "peak_resident_gigabytes": memory("VmHWM")}
    found |= {f"{name}_share_of_step": each / step for name, each in seconds.items()}
    found |= {
        "milliseconds_a_step": 1000 * step / STEPS,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
