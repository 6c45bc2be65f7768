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

from ..._batching import batch_rows, masked
from ..._custom_call import Value, row_call
from ..._numerics import accumulation_dtype, widen
from ..._primitive import bind, define, transposes
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
    *results, count = bind(
        golden_batch_norm_moments_p,
        x,
        *(operand for operand in (where, scale, bias) if operand is not None),
        has_where=where is not None,
        has_scale=scale is not None,
        has_bias=bias is not None,
        epsilon=epsilon,
        scale_factor=scale_factor,
        block=block,
        groups=0,
        implementation=implementation,
    ) + ([count_of(x, 0, block)] if where is None else [])
    return wide_count(count), *results


def sums(x, mean, low, a, where, block: Block, implementation) -> list[Any]:
    """Σ a and Σ (x − mean − low) · a along every channel, of the unmasked elements."""
    return bind(
        golden_batch_norm_cotangent_p,
        *(x, mean, low),
        *(() if where is None else (where,)),
        a,
        has_slope=False,
        mask=None if where is None else "where",
        inputs=(False, True, True),
        outputs=(True,),
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
    given = [t for t in (dx, shift, tilt) if t is not None]
    (dy,) = bind(
        golden_batch_norm_tangent_p,
        *(x, mean, low),
        *(() if dx is None else (slope,)),
        *(() if where is None else (where,)),
        *given,
        has_slope=dx is not None,
        mask=None if where is None else "finite",
        inputs=(dx is not None, shift is not None, tilt is not None),
        outputs=(True,),
        dtype=dtype,
        block=block,
        groups=0,
        implementation=implementation,
    )
    return dy


# ------------------------------------------------------------------------------- reference


def _centred(x, mean, low, groups: int, block: Block) -> Any:
    return (widen(x) - spread(mean, x, groups, block)) - spread(low, x, groups, block)


def _moments_operands(operands, has_where, has_scale, has_bias):
    """The mask, if there is one, scale and bias, or None."""
    given = iter(operands)
    mask = [next(given)] if has_where else []
    return mask, next(given) if has_scale else None, next(given) if has_bias else None


def _moments_reference(
    x, *operands, has_where, has_scale, has_bias, epsilon, scale_factor, block, groups, alone=False
):
    where, scale, bias = _moments_operands(operands, has_where, has_scale, has_bias)
    mean, low, var, *count = statistics(x, where, block, groups, alone)
    results = mean, low, var, *line(low, var, scale, bias, epsilon, scale_factor), *count
    # On a CPU they would be made anew for every element of y, within the loop over them.
    return lax.optimization_barrier(results) if alone else results


def _moments_on_cpu(x, *operands, devices, **params):
    return _moments_reference(x, *operands, **params, alone=devices == 1)


def _split(x, operands, has_slope, mask, count):
    """The slope, what is not masked, and the `count` linear operands that follow x, mean and low.

    `mask` says of what the mask, if there is one, takes the place of zeros: of all that it leaves
    out ("where"), or of what is not finite there ("finite").
    """
    slope, rest = operands[:has_slope], operands[has_slope:]
    kept, linear = rest[: mask is not None], rest[mask is not None :]
    assert len(linear) == count
    return slope, [k | jnp.isfinite(x) for k in kept] if mask == "finite" else kept, linear


def _unmasked(values, kept):
    return jnp.where(kept[0], values, 0) if kept else values


def _tangent_reference(
    x, mean, low, *operands, has_slope, mask, inputs, outputs, dtype, block, groups
):
    del outputs
    slope, kept, given = _split(x, operands, has_slope, mask, sum(inputs))
    values = iter(given)
    out = jnp.zeros_like(widen(x))
    if inputs[0]:
        out = out + spread(slope[0], x, groups, block) * next(values)
    if inputs[1]:
        out = out + spread(next(values), x, groups, block)
    if inputs[2]:
        centred = _unmasked(_centred(x, mean, low, groups, block), kept)
        out = out + spread(next(values), x, groups, block) * centred
    return (_unmasked(out, kept).astype(dtype),)


def _cotangent_reference(
    x, mean, low, *operands, has_slope, mask, inputs, outputs, dtype, block, groups
):
    del outputs, dtype
    slope, kept, (ct,) = _split(x, operands, has_slope, mask, 1)
    ct = _unmasked(ct.astype(accumulation_dtype(x.dtype)), kept)
    axes = reduced(x, groups, block)
    results = []
    if inputs[0]:
        results.append(spread(slope[0], x, groups, block) * ct)
    if inputs[1]:
        results.append(ct.sum(axes))
    if inputs[2]:
        centred = _unmasked(_centred(x, mean, low, groups, block), kept)
        results.append((centred * ct).sum(axes))
    return tuple(results)


# ------------------------------------------------------------------------------ primitives

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


def _moments_kernel(x, *operands, devices, epsilon, scale_factor, block, groups, **given):
    if given["has_where"] or x.size == 0:
        return _moments_reference(
            *(x, *operands),
            epsilon=epsilon,
            scale_factor=scale_factor,
            block=block,
            groups=groups,
            **given,
        )
    _, scale, bias = _moments_operands(operands, **given)
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
        return [v.reshape(shape) for v in found]
    average = functools.partial(jnp.mean, axis=groups, keepdims=True)
    count = wide_count(count_of(x, groups, block))
    mean, low, var, *_ = found
    mean, low, var = (v.reshape(shape) for v in merged(mean, low, var, count, average))
    return [mean, low, var, *line(low, var, scale, bias, epsilon, scale_factor)]


def _cotangent_kernel(x, mean, low, *operands, devices, block, groups, **params):
    inputs, ct = params["inputs"], operands[-1]
    dtype = accumulation_dtype(x.dtype)
    sum_only = params | {"inputs": (inputs[0], False, False)}
    if params["mask"] or x.size == 0 or ct.dtype not in (x.dtype, dtype) or not any(inputs[1:]):
        return _cotangent_reference(x, mean, low, *operands, block=block, groups=groups, **params)
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
        [Value(name, "partial", dtype=dtype) for name in ("sum", "product")]
        + [_scratch(planes, groups, _SUMS_ENTRY, dtype)],
        groups=groups,
        devices=devices,
        planes=True,
    )
    # The elementwise part is XLA's, which fuses it with what follows.
    elementwise = _cotangent_reference(
        x, mean, low, *operands, block=block, groups=groups, **sum_only
    )
    return [*elementwise, *(s.reshape(mean.shape) for s, i in zip(found, inputs[1:]) if i)]


