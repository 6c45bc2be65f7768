"""How the arrays of an operation lie: what vmap does with them, and how its kernel is called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import _batching
from ._custom_call import Value, elementwise_call, row_call


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The shapes of an operation's arrays.

    Attributes:
      batch: `batch(primitive, kinds)` sets the vmap rule; `kinds` as in _batching.py.
      grouped: whether the jnp forms take the number of group dimensions, `groups`.
      call: `call(target, operands, results, numbers, devices=..., **params)` emits the custom call
        of the arrays and the numbers that the kernel takes.
    """

    batch: Callable[[Any, _batching.Kinds], None]
    grouped: bool
    call: Callable[..., list[Any]]


def _call_rows(
    target: str,
    operands: Sequence[Value],
    results: Sequence[Value],
    numbers: Mapping[str, Any],
    *,
    devices: int,
    groups: int,
    **_: Any,
) -> list[Any]:
    return row_call(target, operands, results, groups=groups, devices=devices, **numbers)


def _call_elementwise(
    target: str,
    operands: Sequence[Value],
    results: Sequence[Value],
    numbers: Mapping[str, Any],
    **_: Any,
) -> list[Any]:
    arrays = {v.name: v.array for v in operands}
    return elementwise_call(target, arrays, {v.name: v.dtype for v in results}, **numbers)


# Rows in groups, and what belongs to a row or to a column.
ROWS = Geometry(_batching.batch_rows, grouped=True, call=_call_rows)
# All arrays of one shape.
ELEMENTWISE = Geometry(
    lambda primitive, _: _batching.batch_elementwise(primitive),
    grouped=False,
    call=_call_elementwise,
)
# One number a group, or a few. What a group holds is a row to the kernel.
GROUPS = Geometry(
    lambda primitive, _: _batching.batch_groups(primitive), grouped=True, call=_call_rows
)
