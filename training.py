"""What both trainings share: checks, the process, the network to be trained, the run with its log and checkpoints."""

import contextlib
import ctypes
import dataclasses
import errno
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO, TypeVar

import torch
from torch import Tensor, nn
from torch.backends import mkldnn
from tqdm import tqdm

import checkpoints
import cli
import data
import distributed
import metrics
import model
from sources import has_files, listed

Options = TypeVar("Options")
FEW = 1000  # training images; from fewer, training from scratch does not pay (docs/recipe.md)
PHOTOGRAPH = 96  # pixels
NOT_FINITE = "the weights are no longer finite; try a lower --lr, or --precision float32"
FIELDS = ("step", "images", "seconds", "loss", "rate", "triplet_accuracy", "pair_accuracy", "auc", "threshold")
FIELDS += ("new_triplet_accuracy", "new_pair_accuracy", "new_one_shot")  # on validation classes, where there are any


def check(options: cli.RunOptions) -> None:
    """Raise ValueError unless the options both trainings have make sense."""
    cli.require(options, "temperature", least=1e-6, most=1e6)
    cli.require(options, "minutes", most=1e6)
    cli.require(options, "margin", "seed", "withhold", least=0)
    cli.require(options, "crop", "jitter", "distort", "cutout", "rotate", "penultimate", "turned", least=0, most=1)
    cli.require(options, "width", least=1, most=1024)
    cli.require(options, "image_size", least=8, most=4096)
    cli.check_pixel_statistics(options.pixel_mean, options.pixel_std)
    if options.log_dir is not None and Path(options.log_dir).is_file():
        raise ValueError(f"--log-dir: {options.log_dir} is not a folder")
    if options.resume and options.overwrite:
        raise ValueError("--resume continues a run, --overwrite replaces it; give one of them")
    cli.RunFolder.check(options.out, options.resume, options.overwrite)
    own = [Path(options.out, name).resolve() for name in cli.RunFolder.FILES if options.overwrite]
    for path in filter(None, (options.weights, *getattr(options, "teacher", ()))):
        if Path(path).resolve() in own:
            raise ValueError(f"--overwrite would replace {path}, which the training needs; give another --out")
    if options.seed >= 2**63:
        raise ValueError(f"--seed must be below 2**63, got {options.seed}")
    if options.pretrained and ":" not in options.backbone:
        raise ValueError("--pretrained is for --backbone torchvision:NAME and timm:NAME")
    if options.pretrained and options.weights is not None:
        raise ValueError("give --pretrained or --weights FILE, not both")
    if options.pixel_mean is not None and options.weights is None:
        raise ValueError("--pixel-mean and --pixel-std belong to a state dict; give --weights FILE with them")
    if options.freeze and not (options.pretrained or options.weights):
        raise ValueError("--freeze keeps given weights; give --pretrained or --weights FILE with it")


def with_defaults(options: Options, penultimate: float = 0.0, **usual: float) -> Options:
    """The options with defaults for image size, augmentation, the parts of the embedding, `width`, `freeze` and the
    learning rates.

    `penultimate` is for `model.ResNet`; `usual` are the learning rates where no weights are given: given ones move at a
    tenth of these, and the first three stages of --weights not at all, or a few pictures make a network forget what it
    knew of other classes. Image size and parts of the embedding are those of a checkpoint in --weights. Photographs are
    picture files of PHOTOGRAPH pixels or more. Raises ValueError or OSError.
    """
    for option in ("width", "penultimate"):
        if getattr(options, option) and ":" in options.backbone:
            raise ValueError(f"--{option} is for resnet12, resnet20 and their like, not for {options.backbone}")
    saved = checkpoints.read(options.weights) if options.weights else {}
    own = checkpoints.settings_of(saved) if checkpoints.is_ours(saved) else None
    files = has_files(options.data)
    library = ":" in options.backbone
    trained_at = own.get("input_size" if library else "size") if own and (files or library) else None
    size = model.image_size(options.backbone, files, options.image_size, trained_at)
    if files and size >= PHOTOGRAPH:
        found = {"crop": 0.25, "jitter": 0.3, "cutout": 0.0, "rotate": 0.0}
    else:
        found = {"crop": 0.0, "jitter": 0.0, "cutout": 0.375, "rotate": 0.25}
    share = 0.1 if options.weights or options.pretrained else 1.0
    found |= {"image_size": size, "width": 32, "freeze": 3 if options.weights else 0}
    found |= {"turned": 0.0, "penultimate": penultimate if options.backbone in model.RESNETS else 0.0}
    if own is not None:
        found |= {name: own.get(name, 0.0) for name in ("turned", "penultimate")}
    found |= {name: share * rate for name, rate in usual.items()}
    return dataclasses.replace(options, **{n: value for n, value in found.items() if getattr(options, n) is None})


