"""Several axes of an array as one, also where a mesh has explicit axes.

There a reshape has to say where it leaves what was sharded along an axis that it merges. A merged
axis lies where its first axis did, so that one comes first which is sharded; what the others are
sharded over is gathered. Without explicit axes all this is a transposition and a reshape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._explicit import explicit_spec, reshape, spec_of

Axes = tuple[int, ...]


class Merge(NamedTuple):
    """How some axes of an array become its last one."""

    shape: tuple[Any, ...]  # of the array as it was given
    axes: Axes  # those that are merged, in increasing order
    order: Axes  # in which they are

    @property
    def last(self) -> Axes:
        """Where they lie before they are one."""
        return tuple(range(len(self.shape) - len(self.axes), len(self.shape)))

    def array(self, x: Any) -> Any:
        """An array as it was given, with its merged axis last."""
        lies_last = self.order == self.last
        return _merged(x if lies_last else jnp.moveaxis(x, self.order, self.last), len(self.axes))

    def parameter(self, p: Any) -> Any:
        """An array that has the axes only, as one axis."""
        if self.order != self.axes:
            p = p.transpose([self.axes.index(a) for a in self.order])
        return _merged(p, len(self.axes))

    def restore(self, y: Any, spec: Any) -> Any:
        """`array` the other way round; `spec` is where the result is to lie, or None."""
        if len(self.axes) > 1:
            order = (*(i for i in range(len(self.shape)) if i not in self.axes), *self.order)
            shape = tuple(self.shape[i] for i in order)
            y = reshape(y, shape, spec and [spec[i] for i in order])
        return y if self.order == self.last else jnp.moveaxis(y, self.last, self.order)


def merge_of(x: Any, axes: Axes) -> Merge:
    """How to merge `axes` of x, which are in increasing order."""
    spec = explicit_spec(x)
    first = next((a for a in axes if spec and spec[a] is not None), axes[0])
    return Merge(x.shape, axes, (first, *(a for a in axes if a != first)))


def spec_of_formula(merge: Merge, x: Any, parameters: Sequence[Any]) -> Sequence[Any] | None:
    """Over which explicit mesh axes jnp shards x · parameter · …, which has the shape of x."""

    def formula(x, *parameters):
        others = [i for i in range(x.ndim) if i not in merge.axes]
        for p in parameters:
            x = x * jnp.expand_dims(p.astype(x.dtype), others)
        return x

    # eval_shape would tell nothing of a mesh that has other axes too.
    aval: Any = jax.make_jaxpr(formula)(x, *parameters).out_avals[0]
    return spec_of(aval.sharding)


def _merged(x: Any, count: int) -> Any:
    """The last `count` axes as one."""
    if count == 1:
        return x
    lead = x.ndim - count
    spec = explicit_spec(x)
    return reshape(x, (*x.shape[:lead], math.prod(x.shape[lead:])), spec and spec[: lead + 1])
