"""Formulas of coefficients, in their own type and, to see what overflows, in a wide one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from .. import _explicit
from . import _fixed_point

# The same formula for arrays of integers and for `Wide` ones.
Formula = Callable[..., tuple[Any, ...]]


class Wide:
    """Integers of so many bits that no sum or product of two coefficients wraps around."""

    def __init__(self, limbs: _fixed_point.Limbs):
        self.limbs = limbs

    def __add__(self, other: Wide) -> Wide:
        return Wide(_fixed_point.add(*_broadcast(self.limbs, other.limbs)))

    def __sub__(self, other: Wide) -> Wide:
        return Wide(_fixed_point.subtract(*_broadcast(self.limbs, other.limbs)))

    def __neg__(self) -> Wide:
        return Wide(_fixed_point.negate(self.limbs))

    def __mul__(self, other: Wide) -> Wide:
        # In two's complement the lower half of a product does not depend on the signs.
        product = _fixed_point.multiply(*_broadcast(self.limbs, other.limbs))
        return Wide(product[-len(self.limbs) :])

    def __matmul__(self, other: Wide) -> Wide:
        rows, columns = self._shaped(_as_rows), other._shaped(_as_columns)
        products = rows._shaped(lambda x: x[..., :, None]) * columns._shaped(
            lambda x: x[..., None, :, :]
        )
        shape = jax.eval_shape(jnp.matmul, self.limbs[0], other.limbs[0]).shape
        return products.sum(-2)._shaped(lambda x: x.reshape(shape))

    def sum(self, axis: Any = None, keepdims: bool = False) -> Wide:
        """By halves, as wide integers add no other way."""
        kept = jax.eval_shape(lambda x: x.sum(axis, keepdims=keepdims), self.limbs[0]).shape
        ndim = self.limbs[0].ndim
        axes = range(ndim) if axis is None else [axis] if isinstance(axis, int) else axis
        axes = {i % ndim for i in axes}
        last = [*(i for i in range(ndim) if i not in axes), *sorted(axes)]
        lead = tuple(self.limbs[0].shape[i] for i in last[: ndim - len(axes)])
        total = self._shaped(lambda x: x.transpose(last).reshape(*lead, -1))
        while (n := total.limbs[0].shape[-1]) > 1:
            half = (n + 1) // 2
            first = total._shaped(lambda x, half=half: x[..., :half])
            rest = total._shaped(
                lambda x, half=half, n=n: jnp.concatenate(
                    [x[..., half:], jnp.zeros_like(x[..., : 2 * half - n])], -1
                )
            )
            total = first + rest
        if n == 0:
            return Wide((jnp.zeros(kept, jnp.uint32),) * len(self.limbs))
        return total._shaped(lambda x: x.reshape(kept))

    def _shaped(self, f: Callable[[Any], Any]) -> Wide:
        return Wide(tuple(map(f, self.limbs)))

    def fits(self, words: int) -> Any:
        """Whether every element is one of `words` words: all above repeats its sign."""
        top = jnp.where(self.limbs[-words] >> 31 != 0, jnp.uint32(0xFFFFFFFF), jnp.uint32(0))
        above = self.limbs[:-words]
        return functools.reduce(lambda ok, limb: ok & (limb == top), above, True)


def _broadcast(
    x: _fixed_point.Limbs, y: _fixed_point.Limbs
) -> tuple[_fixed_point.Limbs, _fixed_point.Limbs]:
    shape = jnp.broadcast_shapes(x[0].shape, y[0].shape)

    def broadcast(limbs: _fixed_point.Limbs) -> _fixed_point.Limbs:
        return tuple(jnp.broadcast_to(limb, shape) for limb in limbs)

    return broadcast(x), broadcast(y)


def _as_rows(x: Any) -> Any:
    return x[None] if x.ndim == 1 else x


def _as_columns(x: Any) -> Any:
    return x[:, None] if x.ndim == 1 else x


@functools.partial(jax.jit, static_argnums=(0, 2), inline=True)
def narrowed(name: str, x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Integers in a narrower type; under `checkify` with an error where one does not fit."""
    limits = jnp.iinfo(dtype)
    fits = jnp.all((x >= limits.min) & (x <= limits.max))
    checkify.debug_check(fits, f"{name} passes the range of {dtype}")
    return x.astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def checked(name: str, formula: Formula, *coefficients: Any) -> tuple[Any, ...]:
    """The formula; under `checkify` with an error where a result does not fit its type.

    Anywhere else the wide computation is dead code, which XLA drops.
    """
    results = formula(*coefficients)
    dtype = results[0].dtype
    words = dtype.itemsize // 4
    # Gathered where the mesh has explicit axes: they do not take apart what is sharded.
    wide = [Wide(_fixed_point.from_int(_explicit.gathered(c), 2 * words + 1)) for c in coefficients]
    fits = [jnp.all(x.fits(words)) for x in formula(*wide)]
    checkify.debug_check(
        functools.reduce(lambda x, y: x & y, fits),
        f"GoldenArray: {name}: a coefficient passes the range of {dtype}",
    )
    return results
