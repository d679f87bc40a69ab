"""From noise to data: ancestral DDPM, DDIM, Euler, Heun, two DPM-Solver++ and adaptive dopri5.

A sampler goes down the times of `times(n)`; a run is one `lax.scan` (dopri5: diffrax' loop).  It
calls `denoise(x, t[b]) -> Prediction`, in which guidance is already applied.  All random draws
are functions of (key, step, index of the sample): a sample does not depend on what else is in its
batch, on the batch size or on the mesh.
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
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dcae_jax.diffusion.guidance import Denoise
from dcae_jax.diffusion.process import STEPS, Latents, Prediction, Process, ProcessConfig, Space
from dcae_jax.errors import UserError

Scalar = Float[Array, ""]
Draw = Callable[[Int[Array, ""]], Latents]  # step -> its standard normal noise


class Sampled(NamedTuple):
    """The end of a run."""

    x0: Latents  # NaN where dopri5 gave up after max_steps
    evaluations: Int[Array, " b"]  # of the denoiser; guidance doubles what one of them costs


# ------------------------------------------------------------------------------------------ noise


def noise(
    key: PRNGKeyArray, indices: Int[Array, " b"], shape: tuple[int, ...]
) -> Float[Array, "b ..."]:
    """Standard normal noise [b, *shape]; row r is a function of (key, indices[r]) alone."""
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(indices)


def initial_noise(
    key: PRNGKeyArray, indices: Int[Array, " b"], shape: tuple[int, ...]
) -> Float[Array, "b ..."]:
    """x at t = 1 of the samples with these indices; `sample` draws its steps' noise apart."""
    return noise(jax.random.fold_in(key, 0), indices, shape)


def step_noise(key: PRNGKeyArray, indices: Int[Array, " b"], shape: tuple[int, ...]) -> Draw:
    """The noise of step k = 0, 1, ... of a run."""
    return lambda k: noise(jax.random.fold_in(key, k + 1), indices, shape)


def sample(
    sampler: "Sampler", denoise: Denoise, x1: Latents, key: PRNGKeyArray,
    indices: Int[Array, " b"], steps: int | None = None,
) -> Sampled:  # fmt: skip
    """Runs the sampler from x1 (see `initial_noise`); `steps` (static) replaces the config's."""
    n = sampler.check_steps(steps)
    x = x1.astype(jnp.promote_types(x1.dtype, jnp.float32))
    return sampler.run(denoise, x, step_noise(key, indices, x.shape[1:]), n)


# ----------------------------------------------------------------------------------------- configs


def _steps_problems(steps: int, process: ProcessConfig | None = None) -> list[str]:
    if steps < 1:
        return [f"sampler.steps = {steps}; a sampler needs 1 or more, e.g. 50"]
    if process is not None and not process.is_flow and steps > STEPS:
        return [f"sampler.steps = {steps} is more than the {STEPS} of {process.kind.value}"]
    return []


def _end_problems(end: float) -> list[str]:
    if not 0.0 <= end < 1.0:
        return [f"sampler.end = {end} is not in [0, 1), where 0 is data; use 0 or 0.001"]
    return []


def _needs_discrete(name: str, process: ProcessConfig, why: str, mend: str) -> list[str]:
    return [f"sampler {name} does not fit the flow: {why}; {mend}"] if process.is_flow else []


def _evaluates_end(end: float, process: ProcessConfig) -> list[str]:
    """For samplers that call the denoiser at `end` itself."""
    if not process.is_flow and end < 1 / STEPS:
        return [
            f"sampler.end = {end}: {process.kind.value} networks know no time below 0.001; "
            "use end=0.001"
        ]
    if end == 0.0 and Space(process.predict) is Space.x0:
        return ["sampler.end = 0 with predict=x0 divides by sigma = 0; use end=0.001"]
    return []


def _checked(problems: list[str]) -> None:
    if problems:
        lines = "\n".join(f"  - {p}" for p in dict.fromkeys(problems))
        raise UserError(f"this sampler cannot run:\n{lines}")


class Variance(enum.Enum):
    """The variance of an ancestral step."""

    posterior = "posterior"  # beta~: exact for a single point
    beta = "beta"  # exact for data of unit variance
    learned = "learned"  # between the two in log, as the network says