def prepare_process(options: cli.RunOptions) -> torch.device:
    """Seed PyTorch, set its modes, join the process group, and pick the device. Raises ValueError.

    Freed memory stays with the process: each step frees and allocates the same activations, and glibc hands such large
    blocks back to the system, which clears them page by page at their next use, a tenth of the time of a step.
    """
    torch.manual_seed(options.seed)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(options.deterministic)
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: blocks up to this size come from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory at the heap's end is kept
    return model.pick_device(distributed.join(options.device))


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The type the network computes in; "auto": bfloat16 where the processor multiplies it natively."""
    if name != "auto":
        return getattr(torch, name)
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        # other CPUs emulate it, slowly
        has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        fast = has.get("avx512_bf16") or has.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


# ---------------------------------------------------------------------------------------------------------- the network


def make_network(options: cli.NetworkOptions, train: data.TrainingData) -> model.Embedder:
    """The network to be trained, on the data's device, with given weights and frozen stages. Raises ValueError or
    OSError."""
    state, (mean, std) = given_weights(options, train)
    settings = {"backbone": options.backbone, "width": options.width, "input_size": options.image_size}
    mirror = options.mirror and train.options.flip
    settings |= {"mirror": mirror, "turned": options.turned, "penultimate": options.penultimate}
    settings |= {"mean": mean, "std": std}
    settings |= {"size": train.kept.size, "border": train.kept.border}
    net = model.build(**settings) if state is None else checkpoints.build_with_weights(settings, state)[0]
    net.freeze(options.freeze)
    if state is None and len(train.kept) < FEW:
        print(
            f"{len(train.kept)} training images are few: a network in weights/, such as weights/classic-90-10.pt, is "
            "better as it is than one trained from scratch on so few, and better still after --weights FILE"
        )
    net.to(train.device)
    parameters, multiply_adds = model.count(net, train.kept.size)
    trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    print(
        f"{options.backbone}: {parameters / 1e6:.2f} M parameters"
        + (f", {trained / 1e6:.2f} M of them trained" if trained < parameters else "")
        + f"; {multiply_adds / 1e6:.1f} M multiply-adds for an image of {net.size} x {net.size}"
    )
    return net


def given_weights(options: cli.NetworkOptions, train: data.TrainingData) -> tuple[dict | None, tuple]:
    """A state dict to start from, if one is given, and the mean and standard deviation of the network's pixels."""
    usual = model.made_for(options.backbone).get("pixels")
    if options.pretrained:
        return model.pretrained_weights(options.backbone), usual
    if options.weights is None:
        return None, train.pixel_statistics
    saved, settings = checkpoints.read(options.weights), {}
    if checkpoints.is_ours(saved):
        if options.pixel_mean is not None:
            raise ValueError(f"{options.weights} has its own pixel statistics; leave --pixel-mean and --pixel-std out")
        note_learned(options.weights, saved, train)
        settings = checkpoints.settings_of(saved)
        statistics = settings["mean"], settings["std"]
    elif options.pixel_mean is not None:
        statistics = options.pixel_mean, options.pixel_std
    else:
        statistics = usual or train.pixel_statistics
    state = checkpoints.bare_state(saved, options.weights)
    train.facts["given"] = [checkpoints.fingerprint(settings, state)]
    return state, statistics


