"""One-shot recognition of your own pictures.

    python predict.py runs/classic/best.pt --support classes --query new.jpg more/      # classes/NAME/picture.jpg
    python predict.py runs/classic/best.pt --gallery animals.gallery --add classes      # embedded once, kept in a file
    python predict.py runs/classic/best.pt --gallery animals.gallery --query new.jpg
    python predict.py runs/classic/best.pt --compare a.jpg b.jpg

A class is a folder with one picture of it, or a few. Each query goes to the class it is most similar to, or is
"unknown" if that similarity is not above a threshold. The network need not be trained on these classes. The threshold
is such that about --false-accept of all pictures of other classes are given a name, however many classes are enrolled.
"""

from dataclasses import dataclass

import tyro

import cli


@dataclass(frozen=True)
class Options:
    checkpoint: tyro.conf.Positional[cli.Checkpoint]  # best.pt or last.pt of a run, or what export.py made of it
    support: cli.OptionalFolder = None  # folder, or a .zip file, with a folder of pictures for each class
    gallery: cli.OptionalFile = None  # file of enrolled classes; --add makes it
    add: cli.OptionalFolder = None  # make the gallery hold what this folder, like --support, holds
    remove: cli.shown_as("NAME ...", tuple[str, ...]) = ()  # classes to remove from the gallery
    list: bool = False  # list the classes of the gallery
    query: cli.shown_as("PICTURE|FOLDER ...", tuple[str, ...]) = ()  # pictures, or folders of pictures
    compare: cli.shown_as("PICTURE PICTURE", tuple[str, str] | None) = None  # two pictures: are they of one class?
    top: int = 1  # how many of the most similar classes to list
    false_accept: float = 0.1  # share of pictures of classes that are not enrolled that may be given a name
    threshold: cli.Threshold = "auto"  # auto (by --false-accept; --compare: the checkpoint's) or a similarity in -1..1
    csv: cli.OptionalFile = None  # write the answers to this file
    json: cli.OptionalFile = None  # write the answers to this file
    device: cli.Device = "auto"  # where the network runs; auto: on a GPU, if there is one


if __name__ == "__main__":
    cli.parse(Options, __doc__)  # before PyTorch is imported, so that --help takes no seconds

import csv
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import oneshot
from pictures import listed, open_folder


def check(options: Options) -> None:
    """Raise ValueError unless the options say what to do and the files can be written."""
    changes = options.add or options.remove or options.list
    if options.compare and (options.support or options.gallery or options.query or changes):
        raise ValueError("--compare goes without --support, --gallery and --query")
    if options.support and options.gallery:
        raise ValueError("give --support FOLDER or --gallery FILE, not both; --add FOLDER enrols a folder")
    if changes and not options.gallery:
        raise ValueError("--add, --remove and --list are for --gallery FILE")
    if not (options.compare or options.support and options.query or options.gallery and (options.query or changes)):
        use = "give --support FOLDER and --query PICTURES, or --compare A B"
        raise ValueError(f"{use}; or --gallery FILE with --add, --remove, --list or --query")
    if options.add and not Path(options.add).exists():
        raise ValueError(f"--add: no such folder: {options.add}")
    if options.gallery and not (options.add or Path(options.gallery).exists()):
        raise ValueError(f"no such gallery: {options.gallery}; --add FOLDER makes it")
    cli.require(options, "top", least=1)
    cli.require(options, "false_accept", most=1)
    if (options.csv or options.json) and not (options.query or options.compare):
        raise ValueError("--csv and --json take the answers about pictures; give --query or --compare")
    others = filter(None, (options.support, options.gallery, options.add))
    inputs = (options.checkpoint, *options.query, *(options.compare or ()), *others)
    for option, path in (("--csv", options.csv), ("--json", options.json)):
        cli.check_output(option, path, *inputs)
    if options.csv and options.json and Path(options.csv).resolve() == Path(options.json).resolve():
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


def enrol(gallery: oneshot.Gallery, folder: str) -> list[str]:
    """Make the gallery hold a folder's classes; returns errors of pictures. Raises ValueError or OSError."""
    changes = gallery.synchronise(folder)
    if gallery.path != ":memory:":
        done = f"{changes.added} pictures added, {changes.removed} removed, {changes.kept} kept"
        print(f"{gallery.path}: {done}; {len(gallery.names())} classes")
    if changes.empty:
        raise ValueError("\n".join([f"no picture can be read of class {listed(changes.empty)}:", *changes.errors]))
    return changes.errors


def recognise(gallery: oneshot.Gallery, queries: list[Path], top: int, threshold: float) -> tuple[list, list]:
    """A row of the table for each readable query, and {"picture", "error"} for each other one."""
    readable, embeddings, errors = [], [], []
    for path, (_, z, error) in zip(map(str, queries), gallery.recogniser.embed_each(queries), strict=True):
        if error:
            errors.append({"picture": path, "error": error})
        else:
            readable.append(path)
            embeddings.append(z)
    answers = gallery.answer(np.array(embeddings), max(2, top), threshold)
    return [as_row(path, answer, top) for path, answer in zip(readable, answers, strict=True)], errors


