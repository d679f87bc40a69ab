"""Diffusion processes: x_t = alpha(t) x0 + sigma(t) eps, what a network predicts of it, the loss.

Time is in [0, 1] for every process, 0 = data and 1 = noise; `network_time` is what each family of
networks was trained on.  All functions compute in float32 (in float64 where they are given it).
"""

import copy
import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from dcae_jax.errors import UserError

Latents = Float[Array, "b h w c"]
Times = Float[Array, " b"]

STEPS = 1000  # of the discrete processes, all of them
# Divisions by sigma(0) = 0 of the flow stay finite; no time above 1e-4 is changed by it.
_SIGMA_FLOOR = 1e-4


class Kind(enum.Enum):
    """The forward process."""

    scaled_linear = "scaled_linear"  # UViT: n = 1..1000, t = n / 1000, networks see n
    ddpm = "ddpm"  # DiT: i = 0..999, t = (i + 1) / 1000, networks see i
    flow = "flow"  # SiT, USiT: alpha = 1 - t, sigma = t, networks see 1 - t


class Space(enum.Enum):
    """What a network predicts, or where its error is measured."""

    eps = "eps"
    v = "v"  # discrete processes: alpha eps - sigma x0; flow: x0 - eps
    x0 = "x0"


class TimeDraw(enum.Enum):
    """How training times are drawn."""

    uniform = "uniform"  # discrete processes: over their 1000 integers
    logit_normal = "logit_normal"  # flow: the sigmoid of a normal (SD3, arXiv 2403.03206)


class Prediction(NamedTuple):
    """What a network says of x_t, in every form a sampler may want."""

    x0: Latents
    eps: Latents
    # Learned log variance of a step, as the share of log beta in its mix with log beta~; else None.
    variance_mix: Latents | None


@dataclass(slots=True)
class ProcessConfig:
    """The process, the target and the weighting.  The default is UViT's (spec: VP, epsilon)."""

    kind: Kind = Kind.scaled_linear
    predict: Space = Space.eps
    loss_space: Space = Space.eps
    times: TimeDraw = TimeDraw.uniform
    time_mean: float = 0.0  # of the normal below the sigmoid; above 0: more noise
    time_std: float = 1.0
    # Flow, training and sampling: t -> s t / (1 + (s - 1) t).  Published: 1; for latents of n
    # numbers, modern recipes take sqrt(n / 4096).
    shift: float = 1.0
    min_snr: float = 0.0  # gamma of arXiv 2303.09556; 0: off.  It sets the weight in any loss_space
    learn_variance: bool = False  # ddpm: 2c output channels, the second half for the log variance

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = _number_problems(self)
        return found + (_flow_problems(self) if self.is_flow else _discrete_problems(self))

    @property
    def is_flow(self) -> bool:
        """True for the linear path, False for the discrete processes."""
        return Kind(self.kind) is Kind.flow

    def build(self) -> "Process":
        """The process; UserError lists all problems."""
        if found := self.problems():
            raise UserError(
                "this process cannot be built:\n" + "\n".join(f"  - {p}" for p in found)
            )
        cfg = copy.copy(self)
        cfg.kind, cfg.times = Kind(cfg.kind), TimeDraw(cfg.times)
        cfg.predict, cfg.loss_space = Space(cfg.predict), Space(cfg.loss_space)
        return Flow(cfg) if cfg.is_flow else DiscreteProcess(cfg)


