"""Writes tests/parity/keys/NAME.LAYOUT.txt: every tensor of each release, from the PyTorch classes.

    .venv-parity/bin/python tests/parity/make_keys.py
    PYTHONPATH=DC-Gen .venv-parity/bin/python tests/parity/make_keys.py --official

The first line needs torch and diffusers and writes the diffusers layout; the second needs the
official classes as well (see official.py) and writes the official layout.  Networks are built
without memory for weights.  Nothing is read from dcae_jax.
"""

import argparse
import math

import diffusers_configs
import key_lists
import official
import torch
from torch import nn

# Parameters without BatchNorm's statistics, and tensors of the official and diffusers layouts.
TOTALS = {
    "f32c32-in": (323_356_460, 338, 362),
    "f64c128-in": (676_896_140, 386, 418),
    "f128c512-in": (1_120_682_252, 434, 474),
    "f32c32-sana": (312_250_275, 339, 375),
    "f32c32-lite": (421_181_228, 275, 293),
    "f32c128-1.5": (523_609_740, 296, 296),
    "f64c128-1.5": (714_741_644, 340, 340),
    "sd-vae-f8": (83_653_863, None, 248),
}
DTYPES = {torch.float32: "F32", torch.int64: "I64"}


def lines(model: nn.Module) -> list[str]:
    """One line a tensor, in the order of the state dict."""
    return [
        f"{key} {DTYPES[tensor.dtype]} {','.join(map(str, tensor.shape))}".rstrip()
        for key, tensor in model.state_dict().items()
    ]


def write(name: str, layout: str, model: nn.Module) -> None:
    """Writes the list after checking the totals."""
    parameters = sum(math.prod(p.shape) for p in model.parameters())
    found = lines(model)
    expected, in_official, in_diffusers = TOTALS[name]
    assert parameters == expected, (name, parameters, expected)
    count = in_official if layout == "official" else in_diffusers
    assert len(found) == count, (name, layout, len(found), count)
    path = key_lists.FOLDER / f"{name}.{layout}.txt"
    path.write_text("\n".join(found) + "\n")
    print(f"{path.name:28} {len(found):4} tensors {parameters:14,} parameters")


def write_diffusers() -> None:
    """The diffusers layout of all releases."""
    from diffusers import AutoencoderDC, AutoencoderKL

    for name, arguments in diffusers_configs.DC_AE.items():
        with torch.device("meta"):
            model = AutoencoderDC(**arguments)
        write(name, "diffusers", model)
    with torch.device("meta"):
        kl = AutoencoderKL(**diffusers_configs.SD_VAE_F8)
    write("sd-vae-f8", "diffusers", kl)


def write_official() -> None:
    """The official layout; releases of one network are checked to have the same tensors."""
    for name, releases in official.RELEASES.items():
        with torch.device("meta"):
            models = [official.build(release) for release in releases]
        for release, model in zip(releases, models, strict=True):
            assert lines(model) == lines(models[0]), f"{release} is another network than {name}"
        write(name, "official", models[0])


def main() -> None:
    """Writes one layout and prints its totals."""
    parser = argparse.ArgumentParser(description="Write the tensor lists of the PyTorch classes.")
    parser.add_argument("--official", action="store_true", help="the official layout, from dc_gen")
    key_lists.FOLDER.mkdir(exist_ok=True)
    write_official() if parser.parse_args().official else write_diffusers()
    total = sum(p.stat().st_size for p in key_lists.FOLDER.iterdir())
    print(f"{total / 1024:.0f} KiB in {key_lists.FOLDER}")


if __name__ == "__main__":
    main()