@dataclass(slots=True)
class AncestralConfig:
    """DDPM on `steps` of the 1000 steps; published for DiT: 250.  One call a step."""

    steps: int = 250
    variance: Variance | None = None  # None: learned if the process has it, else posterior

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        return _steps_problems(self.steps)

    def process_problems(self, process: ProcessConfig) -> list[str]:
        """Why it does not fit the process."""
        found = _needs_discrete(
            "ancestral DDPM", process, "it walks the 1000 steps of a discrete process",
            "use DDIM with eta = 1, the same posterior on any process",
        ) + _steps_problems(self.steps, process)  # fmt: skip
        learned = self.variance is not None and Variance(self.variance) is Variance.learned
        if learned and not process.learn_variance:
            found.append(
                "sampler.variance = learned, but process.learn_variance is off: the network says "
                "nothing of it; use variance=posterior"
            )
        return found

    def variance_of(self, process: ProcessConfig) -> Variance:
        """The variance that is taken on this process."""
        learned = Variance.learned if process.learn_variance else Variance.posterior
        return learned if self.variance is None else Variance(self.variance)

    def build(self, process: Process) -> "Ancestral":
        """The sampler; UserError lists all problems."""
        return Ancestral(self, process)


@dataclass(slots=True)
class DDIMConfig:
    """DDIM (arXiv 2010.02502).  eta = 0: deterministic, 1: as ancestral.  One call a step."""

    steps: int = 50
    eta: float = 0.0
    end: float = 0.0  # the last time; 0 is data

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = _steps_problems(self.steps) + _end_problems(self.end)
        if not 0.0 <= self.eta <= 1.0:
            found.append(f"sampler.eta = {self.eta} is not in [0, 1]; 0 is deterministic")
        return found

    def process_problems(self, process: ProcessConfig) -> list[str]:
        """Why it does not fit the process."""
        return _steps_problems(self.steps, process)

    def build(self, process: Process) -> "DDIM":
        """The sampler; UserError lists all problems."""
        return DDIM(self, process)


@dataclass(slots=True)
class EulerConfig:
    """Euler along the probability-flow ODE, in the clock of the process.  One call a step."""

    steps: int = 50
    end: float = 0.0  # the last time; 0 is data

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        return _steps_problems(self.steps) + _end_problems(self.end)

    def process_problems(self, process: ProcessConfig) -> list[str]:
        """Why it does not fit the process."""
        return _steps_problems(self.steps, process)

    def build(self, process: Process) -> "Euler":
        """The sampler; UserError lists all problems."""
        return Euler(self, process)


@dataclass(slots=True)
class HeunConfig:
    """Heun along the same ODE (EDM, arXiv 2206.00364, algorithm 1 without churn).

    Two calls a step, but one in a last step to t = 0, which is Euler's: 2 steps - 1 calls.
    """

    steps: int = 25
    end: float = 0.0  # the last time; 0 is data

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        return _steps_problems(self.steps) + _end_problems(self.end)

    def process_problems(self, process: ProcessConfig) -> list[str]:
        """Why it does not fit the process."""
        found = _steps_problems(self.steps, process)
        return found + (_evaluates_end(self.end, process) if self.end else [])

    def build(self, process: Process) -> "Heun":
        """The sampler; UserError lists all problems."""
        return Heun(self, process)


@dataclass(slots=True)
class DPMFastConfig:
    """Singlestep DPM-Solver++ "fast" of order 3, published for UViT: 30 calls, end 0.001.

    `steps` counts calls: steps of three calls, then what is left (30: nine of 3, one of 2, of 1).
    """

    steps: int = 30
    end: float = 0.001

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = _steps_problems(self.steps) + _end_problems(self.end)
        if self.end == 0.0:
            found.append("sampler.end = 0: the log-SNR is infinite there; use end=0.001")
        return found

    def process_problems(self, process: ProcessConfig) -> list[str]:
        """Why it does not fit the process."""
        return _needs_discrete(
            "DPM-Solver++ fast", process, "its log-SNR at t = 1 is minus infinity",
            "use DPM-Solver++ 2M or Heun",
        ) + _steps_problems(self.steps, process)  # fmt: skip

    def build(self, process: Process) -> "DPMFast":
        """The sampler; UserError lists all problems."""
        return DPMFast(self, process)


