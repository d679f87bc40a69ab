"""Writes inception.npz: features of the PyTorch originals at a 16th of their width.

    .venv-parity/bin/python tests/parity/make_inception_fixtures.py

(`make parity` makes that environment.)  pytorch-fid resizes as `Resize.half_pixel`, torch-fidelity
as `Resize.tf1`.  Weights and images come from numpy seeds on both sides: only results are stored.
The classes are the originals': narrow, since their convolutions and their last layer divide the
channels they are asked for.
"""

import contextlib
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
DIVISOR = 16
SIZES = ((64, 64), (96, 40), (320, 320))  # height, width


def images(height: int, width: int, n: int = 2) -> np.ndarray:
    """uint8 images that are smooth in part and rough in part, and differ from each other."""
    rng = np.random.default_rng(height * 1000 + width)
    rows, columns = np.arange(height)[:, None, None], np.arange(width)[:, None]
    found = []
    for _ in range(n):
        waves = rng.uniform(-0.2, 0.2, (2, 4, 3))
        smooth = sum(np.cos(rows * a + columns * b) for a, b in zip(*waves, strict=True))
        noise = rng.normal(0, 20, (height, width, 3)) * (columns > width // 2)
        found.append(128 + 30 * smooth + noise + rng.uniform(-20, 20, 3))
    return np.clip(np.stack(found), 0, 255).astype(np.uint8)


@contextlib.contextmanager
def narrow(module: types.ModuleType, divisor: int) -> Iterator[None]:
    """While it lasts, networks built by the module have a `divisor`-th of the channels."""
    conv, nn = module.BasicConv2d, module.nn
    init = conv.__init__

    def fewer(self: Any, inputs: int, out: int, **options: Any) -> None:
        init(self, inputs if inputs == 3 else inputs // divisor, out // divisor, **options)

    def linear(inputs: int, out: int) -> Any:
        return nn.Linear(inputs // divisor, out)

    conv.__init__ = fewer
    module.nn = types.SimpleNamespace(**{**vars(nn), "Linear": linear})
    try:
        yield
    finally:
        conv.__init__, module.nn = init, nn


def pytorch_fid(state: Mapping[str, np.ndarray], divisor: int) -> Callable[[Any], Any]:
    """uint8 NCHW tensor -> pool, spatial by pytorch-fid's InceptionV3."""
    import pytorch_fid.inception
    import torch
    import torchvision.models.inception

    tensors = {name: torch.from_numpy(value) for name, value in state.items()}
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: tensors
    with narrow(torchvision.models.inception, divisor):
        net = pytorch_fid.inception.InceptionV3([3]).eval()
    seen = _watch(net.blocks[2][6].branch1x1)

    def run(x: Any) -> dict[str, np.ndarray]:
        with torch.no_grad():
            pool = net(x.float() / 255)[0]
        return {"pool": pool[:, :, 0, 0].numpy(), "spatial": _spatial(seen[-1])}

    return run


def torch_fidelity(state: Mapping[str, np.ndarray], divisor: int) -> Callable[[Any], Any]:
    """uint8 NCHW tensor -> pool, spatial, unbiased logits by torch-fidelity's extractor."""
    import torch
    import torch_fidelity.feature_extractor_inceptionv3 as module

    with tempfile.TemporaryDirectory() as folder, narrow(module, divisor):
        path = Path(folder) / "weights.pth"
        torch.save({name: torch.from_numpy(value) for name, value in state.items()}, path)
        net = module.FeatureExtractorInceptionV3("it", ["2048", "logits_unbiased"], str(path))
    seen = _watch(net.Mixed_6d.branch1x1)

    def run(x: Any) -> dict[str, np.ndarray]:
        with torch.no_grad():
            pool, logits = net(x)
        spatial = _spatial(seen[-1])
        return {"pool": pool.numpy(), "spatial": spatial, "logits": logits.numpy()}

    return run


def _watch(layer: Any) -> list[Any]:
    seen: list[Any] = []
    layer.register_forward_hook(lambda _, __, out: seen.append(out))
    return seen


def _spatial(out: Any) -> np.ndarray:
    """As guided-diffusion's evaluator takes them from its NHWC graph."""
    return out[:, :7].permute(0, 2, 3, 1).reshape(len(out), -1).numpy()


def main() -> None:
    sys.path[:0] = [str(HERE.parents[1]), str(HERE / "live")]
    import metric_packages

    metric_packages.prepare()
    import torch

    from dcae_jax.nets import inception

    state = inception.random_state(0, DIVISOR)
    found = {}
    for rule, build in (("half_pixel", pytorch_fid), ("tf1", torch_fidelity)):
        run = build(state, DIVISOR)
        for height, width in SIZES:
            result = run(torch.from_numpy(images(height, width)).permute(0, 3, 1, 2))
            found |= {f"{rule}/{height}x{width}/{name}": v for name, v in result.items()}
    np.savez_compressed(HERE / "inception.npz", **found)
    print(f"inception.npz {(HERE / 'inception.npz').stat().st_size} bytes")


if __name__ == "__main__":
    main()
