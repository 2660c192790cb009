"""One-shot recognition of your own pictures.

    python predict.py runs/classic/best.pt --support classes --query new.jpg more/      # classes/NAME/picture.jpg
    python predict.py runs/classic/best.pt --compare a.jpg b.jpg

A class is a folder with one picture of it, or a few. Each query goes to the class it is most similar to, or is
"unknown" if that similarity is not above the checkpoint's threshold. The network need not be trained on these classes.
"""

from dataclasses import dataclass

import tyro

import cli


@dataclass(frozen=True)
class Options:
    checkpoint: tyro.conf.Positional[cli.Checkpoint]  # best.pt or last.pt of a run
    support: cli.OptionalFolder = None  # folder, or a .zip file, with a folder of pictures for each class
    query: cli.shown_as("PICTURE|FOLDER ...", tuple[str, ...]) = ()  # pictures, or folders of pictures
    compare: cli.shown_as("PICTURE PICTURE", tuple[str, str] | None) = None  # two pictures: are they of one class?
    threshold: cli.Threshold = "auto"  # auto (the checkpoint's) or a similarity in -1..1
    csv: cli.OptionalFile = None  # write the answers to this file
    json: cli.OptionalFile = None  # write the answers to this file
    device: cli.Device = "auto"  # where the network runs; auto: on a GPU, if there is one


if __name__ == "__main__":
    cli.parse(Options, __doc__)  # before PyTorch is imported, so that --help takes no seconds

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import metrics
import model
from sources import File, find_classes, listed, open_folder, read_picture


def check(options: Options) -> None:
    """Raise ValueError unless the options say what to do and the files can be written."""
    if options.compare and (options.support or options.query):
        raise ValueError("--compare goes without --support and --query")
    if not options.compare and not (options.support and options.query):
        raise ValueError("give --support FOLDER and --query PICTURES, or --compare A B")
    for option, path in (("--csv", options.csv), ("--json", options.json)):
        cli.check_output(option, path, options.checkpoint, *options.query, *(options.compare or ()))
    if options.csv and options.json and Path(options.csv).absolute() == Path(options.json).absolute():
        raise ValueError(f"--csv and --json are both {options.csv}; give two files")


def query_pictures(names: tuple[str, ...]) -> list[Path]:
    """The pictures named, and those in the folders named. Raises ValueError."""
    found = []
    for path in map(Path, names):
        pictures = [*open_folder(path).pictures().values()] if path.is_dir() else [path]
        if not pictures:
            raise ValueError(f"{path} holds no picture")
        found += pictures
    return found


def embed(net: model.Embedder, paths: list[File], batch: int = 100) -> Tensor:
    """Embeddings of length 1 (N, D) of pictures. Raises ValueError for one that cannot be read."""
    parts = []
    for start in range(0, len(paths), batch):
        images = torch.stack([read_picture(path, net.size) for path in paths[start : start + batch]])
        parts.append(F.normalize(model.embed(net, images)))
    return torch.cat(parts)


def classify(net: model.Embedder, support: Tensor, names: list[str], path: Path, threshold: float) -> dict:
    """The answer about one picture, given a row of `support` (C, D) a class. Raises ValueError."""
    similarity = support @ embed(net, [path])[0]
    best, *others = similarity.topk(min(2, len(names))).values.tolist()
    nearest = names[int(similarity.argmax())]
    return {
        "picture": str(path),
        "class": nearest if best > threshold else "unknown",
        "nearest": nearest,
        "similarity": best,
        "margin": best - others[0] if others else None,
    }


def recognise(net: model.Embedder, options: Options, threshold: float) -> tuple[list[dict], list[str]]:
    """An answer for each readable query, and an error message for each other one. Raises ValueError or OSError."""
    classes = find_classes({"": open_folder(Path(options.support))})[""]
    queries = query_pictures(options.query)
    answers, errors, rows = [], [], {}
    for name, paths in classes.items():
        found = []
        for path in paths:
            try:
                found.append(embed(net, [path]))
            except ValueError as error:
                errors.append(str(error))
        if found:
            rows[name] = torch.cat(found).mean(0)
    lost = [name for name in classes if name not in rows]
    if lost:
        raise ValueError(f"no picture can be read of class {listed(lost)}: {errors[-1]}")
    support = F.normalize(torch.stack([*rows.values()]))
    for path in queries:
        try:
            answers.append(classify(net, support, list(classes), path, threshold))
        except ValueError as error:
            errors.append(str(error))
    return answers, errors


def compare(net: model.Embedder, pair: tuple[str, str], threshold: float, stored: dict) -> dict:
    """Are two pictures of one class? Raises ValueError."""
    first, second = embed(net, [Path(path) for path in pair])
    similarity = float(first @ second)
    return {
        "a": pair[0],
        "b": pair[1],
        "answer": "same" if similarity > threshold else "different",
        "similarity": similarity,
        "probability_same": metrics.probability_same(similarity, stored["logistic"]),
    }


def show(answers: list[dict], threshold: float, stored: dict) -> None:
    """Print the answers as a table, with the threshold's expected error rates."""
    if not answers:
        return
    header = [name.replace("_", " ") for name in answers[0]]
    print(cli.text_table(header, [list(answer.values()) for answer in answers], decimals=3))
    print(f"\nthreshold {threshold:.3f}")
    if threshold == stored["value"]:
        accepts, refuses = stored["false_accept"], stored["false_reject"]
        print(
            f"on pairs of {stored['calibrated_on']} it accepts {accepts:.1f} % of different-class pairs\n"
            f"and refuses {refuses:.1f} % of same-class pairs; expect more errors on other pictures"
        )
    if "probability_same" in answers[0]:
        print("probability: assuming that half of all pairs are of one class")


def write(answers: list[dict], threshold: float, options: Options) -> None:
    if options.json:
        found = {"checkpoint": options.checkpoint, "threshold": threshold, "answers": answers}
        cli.write_json(options.json, found)
    if options.csv:
        text = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}  # names keep their bytes
        with cli.writing(options.csv) as path, open(path, "w", **text) as file:
            rows = csv.DictWriter(file, answers[0].keys() if answers else [])
            rows.writeheader()
            rows.writerows(answers)


def main(args: Sequence[str] | None = None) -> None:
    options = cli.parse(Options, __doc__, args)
    with cli.user_errors():
        check(options)
        net, saved = model.load(options.checkpoint)
        net = net.to(model.pick_device(options.device))
        stored, errors = saved["threshold"], []
        threshold = stored["value"] if options.threshold == "auto" else cli.check_threshold(options.threshold)
        if options.compare:
            answers = [compare(net, options.compare, threshold, stored)]
        else:
            answers, errors = recognise(net, options, threshold)
        show(answers, threshold, stored)
        write(answers, threshold, options)
        for error in errors:
            print(cli.printable(error), file=sys.stderr)
        if errors:
            raise ValueError(f"{len(errors)} of the pictures could not be read")


if __name__ == "__main__":
    main()
