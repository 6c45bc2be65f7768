"""What batch normalisation does along its channels: moments, sums, and the transpose of the sums.

An array x is [*G, *outer, *features, *trailing] with G group dimensions (_batching.py); numbers of
a channel are [*G, *features], in the accumulation type. A mask has the axes of x, some of which may
be broadcast ones. `block` is (features, trailing): how many axes of each kind there are.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from ..._custom_call import Value, row_call
from ..._geometry import ROWS
from ..._kernel_calls import KernelsByHand
from ..._numerics import accumulation_dtype, widen
from ..._operation import Derivative, Input, Operation, Output
from .statistics import Block, count_of, line, merged, reduced, spread, statistics, wide_count

# ------------------------------------------------------------------------------- operations


def moments(
    x, scale, bias, where, epsilon: float, scale_factor: float, block: Block, implementation
) -> tuple[Any, ...]:
    """Number of elements of every channel, mean, low, var, slope and shift.

    The mean to twice the precision is mean + low. The number is a Python float, or an array where
    there is a mask. Slope and shift are those of `line`. A channel without elements has the mean 0
    and an infinite variance, so the slope 0.
    """
    results = MOMENTS(
        *(x, where, scale, bias),
        outputs=("low", "var", "slope", "shift") + (() if where is None else ("count",)),
        epsilon=epsilon,
        scale_factor=scale_factor,
        block=block,
        implementation=implementation,
    )
    *numbers, count = results if where is not None else [*results, count_of(x, 0, block)]
    return wide_count(count), *numbers


def sums(x, mean, low, a, where, block: Block, implementation) -> list[Any]:
    """Σ a and Σ (x − mean − low) · a along every channel, of the unmasked elements."""
    return LINEAR.pull(
        (x, mean, low, None, where),
        (a,),
        (False, True, True),
        zeros="where",
        dtype=a.dtype,
        block=block,
        groups=0,
        implementation=implementation,
    )


def apply_tangent(
    x, mean, low, slope, dx, shift, tilt, where, dtype, block: Block, implementation
) -> Any:
    """slope · dx + shift + tilt · (x − mean − low), of which any term may be None.

    It is 0 where x is masked and not finite: infinities under the mask have no derivatives.
    """
    (dy,) = LINEAR.push(
        (x, mean, low, None if dx is None else slope, where),
        (dx, shift, tilt),
        (True,),
        zeros="finite",
        dtype=dtype,
        block=block,
        groups=0,
        implementation=implementation,
    )
    return dy


# ------------------------------------------------------------------------------- reference


def _moments(x, where, scale, bias, *, epsilon, scale_factor, block, groups, alone=False):
    mask = [] if where is None else [where]
    mean, low, var, *count = statistics(x, mask, block, groups, alone)
    results = mean, low, var, *line(low, var, scale, bias, epsilon, scale_factor)
    results = (*results, *(count or [None]))
    # On a CPU they would be made anew for every element of y, within the loop over them.
    return lax.optimization_barrier(results) if alone else results


def _moments_on_cpu(form):
    def on_cpu(*inputs, devices, **params):
        return form(*inputs, alone=devices == 1, **params)

    return on_cpu


def _without_spread(results, *, epsilon, **_):
    """Where a channel has neither variance nor ε, and is divided by zero, for `checkify`."""
    return jnp.isinf(lax.rsqrt(results[2] + epsilon))


def _centred(saved, zeros: str, groups: int, block: Block) -> Any:
    x, mean, low, _, where = saved
    centred = (widen(x) - spread(mean, x, groups, block)) - spread(low, x, groups, block)
    return _unmasked(centred, x, where, zeros)


def _unmasked(values, x, where, zeros: str):
    """`values`, with zeros where the mask leaves x out.

    They take the place of all that ("where"), or only of what is not finite in x ("finite").
    """
    if where is None:
        return values
    return jnp.where(where | jnp.isfinite(x) if zeros == "finite" else where, values, 0)


def _tangent(saved, tangents, *, zeros, dtype, block, groups):
    x, _, _, slope, where = saved
    dx, shift, tilt = tangents
    out = jnp.zeros_like(widen(x))
    if dx is not None:
        out = out + spread(slope, x, groups, block) * dx
    if shift is not None:
        out = out + spread(shift, x, groups, block)
    if tilt is not None:
        out = out + spread(tilt, x, groups, block) * _centred(saved, zeros, groups, block)
    return (_unmasked(out, x, where, zeros).astype(dtype),)


def _cotangent(saved, cotangents, *, zeros, dtype, block, groups):
    del dtype
    (x, _, _, slope, where), (ct,) = saved, cotangents
    ct = _unmasked(ct.astype(accumulation_dtype(x.dtype)), x, where, zeros)
    axes = reduced(x, groups, block)
    d_x = None if slope is None else spread(slope, x, groups, block) * ct
    return d_x, ct.sum(axes), (_centred(saved, zeros, groups, block) * ct).sum(axes)


# -------------------------------------------------------------------------------- kernels

# Scratch memory for as many workers as keep a device busy, in entries of a worker and a channel.
_ENTRIES = 1 << 17
_LEAST_WORKERS = 8  # rows of an odd number of channels that make whole 16-byte packs
_MOMENTS_ENTRY, _SUMS_ENTRY = 4, 2  # elements, as in cuda/ops/golden_batch_norm.h


def planes_of(x: Any, block: Block) -> Any:
    """x as [*G, *outer, channels, elements]."""
    features, trailing = block
    first = x.ndim - features - trailing
    channels = math.prod(x.shape[first : first + features])
    return x.reshape(*x.shape[:first], channels, math.prod(x.shape[first + features :]))


def _scratch(x: Any, groups: int, entry: int, dtype: Any) -> Value:
    channels = math.prod(x.shape[:groups]) * x.shape[-2]
    least = _LEAST_WORKERS * channels
    # A symbolic number of channels compares with none; more than is needed does no harm.
    entries = max(_ENTRIES, least) if isinstance(channels, int) else _ENTRIES + least
    return Value("scratch", "scratch", dtype=dtype, size=entry * entries)


def _moments_pass(x, where, scale, bias, *, devices, epsilon, scale_factor, block, groups):
    if where is not None:
        return None
    planes, dtype = planes_of(x, block), accumulation_dtype(x.dtype)
    channels = (*x.shape[:groups], planes.shape[-2])
    found = row_call(
        "syntonic_golden_batch_norm_moments",
        [Value("x", "row", planes)]
        + [
            Value(name, "parameter", p.reshape(channels))
            for name, p in (("scale", scale), ("bias", bias))
            if p is not None
        ],
        [Value(name, "parts", dtype=dtype) for name in ("mean", "low", "var", "slope", "shift")]
        + [_scratch(planes, groups, _MOMENTS_ENTRY, dtype)],
        groups=groups,
        devices=devices,
        planes=True,
        epsilon=epsilon,
        scale_factor=scale_factor,
    )
    shape = x.shape[:groups] + x.shape[x.ndim - sum(block) : x.ndim - block[1]]
    if found[0].shape[groups] == 1:
        return *(v.reshape(shape) for v in found), None
    average = functools.partial(jnp.mean, axis=groups, keepdims=True)
    count = wide_count(count_of(x, groups, block))
    mean, low, var, *_ = found
    mean, low, var = (v.reshape(shape) for v in merged(mean, low, var, count, average))
    return mean, low, var, *line(low, var, scale, bias, epsilon, scale_factor), None


def _sums_pass(saved, cotangents, wanted, *, block, groups, devices, **_):
    (x, mean, low, slope, where), (ct,) = saved, cotangents
    accumulation = accumulation_dtype(x.dtype)
    known_type = ct.dtype in (x.dtype, accumulation)
    if where is not None or not known_type or not any(wanted[1:]):
        return None
    planes = planes_of(x, block)
    channels = (*x.shape[:groups], planes.shape[-2])
    found = row_call(
        "syntonic_golden_batch_norm_sums",
        [
            Value("x", "row", planes),
            Value("mean", "parameter", mean.reshape(channels)),
            Value("low", "parameter", low.reshape(channels)),
            Value("ct", "row", ct.reshape(planes.shape)),
        ],
        [Value(name, "partial", dtype=accumulation) for name in ("sum", "product")]
        + [_scratch(planes, groups, _SUMS_ENTRY, accumulation)],
        groups=groups,
        devices=devices,
        planes=True,
    )
    # The elementwise part is XLA's, which fuses it with what follows.
    d_x = None if slope is None else spread(slope, x, groups, block) * ct.astype(accumulation)
    return d_x, *(s.reshape(mean.shape) for s in found)


# ----------------------------------------------------------------------------- declaration

# Both are parts of what is differentiated as a whole (rules.py).
MOMENTS = Operation(
    name="golden_batch_norm_moments",
    function="golden_batch_norm",
    inputs=(
        Input("x"),
        Input("where", optional=True),
        Input("scale", "parameter", optional=True),
        Input("bias", "parameter", optional=True),
    ),
    outputs=tuple(
        Output(name, "parameter", dtype="accumulation")
        for name in ("mean", "low", "var", "slope", "shift", "count")
    ),
    reference=_moments,
    kernels=KernelsByHand(forward_pass=_moments_pass),
    default="cuda",
    on_cpu=_moments_on_cpu,
    divides_by_zero=_without_spread,
)
LINEAR = Derivative(
    name="golden_batch_norm",
    operation="golden_batch_norm",
    saved=lambda **_: (
        Input("x"),
        Input("mean", "parameter"),
        Input("low", "parameter"),
        Input("slope", "parameter", optional=True),
        Input("where", optional=True),
    ),
    inputs=(Input("dx"), Input("shift", "parameter"), Input("tilt", "parameter")),
    outputs=(Output("dy", dtype="dtype"),),
    tangent=_tangent,
    cotangent=_cotangent,
    kernels=KernelsByHand(backward_pass=_sums_pass),
    geometry=ROWS,
)
