"""Where the features of an array lie, and what has the shape of them."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ... import _check
from ..._numerics import accumulation_dtype


class Layout(NamedTuple):
    """Where the features of an array lie: one block of axes, after a transposition if need be."""

    shape: tuple[Any, ...]
    axes: tuple[int, ...]  # the feature axes of the array as it was given
    order: tuple[int, ...]  # the transposition, () for none
    trailing: int  # axes behind the block
    dtype: Any  # of y

    @property
    def reduced(self) -> tuple[Any, ...]:
        """The sizes of the axes that are reduced."""
        return tuple(n for i, n in enumerate(self.shape) if i not in self.axes)

    @property
    def block(self) -> tuple[int, int]:
        """Feature axes and axes behind them, as channels.py counts them."""
        return len(self.axes), self.trailing

    def arrange(self, x: Any) -> Any:
        """An array as it was given, in this layout."""
        return x.transpose(self.order) if self.order else x

    def restore(self, y: Any) -> Any:
        """The other way round."""
        return y.transpose(np.argsort(self.order)) if self.order else y


def layout_of(name: str, axis, dtype, x, **parameters) -> tuple[Layout, Any, list[Any]]:
    """The layout of x, x in it, and the parameters in the accumulation type; all checked."""
    _check.floating(name, x=x)
    _check.floating(name, **{k: v for k, v in parameters.items() if v is not None})
    x = jnp.asarray(x)
    axes = _check.axes(name, axis, x.ndim)
    _check.parameter(name, tuple(x.shape[a] for a in axes), **parameters)
    contiguous = all(b == a + 1 for a, b in itertools.pairwise(axes))
    order = () if contiguous else (*(i for i in range(x.ndim) if i not in axes), *axes)
    layout = Layout(
        x.shape,
        axes,
        order,
        x.ndim - 1 - axes[-1] if axes and contiguous else 0,
        _check.result_dtype(name, dtype, x.dtype),
    )
    accumulation = accumulation_dtype(x.dtype)
    wide = [None if p is None else jnp.asarray(p).astype(accumulation) for p in parameters.values()]
    return layout, layout.arrange(x), wide


def mask_of(name: str, where, layout: Layout, x: Any) -> Any:
    """`where` as a boolean array in the layout; TypeError or ValueError if it does not fit.

    It has the axes of the array x in the layout, but keeps the size 1 where it is broadcast. On a
    mesh with explicit axes it is sharded as x is: what it hides does not decide where results are.
    """
    where = _check.mask(name, where, layout.shape, broadcast=False)
    where = layout.arrange(where.reshape((1,) * (len(layout.shape) - where.ndim) + where.shape))
    sharding = jax.typeof(x).sharding
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return where
    spec = (s if n > 1 else None for s, n in zip(sharding.spec, where.shape, strict=True))
    return jax.sharding.reshard(where, jax.NamedSharding(sharding.mesh, jax.P(*spec)))
