"""Write a checkpoint's embedding model to one file: pixels in, embeddings of length 1 out, any number of images.

    python export.py runs/classic/best.pt                           # best.onnx, for ONNX Runtime
    python export.py runs/classic/best.pt --format torch            # best.pt2, for torch.export.load

The file is checked before it is written: loaded again, it must embed random images, or test images with --data, as
PyTorch does. Threshold, criterion, classes and commit are stored in it as metadata. Two pictures are of one class if
the dot product of their embeddings is above the threshold.
"""

from dataclasses import dataclass
from typing import Literal

import tyro

import cli


@dataclass(frozen=True)
class Options:
    checkpoint: tyro.conf.Positional[cli.Checkpoint]  # best.pt or last.pt of a run
    format: Literal["onnx", "torch"] = "onnx"  # onnx: for ONNX Runtime; torch: for torch.export.load
    out: cli.OptionalFile = None  # file to write; default: beside the checkpoint
    pixels: Literal["uint8", "float32"] = "uint8"  # input type of the exported model; 0..255 either way
    data: cli.OptionalDataSource = None  # data set whose test images check the export; by default random images do
    data_root: cli.Folder = "data"  # folder for downloads and caches


if __name__ == "__main__":
    cli.parse(Options, __doc__)  # before PyTorch is imported, so that --help takes no seconds

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import checkpoints
import sources
from model import Embedder, PixelEmbedder

BOUND = 1e-5  # largest allowed difference between numbers of two embeddings of length 1
PREPROCESSING = (
    "EXIF orientation applied; centre square; Pillow's resize to {0} x {0}, Resampling.BICUBIC with the square as box; "
    "its central {1} x {1}; transparent parts white; RGB"
)
BATCHES = (1, 7, 64)  # batch sizes that the check tries
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
Embed = Callable[[Tensor], Tensor]


def trace(net: PixelEmbedder, pixels: str) -> torch.export.ExportedProgram:
    """The computation for any number of images."""
    net = net.to(memory_format=torch.contiguous_format)  # weights are saved whole, not as strided views
    size = net.net.size
    example = torch.zeros(2, 3, size, size, dtype=getattr(torch, pixels))
    return torch.export.export(net, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


def to_torch(program: torch.export.ExportedProgram, metadata: dict[str, str]) -> tuple[bytes, Embed]:
    """The file, and the function it computes when loaded again."""
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata)})
    loaded = torch.export.load(io.BytesIO(file.getvalue())).module()
    return file.getvalue(), loaded


def to_onnx(program: torch.export.ExportedProgram, metadata: dict[str, str]) -> tuple[bytes, Embed]:
    """The file, and the function ONNX Runtime computes from it. Raises ValueError without the packages this needs."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"ONNX needs more packages ({error.name}): pip install -e '.[onnx]'") from error
    names = {"input_names": ["images"], "output_names": ["embeddings"], "dynamic_shapes": ({0: "batch"},)}
    exported = torch.onnx.export(program, **names, dynamo=True, verbose=False)
    exported.model.metadata_props.update(metadata | {"sha256": "0" * 64})
    file = exported.model_proto.SerializeToString()
    file = file.replace(b"0" * 64, hashlib.sha256(file).hexdigest().encode())  # as oneshot.load checks it
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return file, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def random_images(count: int, side: int) -> Tensor:
    """Coarse and fine patterns, (count, 3, side, side) uint8; the same each time."""
    generator = torch.Generator().manual_seed(0)
    coarse, fine = (torch.rand(count, 3, size, size, generator=generator) for size in (4, side))
    coarse = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return ((0.8 * coarse + 0.2 * fine) * 255).to(torch.uint8)


def largest_difference(exported: Embed, net: PixelEmbedder, images: Tensor) -> float:
    """Between the embeddings of batches of `images` (N, 3, size, size), exported and by PyTorch."""
    batches = [images[:size].contiguous() for size in BATCHES]
    differences = torch.cat([exported(batch) - net(batch) for batch in batches]).abs()
    return float(differences.nan_to_num(nan=torch.inf).max())


def describe(net: Embedder, saved: dict, pixels: str) -> dict[str, str]:
    """The metadata: plain text, or JSON where it is more. "recogniser" is what oneshot.load needs."""
    facts, threshold, size = saved["data"], saved["threshold"], net.size
    kept = ("value", "criterion", "false_accept", "false_reject", "calibrated_on")
    return {
        **{"threshold" if name == "value" else name: str(threshold.get(name)) for name in kept},
        "logistic": json.dumps(threshold["logistic"]),
        "classes": json.dumps(facts["classes"]),
        "seen": json.dumps(facts["seen"]),
        "recogniser": json.dumps(checkpoints.recogniser_facts(net, saved)),
        "input": f"{pixels} RGB pixels 0..255, {size} x {size}",
        "preprocessing": PREPROCESSING.format(size + 2 * net.border, size),
        "data": str(facts.get("name")),
        "commit": str(saved.get("commit")),
    }


def main(args: Sequence[str] | None = None) -> None:
    options = cli.parse(Options, __doc__, args)
    with cli.user_errors():
        net, saved = checkpoints.load(options.checkpoint)
        recogniser, size = PixelEmbedder(net).eval(), net.size
        out = Path(options.out or Path(options.checkpoint).with_suffix(SUFFIXES[options.format]))
        cli.check_output("--out", out, options.checkpoint, *([options.data] if options.data else []))
        if out.suffix != SUFFIXES[options.format] and (out.is_file() or not out.exists()):
            raise ValueError(f"--out: {out} should end in {SUFFIXES[options.format]} for --format {options.format}")
        images = random_images(max(BATCHES), size)
        if options.data is not None:
            test = sources.load(options.data, options.data_root, size, net.border).test
            images = test.pixels(slice(max(BATCHES)))
        if images.shape[2] != size:
            raise ValueError(f"the images of --data are of {images.shape[2]} pixels, the checkpoint's of {size}")
        write = {"onnx": to_onnx, "torch": to_torch}[options.format]
        metadata = describe(net, saved, options.pixels)
        file, exported = write(trace(recogniser, options.pixels), metadata)
        images = images.to(getattr(torch, options.pixels))
        difference = largest_difference(exported, recogniser, images)
        kind = "random" if options.data is None else "test"
        print(f"largest difference from PyTorch, {len(images)} {kind} images: {difference:.1e} (allowed: {BOUND:.0e})")
        if difference > BOUND:
            raise ValueError(f"the exported model differs from PyTorch by {difference:.1e}; nothing was written")
        with cli.writing(out) as temporary:
            temporary.write_bytes(file)
    print(f"wrote {out}, {len(file) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