@dataclass(slots=True)
class DPM2MConfig:
    """Multistep DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2).  One call a step."""

    steps: int = 20
    end: float = 0.0  # the last time; 0 is data

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        return _steps_problems(self.steps) + _end_problems(self.end)

    def process_problems(self, process: ProcessConfig) -> list[str]:
        """Why it does not fit the process."""
        return _steps_problems(self.steps, process)

    def build(self, process: Process) -> "DPM2M":
        """The sampler; UserError lists all problems."""
        return DPM2M(self, process)


@dataclass(slots=True)
class Dopri5Config:
    """Adaptive Dormand-Prince 5(4), published for USiT.  Every sample chooses its own steps."""

    rtol: float = 1e-3
    atol: float = 1e-6
    max_steps: int = 1000  # accepted and refused; a sample that needs more becomes NaN
    end: float = 0.0  # the last time; 0 is data

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = _end_problems(self.end)
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if not (math.isfinite(value) and value > 0):
                found.append(f"sampler.{name} = {value} is not positive; published: 1e-3 and 1e-6")
        if self.max_steps < 1:
            found.append(f"sampler.max_steps = {self.max_steps}; it needs 1 or more, e.g. 1000")
        return found

    def process_problems(self, process: ProcessConfig) -> list[str]:
        """Why it does not fit the process."""
        return _evaluates_end(self.end, process)

    def build(self, process: Process) -> "Dopri5":
        """The sampler; UserError lists all problems."""
        return Dopri5(self, process)


SamplerConfig = (
    AncestralConfig | DDIMConfig | EulerConfig | HeunConfig | DPMFastConfig | DPM2MConfig
    | Dopri5Config
)  # fmt: skip
# The names that commands know them by.
SAMPLERS: dict[str, type] = {
    "ddpm": AncestralConfig, "ddim": DDIMConfig, "euler": EulerConfig, "heun": HeunConfig,
    "dpm_fast": DPMFastConfig, "dpm_2m": DPM2MConfig, "dopri5": Dopri5Config,
}  # fmt: skip


# ---------------------------------------------------------------------------------------- samplers


class Sampler:
    """A sampler with a fixed grid and one call a step; others replace `run`."""

    stochastic = False
    _first = 1.0  # where the times begin, before the process's shift

    def __init__(self, cfg: SamplerConfig, process: Process):
        _checked(cfg.problems() + cfg.process_problems(process.cfg))
        self.cfg, self.process = copy.copy(cfg), process

    def starting(self, t: float) -> "Sampler":
        """The same for x that is data with noise of time t, not noise alone.

        Of the config's steps it takes the share of the times that is left.
        """
        first = float(self.process.unshifted(jnp.float32(t)))
        if not max(self.end, 1 / STEPS) < first <= 1.0:
            raise UserError(
                f"a start at t = {t:g}; it must lie above {max(self.end, 1 / STEPS):g}, where "
                "sampling ends, and be at most 1, where nothing is left but noise"
            )
        found = copy.copy(self)
        found._first = first
        return found

    @property
    def end(self) -> float:
        """The last time, before the process's shift."""
        return self.cfg.end

    def check_steps(self, steps: int | None) -> int:
        """`steps`, or the config's; UserError unless the process has as many."""
        if steps is None:
            return max(1, round(self.cfg.steps * self._first))
        _checked(_steps_problems(steps, self.process.cfg))
        return steps

    def times(self, n: int) -> Float[Array, " n_plus_1"]:
        """The n + 1 times of a run, from 1 down to `end`: equal steps, then the process's shift.

        From where it starts, if that is not 1.
        """
        return self.process.shifted(jnp.asarray(np.linspace(self._first, self.cfg.end, n + 1)))

    def evaluations(self, n: int) -> int:
        """Calls of the denoiser in a run of n steps."""
        return n

    def step(self, x: Latents, t: Scalar, s: Scalar, found: Prediction, z: Latents) -> Latents:
        """x at s < t from x at t; z is standard normal noise (zeros unless `stochastic`)."""
        raise NotImplementedError

    def run(self, denoise: Denoise, x: Latents, draw: Draw, n: int) -> Sampled:
        """All steps, one scan."""

        def body(x: Latents, inputs: tuple[Scalar, Scalar, Int[Array, ""]]) -> tuple[Latents, None]:
            t, s, k = inputs
            z = draw(k).astype(x.dtype) if self.stochastic else jnp.zeros_like(x)
            return self.step(x, t, s, _at(denoise, x, t), z), None

        grid = self.times(n).astype(x.dtype)
        x, _ = jax.lax.scan(body, x, (grid[:-1], grid[1:], jnp.arange(n)))
        return self._done(x, n)

    def _done(self, x: Latents, n: int) -> Sampled:
        return Sampled(x, jnp.full(x.shape[0], self.evaluations(n), jnp.int32))


