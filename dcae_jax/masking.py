"""Which tokens are masked: how many at a step, which ones, and taking them out and putting back.

Source: LMD (arXiv 2312.07971) and its code: one mask ratio for a whole batch, a function of the
step; positions drawn apart for each example.  Shapes are static: the number of visible tokens is a
Python int, chosen from a short table, and each number of the table is a program of its own.
"""

import enum
import math
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int, Int64, PRNGKeyArray

COSINE_OFFSET = 0.008  # of improved DDPM (arXiv 2102.09672), whose schedule it is
WHITEN_EPS = 1e-6
# Numbers of visible tokens for the ratios 0.15 .. 0.75, by the number of tokens; others: _spread.
_TABLES = {
    49: (41, 36, 30, 24, 18, 12),
    64: (54, 48, 40, 32, 24, 16),
    256: (218, 192, 160, 128, 96, 64),
}
_TABLE_SIZE = 6
_SMALLEST, _LARGEST = 0.15, 0.75  # ratios that the tables reach
_CHUNK = 2**16  # steps whose numbers are computed at once
_ROUNDING = 1e-9  # 49 (1 - 0.75) must not become 12.2499... and 64 (1 - 0.75) not 15.9999...


class MaskKind(enum.Enum):
    """How the share of masked tokens grows over the training."""

    cosine = "cosine"  # 1 - alpha bar of improved DDPM, the one of LMD's code
    piecewise = "piecewise"  # up to `middle`, a rest, up to `end`
    linear = "linear"  # LMD's third schedule is not published; this is a guess
    constant = "constant"  # `end` throughout, as MAE


class Rounding(enum.Enum):
    """From the share of masked tokens to the number of visible ones."""

    nearest = "nearest"  # in the table: few programs, costs what the schedule costs
    up = "up"  # `exact` or the next larger one in the table: never masks more than exact does
    exact = "exact"  # rounded down, as LMD's code does it: as many programs as there are numbers


