"""What nvcc makes of the CUDA kernels, on machines without a GPU too: they compile without PyTorch for every
architecture, keep everything in registers, and the extension library loads. `python tests/test_cuda_build.py` prints
the table of docs/cuda.md."""

import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # when run as a script

import setup as build  # noqa: E402
import triplet  # noqa: E402

ARCHITECTURES = (75, 80, 90, 100, 120)
TOOLKIT = build.find_toolkit(torch.version.cuda, build.toolkit_candidates())[0]
REQUIRED = os.environ.get("ONESHOT_CUDA") == "1"  # then a missing toolkit or library is a failure
pytestmark = pytest.mark.slow
needs_nvcc = pytest.mark.skipif(TOOLKIT is None and not REQUIRED, reason="no CUDA toolkit")

# every kernel that the op launches, and no other
SOURCE = """
#include "cuda/launch.cuh"

namespace triplet::gpu {
struct Launch {
  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, Arguments... arguments) {
    kernel<<<grid, kThreads>>>(Parameters(arguments)...);
  }
};

template <typename In, typename T>
void all_kernels(Launch& launch, const Batch<In>& batch, const Settings& settings, const Upstream<T>& up) {
  Arena arena{nullptr};
  Workspace<T> work(batch, 0, 0, arena);
  const Scratch<T> scratch(batch, settings, Machine{}, 0, arena);
  forward(launch, Machine{}, batch, settings, work, scratch, Outputs<T>{});
  recompute(launch, batch, settings, work, nullptr, nullptr);
  backward(launch, batch, settings, work, scratch, up, static_cast<In*>(nullptr), 0);
}
"""
SOURCE += "".join(
    f"template void all_kernels(Launch&, const Batch<{kind}>&, const Settings&, const Upstream<{inside}>&);\n"
    for kind, inside in (("float", "float"), ("double", "double"), ("Bfloat16", "float"), ("Float16", "float"))
)
SOURCE += "}  // namespace triplet::gpu\n"


