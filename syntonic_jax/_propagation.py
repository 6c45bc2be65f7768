"""Where XLA's sharding propagation stops.

XLA's partitioner hands the sharding of a parameter on to all that is made of it. What a batch norm
makes of its channels belongs where x is: given the sharding of a scale, every number of a channel
would be gathered by itself, in place of the scale once.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.interpreters import mlir

from . import _compat
from ._batching import batch_elementwise
from ._primitive import bind, define, forward_mode, is_zero, linear, zero_like

# sdy's PropagationDirection: from operands to results, and back.
_FORWARD, _BACKWARD = 1, 2


def contained(x: Any, direction: int = _BACKWARD) -> Any:
    """x, whose sharding says nothing about that of what is made of it.

    Of its cotangent it is the other way round. None stays None.
    """
    if x is None:
        return None
    return bind(_contained_p, x, direction=direction, implementation=None)[0]


_contained_p = define("contained", lambda x, direction: (x,), operation="golden_batch_norm")


def _lower(ctx, x, *, direction, **_):
    if _compat.partition_devices(ctx) == 1 or not jax.config.jax_use_shardy_partitioner:  # type: ignore[attr-defined]
        return [x]
    allowed = mlir.ir.Attribute.parse(f"{direction} : i32")
    return mlir.ir.Operation.create(
        "sdy.propagation_barrier",
        results=[x.type],
        operands=[x],
        attributes={"allowed_direction": allowed},
    ).results


def _jvp(primals, tangents, *, direction, **_):
    (x,), (dx,) = primals, tangents
    return [contained(x, direction)], [zero_like(x) if is_zero(dx) else contained(dx, direction)]


def _transpose(cotangents, avals, wanted, *, direction, **_):
    del avals, wanted
    return [contained(cotangents[0], _FORWARD + _BACKWARD - direction)]


mlir.register_lowering(_contained_p, _lower)
forward_mode(_contained_p, _jvp)
linear(_contained_p, _transpose)
batch_elementwise(_contained_p)
