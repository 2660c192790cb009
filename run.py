"""One training run in its folder: progress, validation, log, checkpoints, resuming, and reasons to stop."""

import csv
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import calibration
import metrics
import model
import ranks
from data import Images
from engine import (
    Options,
    TrainingData,
    UserError,
    git_commit,
    load_checkpoint,
    pick_precision,
    refresh_batch_norm,
    save_checkpoint,
)

FIELDS = ("step", "images", "seconds", "loss", "rate", "triplet_accuracy", "pair_accuracy", "auc", "threshold")
FIELDS += ("new_triplet_accuracy", "new_pair_accuracy", "new_one_shot")  # of validation classes, where there are any


class Stopped(Exception):
    """Training cannot go on; its text says why and what to try."""


class Run:
    """One training in its folder: last.pt, best.pt, log.csv, the progress bar, resuming, and reasons to stop.

    last.pt holds the whole state of the training, best.pt the weights that did best on the held-back images; both hold
    what evaluation needs: weights, options, data facts, centre and calibrated threshold. The first of several processes
    (ranks.py) validates and writes.
    """

    LOG_EVERY = 20  # steps between rows of log.csv and checks of the loss

    def __init__(
        self,
        options: Options,
        train: TrainingData,
        net: nn.Module,
        total: int,
        validate_every: int,
        recalibrate: bool = False,
        **parts: nn.Module | torch.optim.Optimizer,
    ):
        """`total` steps, or as many as there is time for with --minutes, validated every `validate_every`.

        `recalibrate` refreshes batch norm before each validation.

        `parts` are what resuming needs beside the network. Raises ValueError, OSError or UserError.
        """
        self.options, self.train, self.net, self.total, self.validate_every = options, train, net, total, validate_every
        self.recalibrate = recalibrate or ranks.world() > 1  # each process has statistics of its own images
        self.parts = parts
        self.step = self.images = self.collapsed = 0
        self.seconds = 0.0  # spent training, over all resumptions
        self.commit = git_commit()
        self.best = {"auc": -1.0}
        self.losses: list[Tensor] = []
        self.dtype = pick_precision(options.precision, self.device)
        self.embed_batch: Callable[[Tensor], Tensor] = net
        if options.compile:
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"  # CUDA graphs: many small kernels
            self.embed_batch = torch.compile(net, mode=mode, dynamic=False)
        self.folder = Path(options.out)
        self.open_folder()

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, D) of normalised images (B, 3, H, W), in the chosen precision."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.embed_batch(images)

    def open_folder(self) -> None:
        """Make the run's folder, or resume what is in it. Raises ValueError, OSError or UserError."""
        last = self.folder / "last.pt"
        if self.options.resume:
            self.restore(load_checkpoint(last))
        elif last.exists() and not self.options.overwrite:
            ways = "--resume continues it, --overwrite replaces it, --out goes elsewhere"
            raise UserError(f"{self.folder} holds a run: {ways}")
        first, path = ranks.rank() == 0, self.folder / "log.csv"
        self.tensorboard = tensorboard_writer(self.options.log_dir if first else None, self.step)
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = []
        if self.options.resume and first and path.exists():
            with open(path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= self.step]
        self.log_file = open(path if first else os.devnull, "w", newline="")
        self.log = csv.DictWriter(self.log_file, FIELDS)
        self.log.writeheader()
        self.log.writerows(rows)

    def restore(self, saved: dict) -> None:
        """Take up the saved state. Raises UserError if it was made with other options."""
        if "training" not in saved:
            raise UserError(f"{self.folder}/last.pt holds no training state to resume")
        free = {"resume", "overwrite", "device", "out", "data_root", "log_dir"}
        now = dataclasses.asdict(self.options)
        differing = [name for name in now if name not in free and saved["options"].get(name, now[name]) != now[name]]
        if differing:
            was = ", ".join(f"--{name.replace('_', '-')} {saved['options'][name]}" for name in differing)
            raise UserError(f"{self.folder} was trained with other options; to resume it give {was}")
        state = saved["training"]
        self.net.load_state_dict(state["net"])
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        generators = torch.atleast_2d(state["generator"])
        if len(generators) != ranks.world():
            raise UserError(f"{self.folder} was trained by {len(generators)} processes; resume it with as many")
        self.train.sampler.tasks.set_state(state.get("tasks", generators[0].clone()))
        self.train.generator.set_state(generators[ranks.rank()].clone())  # PyTorch reads a view from the wrong place
        torch.set_rng_state(state["rng"])
        self.step, self.images, self.seconds, self.best = (state[k] for k in ("step", "images", "seconds", "best"))

    @property
    def progress(self) -> float:
        """The share of the run that is done, 1 at its end."""
        minutes = self.options.minutes
        return min(1.0, self.step / self.total if minutes is None else self.seconds / (60 * minutes))

    def steps(self) -> Iterator[float]:
        """The progress at each step, from where the run stands to its end; Ctrl-C ends it after the step, saved."""
        interrupts: list[int] = []
        before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
        total = self.total if self.options.minutes is None else None
        bar = tqdm(
            total=total,
            initial=self.step,
            desc=self.folder.name,
            dynamic_ncols=True,
            smoothing=0.05,
            disable=ranks.rank() > 0,
        )
        started, images_before = time.monotonic(), self.images
        seconds_before = self.seconds
        try:
            while self.progress < 1:
                yield self.progress
                self.step += 1
                seconds = seconds_before + time.monotonic() - started
                self.seconds, interrupted = ranks.from_first(seconds, bool(interrupts))
                bar.update()
                due = self.step % self.validate_every == 0 or self.progress == 1 or interrupted
                if due or self.step % self.LOG_EVERY == 0:
                    row = self.check()
                    rate = (self.images - images_before) / (time.monotonic() - started)
                    bar.set_postfix_str(f"loss {row['loss']:.3f}, {rate:.0f} images/s")
                    if due:
                        self.generators = ranks.gather(self.train.generator.get_state()[None])
                    if due and ranks.rank() == 0:
                        row |= self.validate()
                        bar.write(f"step {self.step}: held-back images {describe(row)}")
                        self.save()
                    self.write_log(row)
                if interrupted:
                    bar.close()
                    done = f"step {self.step}, {100 * self.progress:.0f} % of the run"
                    say(f"stopped at {done}, saved; go on with --resume")
                    sys.exit(130)
        except Stopped as error:
            bar.close()
            say(f"stopped at step {self.step}: {error}")
            sys.exit(1)
        finally:
            signal.signal(signal.SIGINT, before)
            bar.close()
            self.log_file.close()
            if self.tensorboard is not None:
                self.tensorboard.close()

    def record(self, loss: Tensor, embeddings: Tensor, images: int, rate: float) -> None:
        """Tell the run of a step: its loss, last embeddings (B, D), images seen and learning or meta-step rate."""
        self.losses.append(loss.detach())
        self.embeddings, self.rate = embeddings.detach(), rate
        self.images += images

    def check(self) -> dict:
        """The mean loss since the last check. Raises Stopped if it is not finite or the embeddings collapsed."""
        z = nn.functional.normalize(self.embeddings.float())
        spread = 1 - z.mean(0).square().sum()  # mean of 1 - cosine over all pairs
        means = torch.stack((torch.stack(self.losses).mean(), spread))
        self.losses.clear()
        ranks.average([means])
        loss, spread = means.tolist()
        if not math.isfinite(loss):
            raise Stopped(f"the loss is {loss}; try a lower --lr, or --precision float32")
        self.collapsed = self.collapsed + 1 if spread < 1e-4 else 0
        if self.collapsed >= 5:
            raise Stopped(
                f"all embeddings point the same way (mean cosine distance {spread:.1e}), a collapse batch-hard mining "
                "is known for; try --mining all --soft-margin --temperature 0.1, or a lower --lr"
            )
        progress = {"step": self.step, "images": self.images, "seconds": self.seconds}
        return progress | {"loss": loss, "rate": self.rate}

    def validate(self) -> dict:
        """Metrics of the held-back images; sets the calibrated threshold and keeps the best weights."""
        if self.recalibrate:
            refresh_batch_norm(self.net, self.train)
        held_back = self.train.held_back
        z = self.embed(held_back.images)
        pairs = metrics.pair_statistics(z, held_back.labels)
        found = {
            "triplet_accuracy": float(metrics.triplet_accuracy(z, held_back.labels)),
            "pair_accuracy": float(pairs.oracle_accuracy),
            "auc": float(pairs.auc),
            "threshold": float(pairs.oracle_threshold),
        }
        self.validation, self.calibration = found, calibration.calibrate(z, held_back.labels)
        if found["auc"] > self.best["auc"]:
            self.best = found | {"step": self.step}
            save_checkpoint(self.folder / "best.pt", self.inference_state())
        return found | ({} if self.train.validation is None else self.measure_new(self.train.validation))

    def embed(self, images: Tensor) -> Tensor:
        """Normalised embeddings (N, D) of (N, 3, H, W) uint8 images."""
        return metrics.normalise(model.embed(self.net, images, self.train.facts["mean"], self.train.facts["std"]))

    def measure_new(self, validation: Images) -> dict:
        """Figures of classes that are not trained on; one-shot among 5 of them, or all if there are fewer."""
        z, labels = self.embed(validation.images), validation.labels
        way = min(5, len(labels.unique()))
        return {
            "new_triplet_accuracy": float(metrics.triplet_accuracy(z, labels)),
            "new_pair_accuracy": float(metrics.pair_statistics(z, labels).oracle_accuracy),
            "new_one_shot": metrics.few_shot(z, labels, way, 1, episodes=2000)[0],
        }

    def inference_state(self) -> dict:
        """What evaluation needs, as tensors and plain values."""
        return {
            "model": self.net.state_dict(),
            "network": self.net.settings,
            "options": dataclasses.asdict(self.options),
            "data": self.train.facts,
            "center": None,  # subtracting the mean embedding makes networks trained on raw cosines worse
            "threshold": self.calibration,
            "validation": self.validation,
            "step": self.step,
            "images": self.images,
            "seconds": self.seconds,
            "threads": torch.get_num_threads(),
            "commit": self.commit,
        }

    def save(self) -> None:
        """Write last.pt: inference state and everything that resuming needs."""
        training = {name: part.state_dict() for name, part in self.parts.items()}
        training |= {"net": self.net.state_dict(), "generator": self.generators}
        training["tasks"] = self.train.sampler.tasks.get_state()
        training |= {"rng": torch.get_rng_state(), "best": self.best}
        training |= {"step": self.step, "images": self.images, "seconds": self.seconds}
        save_checkpoint(self.folder / "last.pt", self.inference_state() | {"training": training})

    def write_log(self, row: dict) -> None:
        self.log.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
        self.log_file.flush()
        if self.tensorboard is not None:
            for name in row.keys() - {"step", "images", "seconds"}:
                self.tensorboard.add_scalar(name, row[name], row["step"])


def tensorboard_writer(folder: str | None, step: int):
    """A writer of TensorBoard's event files after `step`, None for no folder. Raises UserError without the package."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--log-dir needs TensorBoard: pip install tensorboard") from error
    return SummaryWriter(folder, purge_step=step + 1 if step else None)


def say(text: str) -> None:
    """Print a last word, once."""
    if ranks.rank() == 0:
        print(text, file=sys.stderr)


def describe(row: dict) -> str:
    text = (
        f"triplet {row['triplet_accuracy']:.1f} %, pairs {row['pair_accuracy']:.1f} %, AUC {row['auc']:.1f} %, "
        f"threshold {row['threshold']:.3f}"
    )
    if "new_one_shot" in row:
        new = [row[name] for name in ("new_triplet_accuracy", "new_pair_accuracy", "new_one_shot")]
        text += "; new classes: triplet {:.1f} %, pairs {:.1f} %, one-shot {:.1f} %".format(*new)
    return text