def _at(denoise: Denoise, x: Latents, t: Scalar) -> Prediction:
    """The denoiser's word, all samples at the same time."""
    return denoise(x, jnp.full(x.shape[0], t, x.dtype))


class Ancestral(Sampler):
    """See AncestralConfig."""

    stochastic = True
    end = 0.0

    def times(self, n: int) -> Float[Array, " n_plus_1"]:
        """The times of the indices round(k 999 / (n - 1)), then 0 (improved DDPM, section 4).

        Of those up to where it starts, if that is not 1.
        """
        last = round(self._first * STEPS) - 1
        kept = [round(k * last / (n - 1)) for k in range(n)] if n > 1 else [last]
        return jnp.asarray([(i + 1) / STEPS for i in reversed(kept)] + [0.0])

    def step(self, x: Latents, t: Scalar, s: Scalar, found: Prediction, z: Latents) -> Latents:
        """The mean of q(x_s | x_t, x0), and noise unless s = 0 (DDPM, equations 6, 7 and 11)."""
        p = self.process
        alpha_s, var_s, var_t = p.alpha(s), p.sigma(s) ** 2, p.sigma(t) ** 2
        ratio = p.alpha(t) / alpha_s
        beta = var_t - ratio**2 * var_s
        mean = (alpha_s * beta * found.x0 + ratio * var_s * x) / var_t
        log_beta, log_least = jnp.log(beta), jnp.log(beta * var_s / var_t)
        mix = self._mix(found)
        deviation = jnp.exp(0.5 * (mix * log_beta + (1.0 - mix) * jnp.where(s > 0, log_least, 0.0)))
        return mean + jnp.where(s > 0, deviation, 0.0) * z

    def _mix(self, found: Prediction) -> Latents | float:
        """The share of log beta in the log variance."""
        kind = self.cfg.variance_of(self.process.cfg)
        if kind is Variance.learned:
            return found.variance_mix
        return 1.0 if kind is Variance.beta else 0.0


class DDIM(Sampler):
    """See DDIMConfig."""

    def __init__(self, cfg: DDIMConfig, process: Process):
        super().__init__(cfg, process)
        self.stochastic = cfg.eta > 0

    def step(self, x: Latents, t: Scalar, s: Scalar, found: Prediction, z: Latents) -> Latents:
        """Equations 12 and 16, for any alpha and sigma: eta^2 times the posterior's variance."""
        p = self.process
        var_s, var_t = p.sigma(s) ** 2, p.sigma(t) ** 2
        ratio = p.alpha(t) / p.alpha(s)
        fresh = self.cfg.eta**2 * var_s * (1.0 - ratio**2 * var_s / var_t)
        kept = jnp.sqrt(var_s - fresh)
        return p.alpha(s) * found.x0 + kept * found.eps + jnp.sqrt(fresh) * z


class Euler(Sampler):
    """See EulerConfig."""

    def step(self, x: Latents, t: Scalar, s: Scalar, found: Prediction, z: Latents) -> Latents:
        """Straight on along the direction."""
        return self._along(x, t, s, self.process.direction(found))

    def _along(self, x: Latents, t: Scalar, s: Scalar, direction: Latents) -> Latents:
        p = self.process
        return p.scale(s) * (x / p.scale(t) + (p.clock(s) - p.clock(t)) * direction)