@dataclass(slots=True)
class MaskConfig:
    """The share of masked tokens as a function of (step, steps).  The default is LMD's."""

    kind: MaskKind = MaskKind.cosine
    start: float = 0.15  # share that is masked at step 0; constant does not use it
    middle: float = 0.40  # of piecewise alone
    end: float = 0.75
    # Share of the steps after which `end` is held; 0: 2/3, as LMD's code, and 1 for linear.
    ramp: float = 0.0
    # Numbers of visible tokens to choose from, beside all of them, which is always one; (): six
    # from 85 % down to 25 %, and further ones where the schedule goes beyond them.
    buckets: tuple[int, ...] = ()
    rounding: Rounding = Rounding.nearest

    def problems(self) -> list[str]:
        """All problems of these values, each with its mend."""
        found = [
            f"mask.{name} = {value}; a share of the tokens: from 0 to below 1"
            for name, value in (("start", self.start), ("middle", self.middle), ("end", self.end))
            if not 0 <= value < 1
        ]
        if not 0 <= self.ramp <= 1:
            found.append(
                f"mask.ramp = {self.ramp}; the share of the steps over which the mask grows, up to "
                "1 (0: 2/3, and 1 for linear)"
            )
        if len(set(self.buckets)) < len(self.buckets) or any(n < 1 for n in self.buckets):
            found.append(
                f"mask.buckets = {self.buckets}; different numbers of visible tokens, from 1 on"
            )
        return found

    def token_problems(self, tokens: int) -> list[str]:
        """Problems of these values for a network of so many tokens."""
        found = []
        if self.buckets and max(self.buckets) > tokens:
            found.append(
                f"mask.buckets = {self.buckets}, but there are only {tokens} tokens to be visible"
            )
        name, most = max(self._ratios().items(), key=lambda item: item[1])
        if not found and int(self.keeps(np.asarray([most]), tokens)[0]) < 1:
            found.append(
                f"a mask ratio of {most:g} leaves none of {tokens} tokens visible; lower "
                f"mask.{name} or use a smaller patch"
            )
        return found

    def _ratios(self) -> dict[str, float]:
        """Those that the schedule goes through; its smallest and its largest are among them."""
        if self.kind is MaskKind.constant:
            return {"end": self.end}
        if self.kind is MaskKind.piecewise:
            return {"end": self.end, "middle": self.middle, "start": self.start}
        return {"end": self.end, "start": self.start}

    def ratio(
        self, step: int | Int64[np.ndarray, " n"], steps: int
    ) -> float | Float64[np.ndarray, " n"]:
        """The share of masked tokens at `step` (0-based) of `steps`; host numbers, float64."""
        ramp = self.ramp or (1.0 if self.kind is MaskKind.linear else 2 / 3)
        full = max(ramp * steps, 1.0)
        k = np.atleast_1d(np.asarray(step, np.float64))
        if self.kind is MaskKind.constant:
            found = np.full_like(k, self.end)
        elif self.kind is MaskKind.linear:
            found = np.interp(k, [0, full], [self.start, self.end])
        elif self.kind is MaskKind.piecewise:
            values = [self.start, self.middle, self.middle, self.end]
            found = np.interp(k, [0, full / 4, full / 2, full], values)
        else:
            done = np.minimum(k / max(math.floor(full + _ROUNDING), 1), 1.0)
            curve = _squared_cosine(done) / _squared_cosine(np.zeros(1))
            found = self.start + (self.end - self.start) * (1 - curve)
        return found if np.ndim(step) else float(found[0])

    def table(self, tokens: int) -> tuple[int, ...]:
        """The numbers of visible tokens that `nearest` and `up` choose from, and all of them."""
        if self.buckets:
            return tuple(sorted({*self.buckets, tokens}))
        ratios = self._ratios().values()
        return tuple(sorted({*_numbers(tokens, min(ratios), max(ratios)), tokens}))

    def keeps(
        self, ratio: Float64[np.ndarray, " n"], tokens: int
    ) -> Int64[np.ndarray, " n"]:  # fmt: skip
        """The numbers of visible tokens at these shares of masked ones."""
        visible = tokens * (1 - ratio)
        exact = np.floor(visible + _ROUNDING).astype(np.int64)
        if self.rounding is Rounding.exact:
            return exact
        table = np.asarray(self.table(tokens))
        if self.rounding is Rounding.up:
            return table[np.searchsorted(table, exact)]
        distance = np.abs(table[::-1] - visible[:, None])  # of two equally near ones the larger
        return table[::-1][distance.argmin(axis=1)]

    def keep(self, step: int, steps: int, tokens: int) -> int:
        """The number of visible tokens at `step` of `steps`."""
        return int(self.keeps(np.asarray([self.ratio(step, steps)]), tokens)[0])

    def visited(self, first: int, last: int, steps: int, tokens: int) -> list[int]:
        """The numbers of visible tokens at the steps first..last-1, each once, as they come."""
        found: dict[int, None] = {}
        for start in range(first, last, _CHUNK):
            ratio = self.ratio(np.arange(start, min(start + _CHUNK, last)), steps)
            keeps = self.keeps(ratio, tokens)
            at = np.unique(keeps, return_index=True)[1]
            found |= dict.fromkeys(keeps[np.sort(at)].tolist())
        return list(found)