class Kernel(NamedTuple):
    """What ptxas says of a kernel: bytes on the stack or spilled, registers of a thread, bytes of shared memory."""

    name: str
    stack: int
    spilled: int
    registers: int
    shared: int

    def blocks(self, processor: "Processor") -> int:
        """Blocks of 256 threads that a processor holds at a time."""
        by_registers = 65536 // (256 * -(-self.registers // 8) * 8)
        by_shared = processor.shared // (self.shared + 1024) if self.shared else 32
        return min(processor.threads // 256, by_registers, by_shared)


class Processor(NamedTuple):
    """A streaming multiprocessor: threads and bytes of shared memory (CUDA C++ Programming Guide, table of compute
    capabilities). A block takes 1 KB more than it asks for."""

    threads: int
    shared: int


H100 = Processor(2048, 228 << 10)
NUMBERS = ("none", "bfloat16", "float16", "split")  # of csrc/cuda/common.cuh


def compiled(folder: Path, architecture: int) -> list[Kernel]:
    """The kernels, compiled for one architecture without PyTorch's headers."""
    assert TOOLKIT is not None, f"ONESHOT_CUDA=1, but there is no CUDA toolkit for PyTorch's CUDA {torch.version.cuda}"
    source = folder / "kernels.cu"
    source.write_text(SOURCE)
    command = [TOOLKIT / "bin" / "nvcc", "-std=c++17", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v"]
    command += ["-I", ROOT / "csrc", source, "-o", folder / f"sm_{architecture}.cubin"]
    done = subprocess.run(command, capture_output=True, text=True)
    said = subprocess.run("c++filt", input=done.stdout + done.stderr, capture_output=True, text=True).stdout
    assert done.returncode == 0 and "warning" not in said.lower(), said
    said = said.replace("triplet::gpu::", "").replace("(anonymous namespace)::", "")
    said = re.sub(r"\(Numbers\)(\d)", lambda match: NUMBERS[int(match[1])], said)
    report = re.findall(
        r"Compiling entry function '(?:void )?([^'(]+)\(.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?"
        r"Used (\d+) registers(?:.*?(\d+) bytes smem)?",
        re.sub(r"\n(?!ptxas info +: Compiling)", " ", said),
    )
    return [Kernel(name, *(int(number or 0) for number in numbers)) for name, *numbers in report]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def kernels(folder):
    """Architecture to kernels; compiled two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ARCHITECTURES, pool.map(lambda sm: compiled(folder, sm), ARCHITECTURES), strict=True))


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_keep_everything_in_registers(kernels, architecture):
    found = kernels[architecture]
    names = {kernel.name for kernel in found}
    assert {
        "search_pairs<float, float, 8, false>",
        "search_pairs<double, double, 4, true>",
        "search_pairs_mma<bfloat16, true>",
        "search_pairs_mma<split, false>",
        "row_gradient<float, float>",
        "measure_pairs<double, double>",
        "measure_pairs_mma<split, float>",
        "measure_pairs_mma<bfloat16, Bfloat16>",
        "pull_rows<float, float>",
    } <= names
    assert len(names) == len(found) > 60
    assert [kernel for kernel in found if kernel.stack or kernel.spilled] == []
    assert [kernel for kernel in found if kernel.shared > 48 << 10] == []  # what a block has without asking for more


@needs_nvcc
def test_two_blocks_of_the_product_tiles_share_a_processor(kernels):
    tiles = [kernel for kernel in kernels[90] if re.match("search_pairs|measure_pairs", kernel.name)]
    assert len(tiles) == 29 and all(kernel.blocks(H100) >= 2 for kernel in tiles)


def loops_of(code: str) -> list[list[str]]:
    """The operations of each loop in a function's machine code, without their modifiers."""
    lines = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", code)]
    operations = [re.sub(r"^@\S+ +", "", what).split()[0].split(".")[0] for _, what in lines]
    assert not {"LDL", "STL"} & {*operations}  # local memory
    place, loops = {at: n for n, (at, _) in enumerate(lines)}, []
    for n, (_, what) in enumerate(lines):
        target = re.search(r"BRA .*?0x([0-9a-f]+)", what)
        if target and (start := place.get(int(target[1], 16), n)) < n:
            loops.append(operations[start : n + 1])
    return loops


@needs_nvcc
def test_the_machine_code_of_loops(kernels, folder):
    """Few instructions beside the products in a loop over columns or pairs of rows; four or five for a triplet, eight
    with the soft margin, and forward four more for each logarithm. And what the emulation cannot see: fences and atomic
    operations between blocks, and that products are not fused with sums where the last digit decides."""
    disassembler = importlib.util.find_spec("triton").submodule_search_locations[0] + "/backends/nvidia/bin/cuobjdump"
    command = [disassembler, "-sass", folder / "sm_90.cubin"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.split(r"Function : (\S+)", text)[1:]
    on_tensor_cores = in_triplets = 0
    for name, code in zip(functions[::2], functions[1::2], strict=True):
        loops = loops_of(code)
        marks = re.findall(r"MEMBAR|BAR\.SYNC|BAR\.RED|ATOMG\.E\.(?:ADD|MAX\.64|MAX)", code)
        if re.search(r"gpu\d+(finish|sum_triplets)I", name):  # the last block to end adds what all have written
            assert "MEMBAR ATOMG.E.ADD MEMBAR BAR.RED" in " ".join(marks), (name, marks)
        elif re.search(r"gpu\d+pull_rowsI", name):
            assert "MEMBAR BAR.SYNC ATOMG.E.ADD BAR.RED MEMBAR" in " ".join(marks), (name, marks)
        elif "search_pairs" in name:
            assert {"ATOMG.E.MAX", "ATOMG.E.MAX.64"} <= {*marks}, (name, marks)
        elif "choose_positives" in name:
            sums = [body for body in loops if "DADD" in body and len(body) < 200]
            assert any("DMUL" in body for body in sums) and not any("DFMA" in body for body in sums), name
        if re.search(r"gpu\d+\w+_(pairs|rows|triplets)Id", name):
            continue  # of doubles
        if "pairs_mma" in name:
            products, length = max((body.count("HMMA"), len(body)) for body in loops)
            assert products in (32, 64) and length <= 4 * products, (name, products, length)
            on_tensor_cores += 1
        elif re.search("search_pairs|measure_pairs|pull_rows", name):
            products, length = max((body.count("FFMA"), len(body)) for body in loops)
            most = 3 if "pull_rows" in name else 2
            assert products >= 128 and length <= most * products, (name, products, length)
        elif "_triplets" in name:
            hinge = min(len(body) for body in loops if body.count("FADD") >= 64)  # 4 positives x 8 negatives
            soft = min(len(body) for body in loops if body.count("FMUL") >= 32)
            assert hinge <= 32 * 5.5, (name, hinge)
            assert soft <= 32 * (13 if "sum_triplets" in name else 8.5), (name, soft)
            in_triplets += 1
    assert (on_tensor_cores, in_triplets) == (11, 6)


@pytest.mark.skipif(importlib.util.find_spec("oneshot_C_cuda") is None and not REQUIRED, reason="built without CUDA")
def test_the_library_loads_without_a_gpu():
    """And registers the op for CUDA; without a GPU to run on, it says so, and `auto` takes the torch implementation."""
    why = triplet.cuda_library()
    assert why == "" if torch.cuda.is_available() else "not built for this GPU" in why, why
    assert "not built for this GPU" in triplet.cuda_library(torch.cuda.device_count())  # asked about each GPU
    for name in ("forward", "backward", "forward_saving", "backward_saved"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"oneshot::triplet_{name}", "CUDA")
    library = Path(importlib.util.find_spec("oneshot_C_cuda").origin).read_bytes()
    assert b"libtorch_cuda.so" in library and b"libtorch_python" not in library and b"libcudart.so" not in library


def main() -> None:
    """Registers, shared memory and theoretical occupancy on an H100 of each kernel but those for halves, as a table."""
    folder = ROOT / "build"
    folder.mkdir(exist_ok=True)
    print("| kernel | registers | shared memory, bytes | blocks | occupancy |\n|---|---|---|---|---|")
    for kernel in sorted(
        kernel for kernel in compiled(folder, 90) if not re.search(r"loat16, float|split, \w*loat16", kernel.name)
    ):
        blocks = kernel.blocks(H100)
        share = f"{100 * blocks * 256 // H100.threads} %"
        print(f"| `{kernel.name}` | {kernel.registers} | {kernel.shared} | {blocks} | {share} |")


if __name__ == "__main__":
    main()