class Heun(Euler):
    """See HeunConfig."""

    def evaluations(self, n: int) -> int:
        """Two a step, but one in a last step to 0."""
        return 2 * n if self.cfg.end else 2 * n - 1

    def run(self, denoise: Denoise, x: Latents, draw: Draw, n: int) -> Sampled:
        """One scan, and the last step if it goes to 0."""

        def body(x: Latents, inputs: tuple[Scalar, Scalar]) -> tuple[Latents, None]:
            t, s = inputs
            first = self.process.direction(_at(denoise, x, t))
            then = self.process.direction(_at(denoise, self._along(x, t, s, first), s))
            return self._along(x, t, s, 0.5 * (first + then)), None

        grid = self.times(n).astype(x.dtype)
        whole = n if self.cfg.end else n - 1
        x, _ = jax.lax.scan(body, x, (grid[:whole], grid[1 : whole + 1]))
        if whole < n:
            direction = self.process.direction(_at(denoise, x, grid[-2]))
            x = self._along(x, grid[-2], grid[-1], direction)
        return self._done(x, n)


class DPM2M(Sampler):
    """See DPM2MConfig."""

    def run(self, denoise: Denoise, x: Latents, draw: Draw, n: int) -> Sampled:
        """One scan; it carries the x0 and the step in lambda before."""
        p = self.process
        grid = self.times(n).astype(x.dtype)
        h = jnp.diff(0.5 * p.log_snr(grid))

        def body(
            carry: tuple[Latents, Latents, Scalar], inputs: tuple[Scalar, Scalar, Scalar]
        ) -> tuple[tuple[Latents, Latents, Scalar], None]:
            x, before, h_before = carry
            t, s, h = inputs
            x0 = _at(denoise, x, t).x0
            # First order where there is no step before, and where lambda is infinite: in steps
            # from t = 1 of the flow and to t = 0.
            second = jnp.isfinite(h) & jnp.isfinite(h_before)
            slope = jnp.where(second, 0.5 * h / h_before, 0.0)
            mixed = x0 + slope * (x0 - before)
            x = p.sigma(s) / p.sigma(t) * x - p.alpha(s) * jnp.expm1(-h) * mixed
            return (x, x0, h), None

        start = (x, jnp.zeros_like(x), jnp.asarray(jnp.inf, x.dtype))
        (x, _, _), _ = jax.lax.scan(body, start, (grid[:-1], grid[1:], h))
        return self._done(x, n)


