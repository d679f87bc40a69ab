"""What the autoencoders have in common: their configs and networks, as the tasks see them.

`DCAEConfig` and `KLVAEConfig` are such configs, `DCAE` and `KLVAE` such networks.
"""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from dcae_jax.models.layers import Dtype


@runtime_checkable
class AutoencoderConfig(Protocol):
    """The values of an autoencoder, and what follows from them.

    Patterns of parameters are regexes of module paths below "ae/", to be followed by "/.*".
    """

    in_channels: int
    latent_channels: int
    dtype: Dtype  # of activations

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, in each direction."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, c) of the latent of one image; UserError if the image does not fit."""
        ...

    def gaussian(self) -> bool:
        """Whether the encoder gives a variance beside the mean of its latent."""
        ...

    def couples_examples(self) -> bool:
        """Whether training looks at statistics of the batch (BatchNorm)."""
        ...

    def latent_layers(self) -> str:
        """The modules on both sides of the latent: phase 2 trains them."""
        ...

    def head_layers(self) -> str:
        """The decoder's modules at full resolution: phase 3 trains them."""
        ...

    def heights(self, resolution: int) -> dict[str, int]:
        """Height of the activations of each stage, by its name."""
        ...

    def resolve(self, trainable: str) -> None:
        """Derived values that depend on what trains, a pattern of whole paths ("ae/...")."""
        ...

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        ...

    def describe(self, resolution: int) -> list[str]:
        """One line per part: resolution, width, blocks, parameters."""
        ...

    def build(self) -> Any:
        """The network, an `Autoencoder`."""
        ...


@runtime_checkable
class Autoencoder(Protocol):
    """A network; call its methods through `apply(variables, ..., method=...)`."""

    def moments(
        self, x: Float[Array, "b H W c"]
    ) -> tuple[Float[Array, "b h w f"], Float[Array, "b h w f"] | None]:
        """f32 (mean, log variance) of the latent; None where there is no variance."""
        ...

    def encode(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w f"]:
        """The f32 latent: the mean."""
        ...

    def decode(self, z: Float[Array, "b h w f"]) -> Float[Array, "b H W c"]:
        """The f32 reconstruction, near [-1, 1] but not clamped."""
        ...
