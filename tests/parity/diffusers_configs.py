"""What the PyTorch classes are called with for each release, written from their sources.

DC-AE: `AutoencoderDC` of diffusers; sources are the published config.json files and, for Lite, 1.1
and 1.5, the official model definitions.  SD-VAE: `AutoencoderKL`.  Nothing here comes from
dcae_jax, so that lists and comparisons made with it are a second opinion.
"""

import copy
from typing import Any

R, E = "ResBlock", "EfficientViTBlock"
W6 = (128, 256, 512, 512, 1024, 1024)
FIVES = ((), (), (), (5,), (5,), (5,))


def _sides(**both: Any) -> dict[str, Any]:
    """The same value for encoder_NAME and decoder_NAME."""
    return {f"{side}_{name}": value for name, value in both.items() for side in _SIDES}


_SIDES = ("encoder", "decoder")


def _in(latent_channels: int, widths: tuple[int, ...], scaling_factor: float) -> dict[str, Any]:
    n = len(widths)
    twos = (2,) * (n - 3)
    return {
        "latent_channels": latent_channels,
        **_sides(block_out_channels=widths, block_types=(R,) * 3 + (E,) * (n - 3)),
        **_sides(qkv_multiscales=((),) * n),
        "encoder_layers_per_block": (0, 4, 8, *twos),
        "decoder_layers_per_block": (0, 5, 10, *twos),
        "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * (n - 3),
        "decoder_act_fns": ("relu",) * 3 + ("silu",) * (n - 3),
        "scaling_factor": scaling_factor,
    }


def _res_only(widths: tuple[int, ...], scaling_factor: float) -> dict[str, Any]:
    n = len(widths)
    return {
        "latent_channels": 128,
        **_sides(block_out_channels=widths, block_types=R, qkv_multiscales=((),) * n),
        **_sides(layers_per_block=(0, 5, 10) + (4,) * (n - 3)),
        "encoder_out_shortcut": False,
        "decoder_in_shortcut": False,
        "decoder_conv_act_fn": "silu",
        "scaling_factor": scaling_factor,
    }


SANA_ENCODER = {
    "latent_channels": 32,
    "encoder_block_out_channels": W6,
    "encoder_block_types": (R, R, R, E, E, E),
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "encoder_qkv_multiscales": FIVES,
    "downsample_block_type": "Conv",
    "scaling_factor": 0.41407,
}
# One entry a network: `in` and `mix` differ only in weights and scaling factor, sana-1.0 and -1.1
# only in weights, as do f32c128-1.1 and 1.5 (their factors are not published; 1 is diffusers'
# default and stands for nothing here).
DC_AE: dict[str, dict[str, Any]] = {
    "f32c32-in": _in(32, W6, 0.3189),
    "f64c128-in": _in(128, (*W6, 2048), 0.2889),
    "f128c512-in": _in(512, (*W6, 2048, 2048), 0.4883),
    "f32c32-sana": {
        **SANA_ENCODER,
        "decoder_block_out_channels": W6,
        "decoder_block_types": (R, R, R, E, E, E),
        "decoder_layers_per_block": (3,) * 6,
        "decoder_qkv_multiscales": FIVES,
        "upsample_block_type": "interpolate",
    },
    "f32c32-lite": {
        **SANA_ENCODER,
        "decoder_block_out_channels": W6,
        "decoder_block_types": R,
        "decoder_layers_per_block": (0, 3, 5, 4, 4, 4),
        "decoder_qkv_multiscales": ((),) * 6,
        "decoder_conv_act_fn": "silu",
    },
    "f32c128-1.5": _res_only(W6, 1.0),
    "f64c128-1.5": _res_only((*W6, 1024), 0.5935),
}
SD_VAE_F8: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 32, "sample_size": 256, "scaling_factor": 0.18215,
}  # fmt: skip


def narrow(name: str, divisor: int = 8) -> dict[str, Any]:
    """A release with its depths and all widths divided; f128c512's latent is divided as well.

    By 8 an EfficientViT stage has 2 to 8 heads of 32 channels.
    """
    arguments = copy.deepcopy(DC_AE[name])
    for side in _SIDES:
        key = f"{side}_block_out_channels"
        arguments[key] = tuple(w // divisor for w in arguments[key])
    if name == "f128c512-in":
        arguments["latent_channels"] //= divisor
    return arguments
