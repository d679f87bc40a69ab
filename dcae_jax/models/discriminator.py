"""PatchGAN: a small convolutional network that judges overlapping patches of an image.

Source: Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks"
(arXiv 1611.07004), appendix 6.1.2 (70 x 70 patches at three layers), without its BatchNorm, which
would couple the examples of a batch and make microbatches differ from one batch.
"""

import enum
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dcae_jax.errors import UserError
from dcae_jax.models.layers import Dtype, RMSNorm, conv2d
from dcae_jax.sharding import constrain

SIZE = 4  # of every kernel
LEAK = 0.2
INIT_STD = 0.02
GROUPS = 32
MAX_GROWTH = 8  # widths double per layer up to this multiple


class PatchNorm(enum.Enum):
    """Normalisation between the layers; each looks at one example only."""

    none = "none"
    rms = "rms"  # over channels, per pixel
    group = "group"  # GroupNorm with 32 groups


@dataclass(slots=True, unsafe_hash=True)
class PatchGANConfig:
    """The discriminator.  Weights start as N(0, 0.02), biases at 0, as in pix2pix."""

    in_channels: int = 3
    width: int = 64  # channels of the first layer
    layers: int = 3  # with stride 2; the patch a logit sees: 34, 70, 142 px for 2, 3, 4
    norm: PatchNorm = PatchNorm.none
    dtype: Dtype = Dtype.bfloat16  # of activations; logits are float32

    def smallest(self) -> int:
        """The smallest side of an image that still gives a logit."""
        return 3 * 2**self.layers  # the two last convolutions take one row off each

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        sizes = {"in_channels": self.in_channels, "width": self.width, "layers": self.layers}
        found = [f"discriminator.{k} = {v}; at least 1" for k, v in sizes.items() if v < 1]
        if PatchNorm(self.norm) is PatchNorm.group and self.width % (GROUPS // 2):
            found.append(
                f"discriminator.width = {self.width} with norm=group needs a multiple of "
                f"{GROUPS // 2} (the layers after the first are twice as wide)"
            )
        return found

    def build(self) -> "PatchGAN":
        """The network; UserError lists all problems."""
        if found := self.problems():
            raise UserError("this discriminator cannot be built:\n  - " + "\n  - ".join(found))
        return PatchGAN(self.width, self.layers, PatchNorm(self.norm), Dtype(self.dtype))


class PatchConv(nn.Module):
    """A 4x4 convolution padded by 1, with pix2pix's initialisation; kernel [4, 4, in, out]."""

    features: int
    stride: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W f"]:
        """Computes in `dtype`."""
        shape = (SIZE, SIZE, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(INIT_STD), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        dtype = self.dtype.value
        y = conv2d(x.astype(dtype), kernel.astype(dtype), self.stride)
        return y + bias.astype(dtype)


class PatchGAN(nn.Module):
    """Images to a map of logits, positive for real."""

    width: int
    layers: int
    norm: PatchNorm
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w 1"]:
        """f32 logits, for images in [-1, 1]; `layers` strided layers, one plain, one to a logit."""
        smallest = 3 * 2**self.layers
        if min(x.shape[1:3]) < smallest:
            raise UserError(
                f"the discriminator's {self.layers} strided layers need images of at least "
                f"{smallest} px; got {x.shape[1]} x {x.shape[2]}: train at a higher resolution or "
                "with fewer layers"
            )
        for i in range(self.layers + 1):
            features = self.width * min(2**i, MAX_GROWTH)
            stride = 2 if i < self.layers else 1
            x = PatchConv(features, stride, self.dtype, name=f"conv_{i}")(x)
            x = self._normalised(x, i) if i else x
            x = constrain(jax.nn.leaky_relu(x, LEAK))
        return PatchConv(1, 1, self.dtype, name="conv_out")(x).astype(jnp.float32)

    def _normalised(self, x: Float[Array, "b h w c"], index: int) -> Float[Array, "b h w c"]:
        if self.norm is PatchNorm.rms:
            return RMSNorm(name=f"norm_{index}")(x)
        if self.norm is PatchNorm.group:
            norm = nn.GroupNorm(GROUPS, epsilon=1e-5, dtype=self.dtype.value, name=f"norm_{index}")
            return norm(x)
        return x