def note_learned(path: str, saved: dict, train: data.TrainingData) -> None:
    """Note the classes that a checkpoint was trained on, as known here before. Raises ValueError if one is an unseen or
    a validation class."""
    facts, learned = train.facts, checkpoints.trained_classes(saved["data"])
    remedies = {"unseen": "the --split that it was trained with, or --split 100-0, which has none"}
    remedies["validation"] = "the --split and --withhold, if any, that it was trained with"
    for kind, remedy in remedies.items():
        leaked = [name for name in (facts["classes"][label] for label in facts[kind]) if name in learned]
        if leaked:
            why = f"{path} was trained on {kind} classes ({listed(leaked)})"
            raise ValueError(f"{why}; give {remedy}")
    facts["learned_before"] = sorted(learned | {*facts.get("learned_before", [])})
    facts["trained_on_test"] |= bool(saved["data"].get("trained_on_test"))


# ------------------------------------------------------------------------------------------------------------- the run


class Stopped(Exception):
    """Training cannot go on; the message says why and what to try."""


class Run:
    """One training in its folder: last.pt, best.pt, log.csv, the progress bar, resuming, and reasons to stop.

    last.pt holds the whole state of the training, best.pt the weights that did best on the held-back images; both hold
    what evaluation needs: weights, options, data facts and calibrated threshold. The first of several processes
    (distributed.py) validates and writes.
    """

    LOG_EVERY = 20  # steps between rows of log.csv and checks of the loss

    def __init__(
        self,
        options: cli.RunOptions,
        train: data.TrainingData,
        net: model.Embedder,
        total: int,
        validate_every: int,
        refresh_batch_norm: bool = False,
        **parts: nn.Module | torch.optim.Optimizer,
    ):
        """`total` steps, or as many as there is time for with --minutes, validated every `validate_every`.

        `refresh_batch_norm` before each validation. `parts` are what resuming needs beside the network. Raises
        ValueError or OSError.
        """
        self.options, self.train, self.net, self.parts = options, train, net, parts
        self.total, self.validate_every = total, validate_every
        self.refreshes = refresh_batch_norm or distributed.world() > 1  # each process has statistics of its own images
        self.step = self.images = self.collapsed = 0
        self.seconds = self.rate = 0.0  # spent training, over all resumptions; learning or meta-step rate
        self.commit, self.best = git_commit(), {"auc": -1.0}
        self.validation: dict = {}
        self.calibration: dict | None = None
        self.losses: list[Tensor] = []
        self.device = next(net.parameters()).device
        self.dtype = pick_precision(options.precision, self.device)
        self.embed_batch: Callable[[Tensor], Tensor] = net
        if options.compile:
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"  # CUDA graphs: many small kernels
            self.embed_batch = torch.compile(net, mode=mode, dynamic=False)
        self.open_folder()

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, D) of normalised images (B, 3, H, W), in the chosen precision."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.embed_batch(images)

    def open_folder(self) -> None:
        """Make the run's folder, or resume what is in it. Raises ValueError or OSError."""
        out, first = Path(self.options.out), distributed.rank() == 0
        with distributed.first_process_first():
            self.folder = cli.RunFolder(out, self.options.resume, self.options.overwrite) if first else None
        try:
            self.rows = self.restore(checkpoints.read(out / "last.pt")) if self.options.resume else []
            self.tensorboard = tensorboard_writer(self.options.log_dir if first else None, self.step)
            if first:
                self.folder.start(FIELDS, self.rows)
        except (ValueError, OSError):
            if first:
                self.folder.close()
            raise

    def restore(self, saved: dict) -> list[dict]:
        """Take up the saved state; return the rows of its log. Raises ValueError if it was made with other options."""
        folder = self.options.out
        if not isinstance(saved.get("training"), dict):
            raise ValueError(f"{folder}/last.pt holds no training state to resume")
        free = {"resume", "overwrite", "device", "out", "data", "data_root", "log_dir"}
        now = dataclasses.asdict(self.options)
        differing = [name for name in now if name not in free and saved["options"].get(name, now[name]) != now[name]]
        if differing:
            was = ", ".join(cli.as_given(name, saved["options"][name]) for name in differing)
            raise ValueError(f"{folder} was trained with other options; to resume it give {was}")
        if saved["data"].get("fingerprint") != self.train.facts["fingerprint"]:
            raise ValueError(f"{folder} was trained on other images, labels or classes than --data holds now")
        given = self.train.facts.get("given")
        if saved["data"].get("given", given) != given:
            raise ValueError(f"{folder} learned from other networks than the files of --weights and --teacher hold now")
        state = saved["training"]
        processes, rank = len(state["generator"]), distributed.rank()
        if processes != distributed.world():
            raise ValueError(f"{folder} was trained by {processes} processes; resume it with as many")
        try:
            checkpoints.load_weights(self.net, saved["model"])
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.train.sampler.tasks.set_state(state["tasks"])
            self.train.generator.set_state(state["generator"][rank].clone())  # a view would be read wrongly
            torch.set_rng_state(state["rng"][rank].clone())
            if self.device.type == "cuda" and "rng_cuda" in state:
                torch.cuda.set_rng_state(state["rng_cuda"][rank].clone(), self.device)
            self.step, self.images, self.seconds = int(saved["step"]), int(saved["images"]), float(saved["seconds"])
            self.best = state["best"] | {"auc": float(state["best"]["auc"])}
            self.losses = list(state["losses"][rank].to(self.device))
            self.collapsed = int(state["collapsed"])
            return state["log"]
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{folder}/last.pt is not the state of such a training: {error}") from error

    @property
    def progress(self) -> float:
        """Fraction of the run that is done, 1 at its end."""
        if not self.total:
            return 1.0
        minutes = self.options.minutes
        return min(1.0, self.step / self.total if minutes is None else self.seconds / (60 * minutes))

    def steps(self) -> Iterator[float]:
        """The progress at each step, from where the run stands to its end.

        Ctrl-C, SIGTERM and the loss of the terminal end it after the step, saved.
        """
        interrupts: list[int] = []
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored under nohup
            numbers.append(signal.SIGHUP)
        before = {n: signal.signal(n, lambda number, frame: interrupts.append(number)) for n in numbers}
        self.bar = tqdm(
            total=self.total if self.options.minutes is None else None,
            initial=self.step,
            desc=Path(self.options.out).name,
            dynamic_ncols=True,
            smoothing=0.05,
            disable=distributed.rank() > 0,
        )
        started, images_before, seconds_before = time.monotonic(), self.images, self.seconds
        try:
            if self.step == 0 and not self.rows and (self.options.weights or self.options.pretrained):
                if isinstance(self.net, model.LibraryNetwork):
                    self.net.centre(self.train.kept)
                self.log({"step": 0, "images": 0, "seconds": 0.0}, validate=True)  # given weights can be the best
                self.save(validated=True)
            if self.options.resume and self.progress == 1 and distributed.rank() == 0:
                self.tell(f"{self.options.out} is at its end, step {self.step}: nothing is left to do")
            while self.progress < 1:
                yield self.progress
                self.step += 1
                seconds = seconds_before + time.monotonic() - started
                self.seconds, interrupted = distributed.from_first(seconds, interrupts[0] if interrupts else 0)
                self.bar.update()
                if interrupted and distributed.rank() == 0:
                    self.tell("stopping: validating and saving", sys.stderr)
                due = self.step % self.validate_every == 0 or self.progress == 1
                if due or self.step % self.LOG_EVERY == 0:
                    row = self.check()
                    speed = (self.images - images_before) / (time.monotonic() - started)
                    self.bar.set_postfix_str(f"loss {row['loss']:.3f}, {speed:.0f} images/s")
                    self.log(row, validate=due)
                if due or interrupted:
                    self.save(validated=due)
                if interrupted:
                    distributed.from_first(0.0)  # has saved: when one process ends, torchrun ends the others
                    done = f"step {self.step}, {100 * self.progress:.0f} % of the run"
                    self.end(f"stopped at {done}, saved; go on with --resume", 128 + int(interrupted))
            if self.best.get("step") == 0 < self.step:
                out, why = self.options.out, "nothing later did better on held-back images of seen classes"
                self.tell(f"{out}/best.pt has the given weights: {why}; {out}/last.pt has those of the end")
        except Stopped as error:
            self.end(f"stopped at step {self.step}: {error}", 1)
        except BrokenPipeError:  # nobody reads what is printed
            if distributed.world() == 1:
                self.save(validated=False)
            raise
        except OSError as error:
            saved = self.folder is not None and (self.folder.place / "last.pt").exists()
            remedy = "--resume continues from its last checkpoint" if saved else "nothing of this run was saved"
            self.end(f"error: cannot write to {self.options.out} ({error}); {remedy}", 2)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self.folder is not None:
                self.folder.close()
            if self.tensorboard is not None:
                self.tensorboard.close()
            self.bar.close()

    def end(self, text: str, status: int) -> None:
        """End the program with this last message."""
        self.bar.close()
        if distributed.rank() == 0:
            self.tell(text, sys.stderr)
        sys.exit(status)

    def tell(self, text: str, stream: TextIO | None = None) -> None:
        """Print above the progress bar, to standard output if not told otherwise; to nobody if the terminal is gone."""
        try:
            self.bar.write(text, file=stream)
        except OSError as error:
            if error.errno != errno.EIO:
                raise

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
        distributed.average([means])
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
        """Metrics of the held-back images and of validation classes; sets the calibrated threshold."""
        if self.refreshes and self.step:
            self.refresh_batch_norm()
        if isinstance(self.net, model.ResNet):
            self.net.centre(self.train.kept)
        z, labels = self.embed(self.train.held_back)
        curve = metrics.roc(z, labels)
        pair_accuracy, threshold = curve.best()
        triplets = metrics.accuracies(z, labels, threshold)["triplet_accuracy"].value
        found = {"triplet_accuracy": triplets, "pair_accuracy": pair_accuracy, "auc": curve.auc, "threshold": threshold}
        self.validation, self.calibration = found, metrics.calibrate(curve, z, labels, ["balanced"])["balanced"]
        if self.train.validation is None:
            return found
        z, labels = self.embed(self.train.validation)
        way = min(5, len(labels.unique()))
        return found | {
            "new_triplet_accuracy": metrics.accuracies(z, labels, threshold)["triplet_accuracy"].value,
            "new_pair_accuracy": metrics.roc(z, labels).best()[0],
            "new_one_shot": float(metrics.episode_accuracies(z, labels, way, 1, episodes=2000).mean()),
        }

    def refresh_batch_norm(self) -> None:
        """Measure batch norm's statistics on training images, as they are or augmented, whichever is better on the
        held-back images: neither always is."""
        found = {}
        for augmented in (True, False):
            model.refresh_batch_norm(self.net, self.train.samples(self.net.normalise, augmented))
            if isinstance(self.net, model.ResNet):
                self.net.centre(self.train.kept)
            auc = metrics.roc(*self.embed(self.train.held_back)).auc
            found[auc] = {name: tensor.clone() for name, tensor in self.net.state_dict().items() if "running_" in name}
        self.net.load_state_dict(found[max(found)], strict=False)

    def embed(self, images: data.Images) -> tuple[Tensor, Tensor]:
        """Normalised embeddings (N, D) and labels (N,) of images. Raises Stopped if they are not finite."""
        z = nn.functional.normalize(model.embed(self.net, images))
        if not z.isfinite().all():
            raise Stopped(NOT_FINITE)
        return z, images.labels

    def inference_state(self) -> dict:
        """What evaluation needs, as tensors and plain values."""
        return {
            "model": self.net.state_dict(),
            "network": self.net.settings,
            "options": dataclasses.asdict(self.options),
            "data": self.train.facts,
            "threshold": self.calibration,
            "validation": self.validation,
            "step": self.step,
            "images": self.images,
            "seconds": self.seconds,
            "threads": torch.get_num_threads(),
            "commit": self.commit,
        }

    def save(self, validated: bool) -> None:
        """Write last.pt, in the first process: inference state and everything that resuming needs.

        Where it is not validated, it is written with the former calibration first: there may be no time to validate, as
        torchrun kills what does not end within 30 seconds.
        """
        own = {"generator": self.train.generator.get_state(), "rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            own["rng_cuda"] = torch.cuda.get_rng_state(self.device)
        own |= {"losses": torch.tensor([float(loss) for loss in self.losses])}
        of_processes = {name: distributed.gather(part[None]) for name, part in own.items()}
        if distributed.rank() > 0:
            return
        if not all(tensor.isfinite().all() for tensor in self.net.state_dict().values()):
            raise Stopped(NOT_FINITE)
        training = {name: part.state_dict() for name, part in self.parts.items()}
        training |= of_processes | {"collapsed": self.collapsed, "best": self.best, "log": self.rows}
        training |= {"tasks": self.train.sampler.tasks.get_state()}
        self.write("last.pt", self.inference_state() | {"training": training})
        self.folder.committed()
        if not validated:
            self.validate()  # for last.pt alone: neither the log nor best.pt hears of it
            self.write("last.pt", self.inference_state() | {"training": training})

    def write(self, name: str, checkpoint: dict) -> None:
        """Save one of the run's checkpoints. Raises OSError."""
        with cli.writing(self.folder.place / name) as path:
            torch.save(checkpoint, path)

    def log(self, row: dict, validate: bool) -> None:
        """Add a row to the log and, after a validation, its figures; write best.pt if they are the best so far."""
        if distributed.rank() > 0:
            return
        if validate:
            row |= self.validate()
            ties = self.validation["auc"] == self.best["auc"] and self.best["step"] > 0  # the later is better trained
            if self.validation["auc"] > self.best["auc"] or ties:
                self.best = self.validation | {"step": self.step}
                self.write("best.pt", self.inference_state())
        self.rows.append({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()})
        self.folder.write_row(self.rows[-1])
        if self.tensorboard is not None:
            for name in row.keys() - {"step", "images", "seconds"}:
                self.tensorboard.add_scalar(name, row[name], row["step"])
        if validate:
            when = f"step {self.step}" if self.step else "as given"
            self.tell(f"{when}: held-back images {describe(row)}")


def git_commit() -> str:
    """The commit of this code, with "+" if files differ from it; "unknown" outside a git checkout."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    here = Path(__file__).parent
    try:
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def tensorboard_writer(folder: str | None, step: int):
    """A writer of TensorBoard's event files after `step`, None for no folder. Raises ValueError without the package."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--log-dir needs TensorBoard: pip install tensorboard") from error
    return SummaryWriter(folder, purge_step=step + 1 if step else 0)  # hides what an earlier run logged beyond


def describe(row: dict) -> str:
    """The figures of a validation, for the terminal."""
    text = "triplet {triplet_accuracy:.1f} %, pairs {pair_accuracy:.1f} %, AUC {auc:.1f} %, threshold {threshold:.3f}"
    if "new_one_shot" in row:
        text += "; new classes: triplet {new_triplet_accuracy:.1f} %, pairs {new_pair_accuracy:.1f} %"
        text += ", one-shot {new_one_shot:.1f} %"
    return text.format(**row)