class DPMFast(Sampler):
    """See DPMFastConfig."""

    def orders(self, n: int) -> list[int]:
        """The orders of the steps that n calls are spent on."""
        tail = {0: [2, 1], 1: [1], 2: [2]}[n % 3]
        return [3] * ((n - sum(tail)) // 3) + tail

    def run(self, denoise: Denoise, x: Latents, draw: Draw, n: int) -> Sampled:
        """A scan over the steps of order 3, then the one or two of lower order."""
        grid = self.times(n).astype(x.dtype)
        orders = self.orders(n)
        i = 3 * orders.count(3)

        def body(x: Latents, times: Float[Array, "4"]) -> tuple[Latents, None]:
            return self.advance(denoise, x, times), None

        if i:
            groups = jnp.stack([grid[k : k + i : 3] for k in range(3)] + [grid[3 : i + 1 : 3]], 1)
            x, _ = jax.lax.scan(body, x, groups)
        for order in orders[orders.count(3) :]:
            x = self.advance(denoise, x, grid[i : i + order + 1])
            i += order
        return self._done(x, n)

    def advance(
        self, denoise: Denoise, x: Latents, times: Float[Array, " order_plus_1"]
    ) -> Latents:
        """One step of order 1, 2 or 3 from times[0] to times[-1]; stages at the times between.

        Source: DPM-Solver (arXiv 2206.00927), appendix B, with data prediction (2211.01095), as
        `dpm_solver_pp.py` of the U-ViT repository has it.
        """
        p = self.process
        alpha, sigma, lam = p.alpha(times), p.sigma(times), 0.5 * p.log_snr(times)
        order = len(times) - 1
        h = lam - lam[0]  # h[-1] is the whole step
        phi = jnp.expm1(-h)

        def move(k: int, slope: Latents | float = 0.0) -> Latents:
            """To times[k]: first order in D, and a term in a difference of two D."""
            return sigma[k] / sigma[0] * x - alpha[k] * phi[k] * first + alpha[k] * slope

        first = _at(denoise, x, times[0]).x0
        if order == 1:
            return move(1)
        r1 = h[1] / h[order]
        rise = _at(denoise, move(1), times[1]).x0 - first
        if order == 2:
            return move(2, -0.5 / r1 * phi[2] * rise)
        r2 = h[2] / h[3]
        x2 = move(2, r2 / r1 * (phi[2] / h[2] + 1.0) * rise)
        rise = _at(denoise, x2, times[2]).x0 - first
        return move(3, (phi[3] / h[3] + 1.0) / r2 * rise)


# The first stage of a step is the last of the one before: one call, then six a step.
CALLS_BEFORE, CALLS_A_STEP = 1, 6
FIRST_STEP = 0.01  # of the way; later steps follow from the error, at most ten times the last
_Field = Callable[[Scalar, Float[Array, "h w c"], Any], Float[Array, "h w c"]]


def _per_sample(
    velocity: Callable[[Float[Array, " b"], Latents], Latents], x: Latents
) -> tuple[_Field, Any]:
    """(field of one sample, its constants): under vmap over the rows of x it is one batched call.

    Diffrax solves for one sample; mapped as it stands, the network would see batches of one with
    the labels of all.  Its weights and labels are passed on as unmapped constants, since a rule of
    `custom_vmap` cannot close over traced values.
    """
    import equinox as eqx

    closed = eqx.filter_closure_convert(velocity, x[:, 0, 0, 0], x)
    constants, static = eqx.partition(closed, eqx.is_array)

    @jax.custom_batching.custom_vmap
    def field(u: Scalar, y: Array, constants: Any) -> Array:
        return jnp.full_like(y, jnp.nan)  # never used: `field` is only called under vmap

    @field.def_vmap
    def rule(
        size: int, mapped: list[Any], u: Array, y: Array, constants: Any
    ) -> tuple[Array, bool]:
        u = u if mapped[0] else jnp.full((size,), u)
        y = y if mapped[1] else jnp.broadcast_to(y, (size, *y.shape))
        return eqx.combine(constants, static)(u, y), True

    return field, constants


class Dopri5(Sampler):
    """See Dopri5Config."""

    def check_steps(self, steps: int | None) -> int:
        """The most steps; it chooses them itself."""
        if steps is not None:
            raise UserError(
                f"steps = {steps}: dopri5 chooses its own steps; leave steps out and set rtol and "
                "atol, or take heun"
            )
        return self.cfg.max_steps

    def run(self, denoise: Denoise, x: Latents, draw: Draw, n: int) -> Sampled:
        """One loop for all samples, each with its own time and step; it ends with the slowest."""
        import diffrax

        first, last = self.process.angle(self.times(1).astype(x.dtype))
        field, constants = _per_sample(lambda u, y: self._velocity(denoise, u, y), x)

        def one(y: Float[Array, "h w c"]) -> tuple[Float[Array, "h w c"], Int[Array, ""]]:
            found = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda u, y, args: field(u, y, args)), diffrax.Dopri5(),
                first, last, FIRST_STEP * (last - first), y, constants, max_steps=n, throw=False,
                stepsize_controller=diffrax.PIDController(rtol=self.cfg.rtol, atol=self.cfg.atol),
                adjoint=diffrax.ForwardMode(),
            )  # fmt: skip
            ok = found.result == diffrax.RESULTS.successful
            return jnp.where(ok, found.ys[0], jnp.nan), found.stats["num_steps"]

        y, steps = jax.vmap(one)(x)
        return Sampled(y, CALLS_BEFORE + CALLS_A_STEP * steps.astype(jnp.int32))

    def _velocity(self, denoise: Denoise, u: Float[Array, " b"], y: Latents) -> Latents:
        t = self.process.time_of(u)
        return self.process.velocity(denoise(y, t), t)
