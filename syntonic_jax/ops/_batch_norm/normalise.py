"""What batch normalisation does to every element: y = factors · (x − mean) + shift.

Elementwise work belongs to XLA, which fuses it with the activation that follows. The kernel is for
where nothing follows, and is taken only where it is asked for by name.

Arrays and `block` are as in channels.py.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from ..._custom_call import Value, row_call
from ..._kernel_calls import KernelsByHand
from ..._numerics import widen
from ..._operation import Input, Operation, Output
from .channels import planes_of
from .statistics import Block, spread


def normalise(
    x, mean, factors, shift, scale_factor: float, dtype, block: Block, implementation
) -> Any:
    """scale_factor · factors · (x − mean) + shift, rounded once to `dtype`.

    There are one or two factors; shift may be None.
    """
    slope, scale = factors if len(factors) == 2 else (*factors, None)
    (y,) = NORMALISE(
        *(x, mean, slope, scale, shift),
        scale_factor=scale_factor,
        dtype=dtype,
        block=block,
        implementation=implementation,
    )
    return y


def _reference(x, mean, slope, scale, shift, *, scale_factor, dtype, block, groups):
    # Element by element: for their product along the channels XLA would launch a kernel of its own.
    # One number is made of them nevertheless, which is infinite where the kernel's is.
    factor = scale_factor
    for numbers in (slope, scale):
        if numbers is not None:
            factor = factor * jnp.broadcast_to(spread(numbers, x, groups, block), x.shape)
    y = factor * (widen(x) - spread(mean, x, groups, block))
    if shift is not None:
        y = y + spread(shift, x, groups, block)
    return (y.astype(dtype),)


def _forward_pass(x, mean, slope, scale, shift, *, devices, scale_factor, dtype, block, groups):
    slope = slope * scale_factor
    if scale is not None:
        slope = slope * scale
    shift = jnp.zeros_like(mean) if shift is None else shift
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


# Differentiated as a whole with what its numbers come from (rules.py).
NORMALISE = Operation(
    name="golden_batch_norm_normalise",
    function="golden_batch_norm_inference",
    inputs=(
        Input("x"),
        Input("mean", "parameter"),
        Input("slope", "parameter"),
        Input("scale", "parameter", optional=True),
        Input("shift", "parameter", optional=True),
    ),
    outputs=(Output("y", dtype="dtype"),),
    reference=_reference,
    kernels=KernelsByHand(forward_pass=_forward_pass),
    default="xla",
)
