"""How the softmax operations call their kernels: with arrays as [*G, *R, width, inner]."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .._batching import batch_rows
from .._custom_call import Value, row_call
from .._geometry import Geometry
from .._kernel_calls import Kernels
from ._norm_arithmetic import scratch_size
from ._softmax import axis_of


def _call_along_axis(
    target: str,
    operands: Sequence[Value],
    results: Sequence[Value],
    numbers: Mapping[str, Any],
    *,
    trailing: int,
    groups: int,
    devices: int,
    **_: Any,
) -> list[Any]:
    """The axes behind the one that the softmax runs along count as one."""
    row = operands[0].array
    behind = row.shape[axis_of(row, trailing) + 1 :]

    def flat(value: Value) -> Value:
        if value.kind not in ("row", "vector") or not behind:
            return value
        lead = value.array.shape[: value.array.ndim - trailing]
        return value._replace(array=value.array.reshape(*lead, math.prod(behind)))

    def whole(value: Value, x: Any) -> Any:
        if value.kind not in ("row", "vector") or not behind:
            return x
        return x.reshape(*x.shape[:-1], *behind)

    found = row_call(
        target,
        [flat(value) for value in operands],
        results,
        groups=groups,
        devices=devices,
        planes=bool(behind),
        **numbers,
    )
    return [whole(value, x) for value, x in zip(results, found)]


# Rows along an axis, behind which there may be others.
ALONG_AXIS = Geometry(batch_rows, grouped=True, call=_call_along_axis)


def kernels(covers: Callable[..., bool], **calls: Any) -> Kernels:
    """They take data of one type, that of x; what is of another is left to jnp."""
    return Kernels(covers=covers, one_type=True, scratch=_scratch_size, **calls)


def _scratch_size(row: Any) -> int:
    """Beside what the sums over rows themselves take, one number a row."""
    return scratch_size(row) + row.size // row.shape[-1] + 3