def _number_problems(cfg: ProcessConfig) -> list[str]:
    found = []
    if not (math.isfinite(cfg.shift) and cfg.shift > 0):
        found.append(f"process.shift = {cfg.shift} is not positive; 1 leaves times as they are")
    if not (math.isfinite(cfg.min_snr) and cfg.min_snr >= 0):
        found.append(f"process.min_snr = {cfg.min_snr} is negative; 0 switches it off, 5 is usual")
    if not (math.isfinite(cfg.time_std) and cfg.time_std > 0):
        found.append(f"process.time_std = {cfg.time_std} is not positive; 1 is usual")
    if not math.isfinite(cfg.time_mean):
        found.append(f"process.time_mean = {cfg.time_mean} is not a number; 0 is usual")
    if TimeDraw(cfg.times) is TimeDraw.uniform and (cfg.time_mean, cfg.time_std) != (0.0, 1.0):
        found.append(
            "process.time_mean and time_std shape logit-normal times, but process.times is "
            "uniform; set times=logit_normal, or leave them at 0 and 1"
        )
    return found


def _flow_problems(cfg: ProcessConfig) -> list[str]:
    found = []
    predict, space = Space(cfg.predict), Space(cfg.loss_space)
    uniform = TimeDraw(cfg.times) is TimeDraw.uniform
    if predict is Space.eps:
        found.append(
            "process.predict = eps does not fit the flow: at t = 1, where samplers start, alpha "
            "is 0 and eps says nothing of the data; use predict=v or x0"
        )
    if predict is Space.x0 and space is not Space.x0 and uniform and not cfg.min_snr:
        found.append(
            f"process.predict = x0 with loss_space = {space.value} on the flow weighs errors by "
            "1/t^2, which has no mean under uniform times; use times=logit_normal, "
            "loss_space=x0, or min_snr=5"
        )
    if cfg.learn_variance:
        found.append(
            "process.learn_variance needs kind=ddpm: the flow's samplers have no variance to "
            "learn; switch it off"
        )
    return found


def _discrete_problems(cfg: ProcessConfig) -> list[str]:
    found = []
    kind = Kind(cfg.kind)
    if TimeDraw(cfg.times) is not TimeDraw.uniform:
        found.append(
            f"process.times = logit_normal needs kind=flow: {kind.value} is trained on its "
            "1000 integers, drawn uniformly; use times=uniform"
        )
    if cfg.shift != 1.0:
        found.append(
            f"process.shift = {cfg.shift} needs kind=flow: {kind.value} has a fixed schedule; "
            "use shift=1"
        )
    if cfg.learn_variance and kind is not Kind.ddpm:
        found.append(
            f"process.learn_variance needs kind=ddpm, not {kind.value}: no released network of "
            "it has the second half of channels; switch it off, or use kind=ddpm"
        )
    return found


# ------------------------------------------------------------------------------------ processes