def _squared_cosine(done: Float64[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
    return np.cos((done + COSINE_OFFSET) / (1 + COSINE_OFFSET) * np.pi / 2) ** 2


def _numbers(tokens: int, least: float, most: float) -> set[int]:
    """The six of `tokens`, and what reaches from there to ratios that are beyond 0.15 .. 0.75.

    The steps to the largest ratio are as fine as those of the six: an eighth of the tokens.
    """
    found = set(_TABLES.get(tokens) or _spread(tokens))
    fewest, low = max(math.floor(tokens * (1 - most) + _ROUNDING), 1), min(found)
    if most > _LARGEST and fewest < low:
        pieces = math.ceil((low - fewest) / max(tokens / 8, 1))
        found |= {round(n) for n in np.linspace(fewest, low, pieces + 1)}
    if least < _SMALLEST:
        found.add(max(math.floor(tokens * (1 - least) + _ROUNDING), *found))
    return found


def _spread(tokens: int) -> tuple[int, ...]:
    """Six numbers from 85 % down to 25 % of the tokens, as many as LMD's ratios ask for."""
    most, least = math.floor(tokens * 0.85), max(math.floor(tokens * 0.25), 1)
    return tuple(sorted({round(n) for n in np.linspace(least, max(most, least), _TABLE_SIZE)}))


# ----------------------------------------------------------------------------------------- tokens


@flax.struct.dataclass
class Split:
    """Which tokens of each example are visible: the first `keep` of an order of all tokens."""

    # int[b, n] both; a tree of shapes has those here, and of microbatches more dimensions.
    order: Any  # the tokens, visible ones first
    inverse: Any  # where each token stands in that order
    keep: int = flax.struct.field(pytree_node=False)

    @property
    def tokens(self) -> int:
        """How many there are of each example."""
        return self.order.shape[1]

    @property
    def whole(self) -> bool:
        """Whether nothing is masked; known when a program is traced."""
        return self.keep == self.tokens

    def masked(self) -> Bool[Array, "b n"]:
        """True at masked tokens."""
        return self.inverse >= self.keep

    def take(self, x: Float[Array, "b n d"]) -> Float[Array, "b k d"]:
        """The visible tokens; x itself, in its order, where nothing is masked."""
        if self.whole:
            return x
        return jnp.take_along_axis(x, self.order[:, : self.keep, None], axis=1)

    def put(
        self, visible: Float[Array, "b k d"], fill: Float[Array, "*b #n d"]
    ) -> Float[Array, "b n d"]:
        """All tokens: the visible ones in their places, `fill` (one for all, or each) elsewhere."""
        if self.whole:
            return visible
        rest = ((0, 0), (0, self.tokens - self.keep), (0, 0))
        spread = jnp.take_along_axis(jnp.pad(visible, rest), self.inverse[:, :, None], axis=1)
        return jnp.where(self.masked()[:, :, None], fill.astype(visible.dtype), spread)


def split(order: Int[Array, "b n"], keep: int) -> Split:
    """The first `keep` tokens of an order are visible."""
    if not 0 < keep <= order.shape[1]:
        raise ValueError(f"keep = {keep} of {order.shape[1]} tokens")
    return Split(order, jnp.argsort(order, axis=1), keep)


def random_order(
    key: PRNGKeyArray, batch: int, rows: int, columns: int, block: int = 1
) -> Int[Array, "b n"]:
    """An order of the tokens for each example, all equally likely.

    block: squares of so many tokens a side stay together (MaskDM, arXiv 2306.11363), and their
    orders are equally likely; all tokens are visible equally often where `keep` holds whole squares
    (`whole_squares`) and all squares are whole.
    """
    height, width = -(-rows // block), -(-columns // block)
    score = jax.random.uniform(key, (batch, height, width))
    score = score.repeat(block, axis=1)[:, :rows].repeat(block, axis=2)[:, :, :columns]
    return jnp.argsort(score.reshape(batch, rows * columns), axis=1, stable=True)


def whole_squares(
    keep: Int64[np.ndarray, " n"], block: int, tokens: int
) -> Int64[np.ndarray, " n"]:  # fmt: skip
    """The nearest numbers of visible tokens that are whole squares of `block` tokens a side.

    At least one square is visible, and where tokens are masked at least one is masked.
    """
    if block == 1:
        return keep
    size = block**2
    squares = np.clip((keep + size // 2) // size, 1, tokens // size - 1)
    return np.where(keep < tokens, squares * size, tokens)


def indexed_order(
    key: PRNGKeyArray, index: Int[Array, " b"], rows: int, columns: int
) -> Int[Array, "b n"]:  # fmt: skip
    """Such orders that follow an example's index, whatever batch it is in."""

    def one(i: Int[Array, ""]) -> Int[Array, " n"]:
        return random_order(jax.random.fold_in(key, i), 1, rows, columns)[0]

    return jax.vmap(one)(index)


def largest_ratio(tokens: int) -> float:
    """The largest share of masked tokens, to three digits, that leaves one visible."""
    return math.floor(1000 * (1 - 1 / tokens)) / 1000


def order_of(visible: Bool[Array, "b n"]) -> Int[Array, "b n"]:
    """An order with these tokens first; the number of them must be the same in each example."""
    return jnp.argsort(~visible, axis=1, stable=True)


def whiten(tokens: Float[Array, "b n p"]) -> Float[Array, "b n p"]:
    """Each token less its mean, over its deviation (of p - 1): the target of MAE and LMD.

    It cannot be decoded: the mean and deviation of a masked token are not known.
    """
    mean = tokens.mean(-1, keepdims=True)
    variance = tokens.var(-1, keepdims=True, ddof=1)
    return (tokens - mean) / jnp.sqrt(variance + WHITEN_EPS)
