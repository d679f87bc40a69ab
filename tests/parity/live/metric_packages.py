"""Makes the originals of the metrics importable: torch-fidelity, pytorch-fid, lpips, torchmetrics.

`make parity` puts them, and torchvision, into a folder of their own in its environment: a
torchvision whose compiled part does not fit PyTorch (as on a machine without CUDA) cannot be
imported before two of its operators are declared, and while that is so transformers and diffusers
cannot be imported either.  What other programs of that environment import stays as it was.
"""

import importlib
import sys
from pathlib import Path

import torch

# Kept for as long as the process: its operators go with it.
_DECLARED = torch.library.Library("torchvision", "FRAGMENT")


def prepare() -> None:
    """To be called before anything imports torchvision, transformers or diffusers."""
    sys.path.append(str(Path(sys.prefix) / "metrics"))
    try:
        importlib.import_module("torchvision")
    except RuntimeError as e:
        if "torchvision::nms" not in str(e):
            raise
        for name in ("nms", "qnms"):
            _DECLARED.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
