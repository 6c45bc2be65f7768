"""What batch normalisation does to every element: y = factors · (x − mean) + shift.

Elementwise work belongs to XLA, which fuses it with the activation that follows. The kernel is for
where nothing follows, and is taken only where it is asked for by name.

Arrays and `block` are as in channels.py.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax.numpy as jnp

from ..._batching import batch_rows
from ..._custom_call import Value, row_call
from ..._numerics import widen
from ..._primitive import bind, define
from .channels import planes_of
from .statistics import Block, spread


def normalise(
    x, mean, factors, shift, scale_factor: float, dtype, block: Block, implementation
) -> Any:
    """scale_factor · factors · (x − mean) + shift, rounded once to `dtype`; shift may be None."""
    (y,) = bind(
        golden_batch_norm_normalise_p,
        *(x, mean, *factors),
        *(() if shift is None else (shift,)),
        factors=len(factors),
        has_shift=shift is not None,
        scale_factor=scale_factor,
        dtype=dtype,
        block=block,
        groups=0,
        implementation=implementation,
    )
    return y


def _reference(x, mean, *operands, factors, has_shift, scale_factor, dtype, block, groups):
    # Element by element: for their product along the channels XLA would launch a kernel of its own.
    # One number is made of them nevertheless, which is infinite where the kernel's is.
    slope = scale_factor
    for numbers in operands[:factors]:
        slope = slope * jnp.broadcast_to(spread(numbers, x, groups, block), x.shape)
    y = slope * (widen(x) - spread(mean, x, groups, block))
    if has_shift:
        y = y + spread(operands[factors], x, groups, block)
    return (y.astype(dtype),)


def _kernel(x, mean, *operands, devices, factors, has_shift, scale_factor, dtype, block, groups):
    if x.size == 0:
        return _reference(
            *(x, mean, *operands),
            factors=factors,
            has_shift=has_shift,
            scale_factor=scale_factor,
            dtype=dtype,
            block=block,
            groups=groups,
        )
    slope = functools.reduce(operator.mul, operands[:factors], scale_factor)
    shift = operands[factors] if has_shift else jnp.zeros_like(mean)
    planes = planes_of(x, block)
    channels = (*x.shape[:groups], planes.shape[-2])
    (y,) = row_call(
        "syntonic_golden_batch_norm_normalise",
        [
            Value("x", "row", planes),
            Value("mean", "parameter", mean.reshape(channels)),
            Value("slope", "parameter", slope.reshape(channels)),
            Value("shift", "parameter", shift.reshape(channels)),
        ],
        [Value("y", "row", dtype=dtype)],
        groups=groups,
        devices=devices,
        planes=True,
    )
    return (y.reshape(x.shape),)


golden_batch_norm_normalise_p = define(
    "golden_batch_norm_normalise",
    _reference,
    operation="golden_batch_norm_inference",
    kernel=_kernel,
)


def _kinds(*, factors, has_shift, **_):
    return ["row"] + ["parameter"] * (1 + factors + has_shift), ["row"]


batch_rows(golden_batch_norm_normalise_p, _kinds)