def as_row(picture: str, answer: oneshot.Answer, top: int) -> dict:
    """The answer about one picture as the columns of the table."""
    best, *others = answer.candidates
    row = {
        "picture": picture,
        "class": answer.name or "unknown",
        "nearest": best.name,
        "similarity": best.similarity,
        "probability": best.probability,
        "margin": best.similarity - others[0].similarity if others else None,
    }
    for place, other in enumerate(others[: top - 1], start=2):
        row |= {f"nearest_{place}": other.name, f"similarity_{place}": other.similarity}
    return row


def compare(recogniser: oneshot.Recogniser, options: Options, threshold: float | None) -> None:
    """Are two pictures of one class? The threshold is the checkpoint's unless one is given. Raises ValueError."""
    stored, (a, b) = recogniser.threshold, options.compare
    threshold = stored["value"] if threshold is None else threshold
    found = recogniser.compare(a, b)
    answer = "same" if found.similarity > threshold else "different"
    row = {"a": a, "b": b, "answer": answer, "similarity": found.similarity, "probability_same": found.probability}
    text = f"threshold {threshold:.3f}\n"
    if threshold == stored["value"]:
        accepts, refuses = stored["false_accept"], stored["false_reject"]
        text += f"on pairs of {stored['calibrated_on']} it accepts {accepts:.1f} % of different-class pairs\n"
        text += f"and refuses {refuses:.1f} % of same-class pairs; expect more errors on other pictures\n"
    tell([row], [], threshold, text + "probability: assuming that half of all pairs are of one class", options)


def gallery_text(gallery: oneshot.Gallery, threshold: float) -> str:
    """The threshold of a gallery, with its expected error rates."""
    count = len(gallery.names())
    expected, own = gallery.false_accept(threshold), gallery.recognised(threshold)
    text = f"threshold {threshold:.3f} for {count} {'class' if count == 1 else 'classes'}"
    text += f"\nexpected to give a name to {100 * expected:.3g} % of the pictures of classes that are not enrolled"
    if own is not None:
        text += f"\nof {own[1]} enrolled pictures, each left out in turn, {100 * own[0]:.1f} % are given their class"
    return text + "\nprobability: assuming that half of all pictures are of an enrolled class"


def tell(answers: list[dict], errors: list[dict], threshold: float, text: str, options: Options) -> None:
    """Print the answers as a table, with a text below, and write them to the files that are asked for."""
    if answers:
        header = [name.replace("_", " ") for name in answers[0]]
        print(cli.text_table(header, [list(answer.values()) for answer in answers], decimals=3) + "\n")
    print(text)
    if options.json:
        found = {"checkpoint": options.checkpoint, "threshold": threshold, "answers": answers, "errors": errors}
        cli.write_json(options.json, found)
    if options.csv:
        encoding = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}  # names keep their bytes
        with cli.writing(options.csv) as path, open(path, "w", **encoding) as file:
            rows = csv.DictWriter(file, answers[0].keys() if answers else [])
            rows.writeheader()
            rows.writerows(answers)


def run_gallery(recogniser: oneshot.Recogniser, options: Options, threshold: float | None) -> list[str]:
    """Change, list and ask the gallery, by default at the threshold of --false-accept; returns errors of pictures.
    Raises ValueError or OSError."""
    queries = query_pictures(options.query)
    with oneshot.Gallery(options.gallery or ":memory:", recogniser) as gallery:
        folder = options.support or options.add
        problems = enrol(gallery, folder) if folder else []
        enrolled = [name if gallery.numbers_of(name) else unicodedata.normalize("NFC", name) for name in options.remove]
        missing = [name for name in enrolled if not gallery.numbers_of(name)]
        if missing:
            none = " and no class ".join(map(repr, missing))
            raise ValueError(f"no class {none} is enrolled in {gallery.path}; nothing was removed")
        for name in dict.fromkeys(enrolled):
            print(f"{gallery.path}: {name} removed, {gallery.remove(name)} pictures")
        if options.list:
            print(cli.text_table(["class", "pictures"], [list(row) for row in gallery.names().items()]))
        if queries:
            threshold = gallery.threshold(options.false_accept) if threshold is None else threshold
            answers, errors = recognise(gallery, queries, options.top, threshold)
            tell(answers, errors, threshold, gallery_text(gallery, threshold), options)
            problems += [error["error"] for error in errors]
    return problems


def main(args: Sequence[str] | None = None) -> None:
    options = cli.parse(Options, __doc__, args)
    with cli.user_errors():
        check(options)
        threshold = None if options.threshold == "auto" else cli.check_threshold(options.threshold)
        recogniser = oneshot.load(options.checkpoint, options.device)
        if options.compare:
            return compare(recogniser, options, threshold)
        errors = run_gallery(recogniser, options, threshold)
        for error in errors:
            print(cli.printable(error), file=sys.stderr)
        if errors:
            raise ValueError(f"{len(errors)} of the pictures could not be read")


if __name__ == "__main__":
    main()