def _wide(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """At least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _rows(values: Shaped[Array, " b"], x: Float[Array, "b ..."]) -> Shaped[Array, "b ..."]:
    """One value per example, shaped to multiply x."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def _mean(x: Float[Array, "b ..."]) -> Times:
    """Mean over all but the first axis."""
    return x.mean(axis=tuple(range(1, x.ndim)))


class Process:
    """See ProcessConfig; `Flow` and `DiscreteProcess` say what alpha, sigma and times are."""

    def __init__(self, cfg: ProcessConfig):
        self.cfg = cfg

    # ------------------------------------------------------------------------- what kinds differ in

    def alpha(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """The factor of the data."""
        raise NotImplementedError

    def sigma(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """The factor of the noise."""
        raise NotImplementedError

    def log_snr(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """log(alpha^2 / sigma^2), twice the lambda of DPM-Solver; infinite where one is 0."""
        raise NotImplementedError

    def network_time(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """What the network is told."""
        raise NotImplementedError

    def draw_times(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Training times."""
        raise NotImplementedError

    def quantile(self, share: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """The time that a share of the training times lies below."""
        raise NotImplementedError

    def share(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """The share of the training times up to t."""
        raise NotImplementedError

    def shifted(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """The sampling time at the uniform time t."""
        raise NotImplementedError

    def unshifted(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """The inverse of `shifted`."""
        raise NotImplementedError

    def scale(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """x_t / scale(t) is a straight line in clock(t) if the network is exact and certain."""
        raise NotImplementedError

    def clock(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """What fixed ODE steps go along: t itself for the flow, sigma / alpha for the discrete."""
        raise NotImplementedError

    def direction(self, prediction: Prediction) -> Latents:
        """d(x_t / scale) / d clock along the probability-flow ODE."""
        raise NotImplementedError

    def angle(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """What adaptive ODE steps go along; d x_t / d angle is v up to its sign."""
        raise NotImplementedError

    def time_of(self, angle: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """The inverse of `angle`."""
        raise NotImplementedError

    def velocity(self, prediction: Prediction, t: Times) -> Latents:
        """d x_t / d angle along the probability-flow ODE."""
        raise NotImplementedError

    def _v(self, x0: Latents, eps: Latents, t: Times) -> Latents:
        raise NotImplementedError

    def _from_v(self, v: Latents, x_t: Latents, t: Times) -> tuple[Latents, Latents]:
        raise NotImplementedError

    # ------------------------------------------------------------------------------ what is common

    def diffuse(self, x0: Latents, eps: Latents, t: Times) -> Latents:
        """x_t."""
        x0, eps = _wide(x0), _wide(eps)
        return _rows(self.alpha(t), x0) * x0 + _rows(self.sigma(t), eps) * eps

    def target(self, x0: Latents, eps: Latents, t: Times) -> Latents:
        """What an exact network would give; without the channels of a learned variance."""
        return self._in_space(self.cfg.predict, x0, eps, t)

    def _in_space(self, space: Space, x0: Latents, eps: Latents, t: Times) -> Latents:
        if space is Space.v:
            return self._v(_wide(x0), _wide(eps), t)
        return _wide(x0 if space is Space.x0 else eps)

    def read(self, output: Float[Array, "b h w f"], x_t: Latents, t: Times) -> Prediction:
        """The network's output at x_t as x0 and eps."""
        value, mix = self._split(output)
        x_t = _wide(x_t)
        alpha, sigma = _rows(self.alpha(t), x_t), _rows(self.sigma(t), x_t)
        if self.cfg.predict is Space.v:
            x0, eps = self._from_v(value, x_t, t)
        elif self.cfg.predict is Space.x0:
            x0, eps = value, (x_t - alpha * value) / jnp.maximum(sigma, _SIGMA_FLOOR)
        else:
            x0, eps = (x_t - sigma * value) / alpha, value
        return Prediction(x0, eps, mix)

    def _split(self, output: Float[Array, "b h w f"]) -> tuple[Latents, Latents | None]:
        """(prediction, share of log beta in the log variance)."""
        if not self.cfg.learn_variance:
            return _wide(output), None
        value, mix = jnp.split(_wide(output), 2, axis=-1)
        return value, 0.5 * (mix + 1.0)

    def weight(self, t: Times) -> Times:
        """The factor of the mean squared error in `loss_space`.

        With min_snr = g the loss is min(SNR, g) |x0 - x0^|^2 whatever the space (arXiv 2303.09556,
        section 3.4: min(SNR, g) / SNR on eps, min(SNR, g) / (SNR + 1) on v).
        """
        if not self.cfg.min_snr:
            return jnp.ones_like(t)
        snr = jnp.exp(self.log_snr(t))
        capped = jnp.minimum(snr, self.cfg.min_snr)
        if self.cfg.loss_space is Space.x0:
            return capped
        if self.cfg.loss_space is Space.v:
            return capped * self.sigma(t) ** 2  # the error of v is that of x0 over sigma
        return jnp.minimum(1.0, self.cfg.min_snr / snr)

    def loss(
        self, output: Float[Array, "b h w f"], x0: Latents, eps: Latents, x_t: Latents, t: Times
    ) -> Times:
        """One loss per example: the weighted mean squared error, plus the variance's bound."""
        loss = self.weight(t) * _mean(self.squares(output, x0, eps, x_t, t))
        if self.cfg.learn_variance:
            loss = loss + self.variance_bound(output, x0, x_t, t)
        return loss

    def squares(
        self, output: Float[Array, "b h w f"], x0: Latents, eps: Latents, x_t: Latents, t: Times
    ) -> Latents:
        """The squared error of each number in `loss_space`, not weighted."""
        space = self.cfg.loss_space
        if space is self.cfg.predict:
            found = self._split(output)[0]
        else:
            read = self.read(output, x_t, t)
            found = self._in_space(space, read.x0, read.eps, t)
        return (found - self._in_space(space, x0, eps, t)) ** 2

    def variance_bound(
        self, output: Float[Array, "b h w f"], x0: Latents, x_t: Latents, t: Times
    ) -> Times:
        """The loss of a learned variance."""
        raise NotImplementedError

    def denoiser(
        self, network: Callable[[Latents, Times, Any], Float[Array, "b h w f"]]
    ) -> Callable[[Latents, Times, Any], Prediction]:
        """(x_t, t, cond) -> Prediction, of a network that takes (x_t, network time, cond)."""

        def denoise(x: Latents, t: Times, cond: Any) -> Prediction:
            return self.read(network(x, self.network_time(t), cond), x, t)

        return denoise


class Flow(Process):
    """The linear path (SiT, arXiv 2401.08740; rectified flow)."""

    def alpha(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """1 - t."""
        return 1.0 - _wide(t)

    def sigma(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """t."""
        return _wide(t)

    def log_snr(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """Infinite at both ends."""
        t = _wide(t)
        return 2.0 * (jnp.log1p(-t) - jnp.log(t))

    def network_time(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """1 - t: the published networks count from noise to data."""
        return 1.0 - _wide(t)

    def draw_times(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Uniform in [0, 1) or logit-normal, then shifted."""
        if self.cfg.times is TimeDraw.uniform:
            return self.shifted(jax.random.uniform(key, shape))
        normal = jax.random.normal(key, shape)
        return self.shifted(jax.nn.sigmoid(self.cfg.time_mean + self.cfg.time_std * normal))

    def quantile(self, share: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """Of the same distribution."""
        if self.cfg.times is TimeDraw.uniform:
            return self.shifted(share)
        normal = jax.scipy.special.ndtri(share)
        return self.shifted(jax.nn.sigmoid(self.cfg.time_mean + self.cfg.time_std * normal))

    def share(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """The inverse of `quantile`."""
        if self.cfg.times is TimeDraw.uniform:
            return self.unshifted(t)
        # The shift adds log s to the logit of t: infinite at both ends, where ndtr is 0 and 1.
        logit = jnp.log(t) - jnp.log1p(-t) - math.log(self.cfg.shift)
        return jax.scipy.special.ndtr((logit - self.cfg.time_mean) / self.cfg.time_std)

    def shifted(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """s t / (1 + (s - 1) t) (SD3, arXiv 2403.03206, section 5.3.2)."""
        s = self.cfg.shift
        return s * t / (1.0 + (s - 1.0) * t)

    def unshifted(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """t / (s - (s - 1) t)."""
        s = self.cfg.shift
        return t / (s - (s - 1.0) * t)

    def scale(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """1."""
        return jnp.ones_like(t)

    def clock(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """t."""
        return t

    def direction(self, prediction: Prediction) -> Latents:
        """eps - x0."""
        return prediction.eps - prediction.x0

    def angle(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """t."""
        return t

    def time_of(self, angle: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """t."""
        return angle

    def velocity(self, prediction: Prediction, t: Times) -> Latents:
        """eps - x0."""
        return prediction.eps - prediction.x0

    def _v(self, x0: Latents, eps: Latents, t: Times) -> Latents:
        return x0 - eps

    def _from_v(self, v: Latents, x_t: Latents, t: Times) -> tuple[Latents, Latents]:
        t = _rows(_wide(t), v)
        return x_t + t * v, x_t - (1.0 - t) * v


class _Tables(NamedTuple):
    """Coefficients of q(x_{i-1} | x_i, x0) for i = 0..999, float64."""

    of_x0: np.ndarray  # of x0 in the mean
    of_x: np.ndarray  # of x_t in the mean
    log_least: np.ndarray  # log beta~; its first entry, -inf, is replaced by the second
    log_most: np.ndarray  # log beta


def _tables(beta: np.ndarray) -> _Tables:
    """Source: DDPM (arXiv 2006.11239), equations 6 and 7."""
    bar = np.cumprod(1.0 - beta)
    before = np.concatenate([[1.0], bar[:-1]])
    least = beta * (1.0 - before) / (1.0 - bar)
    least[0] = least[1]
    return _Tables(
        beta * np.sqrt(before) / (1.0 - bar),
        (1.0 - before) * np.sqrt(1.0 - beta) / (1.0 - bar),
        np.log(least),
        np.log(beta),
    )


def _betas(kind: Kind) -> np.ndarray:
    if kind is Kind.scaled_linear:
        return np.linspace(math.sqrt(0.00085), math.sqrt(0.012), STEPS) ** 2
    return np.linspace(1e-4, 0.02, STEPS)


class DiscreteProcess(Process):
    """Variance-preserving with 1000 steps: alpha^2 + sigma^2 = 1.

    Between the knots t = n / 1000 log alpha is linear in t, as DPM-Solver does it; the knot at
    t = 0 is log 1, the product of no step (samplers that end at t = 0 return data, not x_1).
    """

    def __init__(self, cfg: ProcessConfig):
        super().__init__(cfg)
        beta = _betas(cfg.kind)
        self._knots = np.arange(STEPS + 1) / STEPS
        self._log_alpha = np.concatenate([[0.0], 0.5 * np.cumsum(np.log1p(-beta))])
        self._steps = _tables(beta)

    def log_alpha(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """Piecewise linear."""
        n = _wide(t) * STEPS
        below = jnp.clip(jnp.floor(n), 0, STEPS - 1)
        table, i = jnp.asarray(self._log_alpha, n.dtype), below.astype(jnp.int32)
        return table[i] + (n - below) * (table[i + 1] - table[i])

    def alpha(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """From 1 down to 0.068 (scaled_linear) or 0.0064 (ddpm)."""
        return jnp.exp(self.log_alpha(t))

    def sigma(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """sqrt(1 - alpha^2), without its cancellation at small t."""
        return jnp.sqrt(-jnp.expm1(2.0 * self.log_alpha(t)))

    def log_snr(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """Infinite at t = 0."""
        log_alpha = self.log_alpha(t)
        return 2.0 * log_alpha - jnp.log(-jnp.expm1(2.0 * log_alpha))

    def network_time(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """1000 t (scaled_linear) or 1000 t - 1 (ddpm); whole numbers exactly, others between."""
        n = _wide(t) * STEPS
        whole = jnp.round(n)  # n / 1000 times 1000 is off by up to 6e-5 in float32
        n = jnp.where(jnp.abs(n - whole) < 1e-3, whole, n)
        return n - 1.0 if self.cfg.kind is Kind.ddpm else n

    def draw_times(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """n / 1000 with n uniform in 1..1000."""
        return jax.random.randint(key, shape, 1, STEPS + 1) / STEPS

    def quantile(self, share: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """One of the 1000."""
        return (jnp.clip(jnp.floor(share * STEPS), 0, STEPS - 1) + 1) / STEPS

    def share(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """A multiple of 1 / 1000."""
        return jnp.floor(t * STEPS + 1e-3) / STEPS  # n / 1000 times 1000 may be below n

    def shifted(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """t."""
        return t

    def unshifted(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """t."""
        return t

    def scale(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """alpha."""
        return self.alpha(t)

    def clock(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """sigma / alpha (EDM, arXiv 2206.00364: the path of x / alpha is straight in it)."""
        return jnp.sqrt(jnp.expm1(-2.0 * self.log_alpha(t)))

    def direction(self, prediction: Prediction) -> Latents:
        """eps."""
        return prediction.eps

    def angle(self, t: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """arctan(sigma / alpha): x_t stays of order 1 in it, x / alpha would grow to 150."""
        return jnp.arctan(self.clock(t))

    def time_of(self, angle: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """Linear in log alpha between the knots."""
        return jnp.interp(0.5 * jnp.log1p(jnp.tan(angle) ** 2), -self._log_alpha, self._knots)

    def velocity(self, prediction: Prediction, t: Times) -> Latents:
        """alpha eps - sigma x0."""
        return self._v(prediction.x0, prediction.eps, t)

    def _v(self, x0: Latents, eps: Latents, t: Times) -> Latents:
        return _rows(self.alpha(t), x0) * eps - _rows(self.sigma(t), x0) * x0

    def _from_v(self, v: Latents, x_t: Latents, t: Times) -> tuple[Latents, Latents]:
        alpha, sigma = _rows(self.alpha(t), v), _rows(self.sigma(t), v)
        return alpha * x_t - sigma * v, sigma * x_t + alpha * v

    def variance_bound(
        self, output: Float[Array, "b h w f"], x0: Latents, x_t: Latents, t: Times
    ) -> Times:
        """The bound's term at t in bits per number, gradients of the mean stopped.

        Source: improved DDPM (arXiv 2102.09672), section 3.1, as DiT trains it: weight 1; the KL
        divergence of the step from q(x_{i-1} | x_i, x0), and at i = 0 the likelihood of the data
        in bins of 2/255 (which DiT keeps on latents too).  Times must be those of draw_times.
        """
        index = jnp.round(_wide(t) * STEPS).astype(jnp.int32) - 1
        of_x0, of_x, least, most = (_rows(jnp.asarray(table)[index], x_t) for table in self._steps)
        found = self.read(output, x_t, t)
        x0_found = jax.lax.stop_gradient(found.x0)
        log_variance = found.variance_mix * most + (1.0 - found.variance_mix) * least
        kl = gaussian_kl(of_x0 * (x0 - x0_found), least, log_variance)
        mean = of_x0 * x0_found + of_x * x_t
        nll = -binned_log_likelihood(_wide(x0), mean, log_variance)
        return _mean(jnp.where(_rows(index, x_t) == 0, nll, kl)) / math.log(2.0)


def gaussian_kl(
    difference: Float[Array, "*s"], log_p: Float[Array, "*#s"], log_q: Float[Array, "*s"]
) -> Float[Array, "*s"]:
    """KL(p || q) in nats of Gaussians whose means differ so, from their log variances."""
    ratio = log_p - log_q
    return 0.5 * (jnp.exp(ratio) - 1.0 - ratio + difference**2 * jnp.exp(-log_q))


_BIN = 1.0 / 255.0  # half the width of a bin
_TINY = 1e-12


def _cdf(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The normal distribution function, by the tanh approximation that the originals use."""
    return 0.5 * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def binned_log_likelihood(
    x: Float[Array, "*s"], mean: Float[Array, "*s"], log_variance: Float[Array, "*s"]
) -> Float[Array, "*s"]:
    """log of the Gaussian's mass in the bin of width 2/255 around x, in nats; open at -1 and 1.

    Source: DDPM (arXiv 2006.11239), equation 13.
    """
    narrow = jnp.exp(-0.5 * log_variance)
    upper, lower = _cdf(narrow * (x - mean + _BIN)), _cdf(narrow * (x - mean - _BIN))
    upper, lower = jnp.where(x > 0.999, 1.0, upper), jnp.where(x < -0.999, 0.0, lower)
    return jnp.log(jnp.maximum(upper - lower, _TINY))
