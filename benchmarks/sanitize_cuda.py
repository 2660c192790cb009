"""Every kind of forward and backward pass of the CUDA op once, for compute-sanitizer to watch.

compute-sanitizer --tool memcheck --kernel-name kns=triplet --error-exitcode 9 python benchmarks/sanitize_cuda.py
compute-sanitizer --tool racecheck --kernel-name kns=triplet --error-exitcode 9 python benchmarks/sanitize_cuda.py
"""

import sys
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from triplet import DISTANCES, MININGS, TYPES, triplet_loss  # noqa: E402

WIDTH, OTHERS, CLASSES = 70, 50, 20
LARGE_TILES = (torch.float32, torch.bfloat16)  # at 2200 rows; the latter on tensor cores for cosine


def main() -> None:
    torch.manual_seed(0)
    ran = 0
    for rows, dtype, distance, mining, soft in product((33, 257, 2200), TYPES, DISTANCES, MININGS, (False, True)):
        if (soft and mining != "all") or (rows == 2200 and (mining == "all" or dtype not in LARGE_TILES)):
            continue
        x, far = (torch.randn(n, WIDTH, device="cuda").to(dtype).requires_grad_() for n in (rows, OTHERS))
        with torch.no_grad():
            x[1] = 0  # nearest to many: more than a list holds
        labels, far_labels = (torch.randint(CLASSES, (n,), device="cuda") for n in (rows, OTHERS))
        options = {"distance": distance, "mining": mining, "soft_margin": soft, "others": (far, far_labels)}
        triplet_loss(x, labels, impl="native", **options).backward()
        ran += 1
    torch.cuda.synchronize()
    print(f"{ran} passes, forward and backward")


if __name__ == "__main__":
    main()