def _without_spread(*operands, epsilon, **params):
    """Where a channel has neither variance nor ε, and is divided by zero, for `checkify`."""
    var = _moments_reference(*operands, epsilon=epsilon, **params)[2]
    return jnp.isinf(lax.rsqrt(var + epsilon))


golden_batch_norm_moments_p = define(
    "golden_batch_norm_moments",
    _moments_reference,
    operation="golden_batch_norm",
    kernel=_moments_kernel,
    on_cpu=_moments_on_cpu,
    divides_by_zero=_without_spread,
)
golden_batch_norm_tangent_p = define(
    "golden_batch_norm_tangent", _tangent_reference, operation="golden_batch_norm"
)
golden_batch_norm_cotangent_p = define(
    "golden_batch_norm_cotangent",
    _cotangent_reference,
    operation="golden_batch_norm",
    kernel=_cotangent_kernel,
)

# ----------------------------------------------------------------------------------- rules

_INPUT_KINDS = ("row", "parameter", "parameter")


def _moments_kinds(*, has_where, has_scale, has_bias, **_):
    operands = ["row"] * (1 + has_where) + ["parameter"] * (has_scale + has_bias)
    return operands, ["parameter"] * (5 + has_where)


def _residual_kinds(has_slope, mask):
    rows = ["row"] * (mask is not None)
    return ["row", "parameter", "parameter"] + ["parameter"] * has_slope + rows


def _tangent_kinds(*, has_slope, mask, inputs, **_):
    return _residual_kinds(has_slope, mask) + masked(_INPUT_KINDS, inputs), ["row"]


def _cotangent_kinds(*, has_slope, mask, inputs, **_):
    return [*_residual_kinds(has_slope, mask), "row"], masked(_INPUT_KINDS, inputs)


transposes(
    golden_batch_norm_tangent_p,
    golden_batch_norm_cotangent_p,
    _tangent_reference,
    _cotangent_reference,
    reach=((True,),) * 3,
)
batch_rows(golden_batch_norm_moments_p, _moments_kinds)
batch_rows(golden_batch_norm_tangent_p, _tangent_kinds)
batch_rows(golden_batch_norm_cotangent_p, _cotangent_kinds)
