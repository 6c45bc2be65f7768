"""Batching of row-wise and elementwise primitives.

The values of a row-wise primitive are of three kinds, by their names in `Kinds`:

* ``row`` [*G, *R, width] and ``vector`` [*G, *R], with one entry a row;
* ``parameter`` [*G, width], shared by the rows of a group.

G are the group dimensions, as many as the static parameter ``groups`` says; none until vmap maps a
parameter or asks for one parameter gradient an example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Primitive

from . import _primitive

# kinds(**params) -> the kinds of the operands, the kinds of the results
Kinds = Callable[..., tuple[Sequence[str], Sequence[str]]]


def batch_rows(primitive: Primitive, kinds: Kinds) -> None:
    """vmap of a row-wise primitive: one call, the mapped axis folded into rows or groups."""

    def rule(operands, axes, *, groups, **params):
        operand_kinds, result_kinds = kinds(**params)
        size = _mapped_size(operands, axes)
        per_example = "parameter" in result_kinds or any(
            kind == "parameter" and axis is not None for kind, axis in zip(operand_kinds, axes)
        )
        if per_example:
            operands = _in_front(operands, axes)
            results = _primitive.bind(primitive, *operands, groups=groups + 1, **params)
            return results, [0] * len(results)
        operands = [
            x if kind == "parameter" else _move(x, axis, groups, size)
            for x, axis, kind in zip(operands, axes, operand_kinds)
        ]
        results = _primitive.bind(primitive, *operands, groups=groups, **params)
        return results, [groups] * len(results)

    _primitive.batched(primitive, rule)


def batch_elementwise(primitive: Primitive) -> None:
    """vmap of a primitive all of whose values have one shape."""

    def rule(operands, axes, **params):
        results = _primitive.bind(primitive, *_in_front(operands, axes), **params)
        return results, [0] * len(results)

    _primitive.batched(primitive, rule)


def batch_groups(primitive: Primitive) -> None:
    """vmap of a primitive all of whose values begin with its groups: there is one group more."""

    def rule(operands, axes, *, groups, **params):
        operands = _in_front(operands, axes)
        results = _primitive.bind(primitive, *operands, groups=groups + 1, **params)
        return results, [0] * len(results)

    _primitive.batched(primitive, rule)


def _in_front(operands: Sequence[Any], axes: Sequence[int | None]) -> list[Any]:
    """All of them with the mapped axis as their first."""
    size = _mapped_size(operands, axes)
    return [_move(x, axis, 0, size) for x, axis in zip(operands, axes)]


def _mapped_size(operands: Sequence[Any], axes: Sequence[int | None]) -> int:
    return next(x.shape[axis] for x, axis in zip(operands, axes) if axis is not None)


def _move(x: Any, axis: int | None, to: int, size: int) -> Any:
    if axis is not None:
        return jnp.moveaxis(x, axis, to)
    return jnp.broadcast_to(jnp.expand_dims(x, to), (*x.shape[:to], size, *x.shape[to:]))
