"""Norms of rows: what the layer norm and the RMS norm share, and how their operations are declared.

Rows are [*G, *R, width] and parameters [*G, width], G being the group dimensions
(_batching.py). Parameters and statistics are in the accumulation type, and so are all results.
`scale` and `bias` are parameters, or None.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _check, _dispatch
from .._kernel_calls import Kernels
from .._numerics import accumulation_dtype, round_to, widen
from .._operation import Input, Operation, Output
from ..modes import check_mode
from ._merged_axes import merge_of, spec_of_formula
from ._norm_arithmetic import is_ordinary, scratch_size
from .phi_residual import branch_scales, golden_sum, one_gradient


class Norm(NamedTuple):
    """A norm of rows, in jnp.

    Attributes:
      statistics: numbers that are kept of a row. One is the slope, 4 / √(what is divided by), at
        the place `slope`.
      bias: whether it has one.
      apply: `apply(z, scale, bias, epsilon, scale_factor, groups, divided, ordinary)` -> y and the
        statistics. With `divided` rows are first divided by about their largest number, so that no
        square leaves the range; a power of two does so without rounding. `ordinary` promises that
        none leaves it: the form for a CPU.
      jvp: `jvp(z, statistics, scale, dz, d_scale, d_bias, scale_factor, groups)` -> the tangents of
        y and the statistics; those of the parameters may be None.
      vjp: `vjp(z, statistics, scale, ct_y, ct_statistics, scale_factor, groups, ordinary)` -> the
        cotangents of z, scale and bias; those of the results may be None.
      is_ordinary: of the statistics, whether `vjp` may be told so: that no number that it makes of
        the rows overflows.
    """

    statistics: int
    slope: int
    bias: bool
    apply: Callable[..., tuple[Any, Any]]
    jvp: Callable[..., tuple[Any, Any]]
    vjp: Callable[..., tuple[Any, Any, Any]]
    is_ordinary: Callable[[Any], Any]


# ----------------------------------------------------------------------------- declaration


def norm_of_rows(name: str, norm: Norm, default: _dispatch.Implementation = "cuda") -> Operation:
    """The operation of rows x."""

    def reference(x, *parameters, epsilon, scale_factor, dtype, groups, one_cpu=False):
        return _normalised(
            norm, x, parameters, epsilon, scale_factor, groups, dtype, of=x.dtype, one_cpu=one_cpu
        )

    def tangent(saved, tangents, *, scale_factor, dtype, data_dtype, groups):
        del data_dtype
        x, statistics, scale = saved
        dx, *d_parameters = tangents
        dx = jnp.zeros_like(widen(x)) if dx is None else widen(dx)
        dy, d_statistics = norm.jvp(
            x, statistics, scale, dx, *_both(d_parameters), scale_factor, groups
        )
        return dy.astype(dtype), d_statistics

    def cotangent(saved, cotangents, *, scale_factor, dtype, data_dtype, groups, ordinary=False):
        del dtype
        x, statistics, scale = saved
        dx, *d_parameters = norm.vjp(
            x, statistics, scale, *cotangents, scale_factor, groups, ordinary
        )
        return dx.astype(data_dtype), *d_parameters[: 1 + norm.bias]

    def attributes(*, epsilon, scale_factor, **_):
        return {"epsilon": epsilon, "scale_factor": scale_factor}

    def cotangent_attributes(*, scale_factor, **_):
        return {"scale_factor": scale_factor}

    return _declared(
        name,
        norm,
        default=default,
        inputs=(Input("x"),),
        outputs=(Output("y", dtype="dtype"),),
        saved="x",
        reference=reference,
        tangent=tangent,
        cotangent=cotangent,
        kernels=Kernels(
            attributes=attributes, cotangent_attributes=cotangent_attributes, scratch=scratch_size
        ),
    )


def norm_of_sum(name: str, norm: Norm, default: _dispatch.Implementation = "cuda") -> Operation:
    """The operation of the residual sum z of two branches, rounded to their type."""

    def reference(
        identity, residual, *parameters, mode, epsilon, scale_factor, dtype, groups, one_cpu=False
    ):
        z = round_to(golden_sum(identity, residual, mode), identity.dtype)
        if one_cpu:  # once for all that reads it; elsewhere jet would round its series with it
            z = z.astype(identity.dtype)
        y, statistics = _normalised(
            *(norm, z, parameters, epsilon, scale_factor, groups, dtype),
            of=identity.dtype,
            one_cpu=one_cpu,
        )
        return y, z.astype(identity.dtype), statistics

    def tangent(saved, tangents, *, mode, scale_factor, dtype, data_dtype, groups):
        z, statistics, scale = saved
        branches, d_parameters = tangents[:2], tangents[2:]
        dz = jnp.zeros_like(widen(z))
        for d, coefficient in zip(branches, branch_scales(mode), strict=True):
            if d is not None:
                dz = dz + coefficient * widen(d)
        dy, d_statistics = norm.jvp(
            z, statistics, scale, dz, *_both(d_parameters), scale_factor, groups
        )
        return dy.astype(dtype), dz.astype(data_dtype), d_statistics

    def cotangent(
        saved, cotangents, *, mode, scale_factor, dtype, data_dtype, groups, ordinary=False
    ):
        del dtype
        z, statistics, scale = saved
        ct_y, ct_z, ct_statistics = cotangents
        dz, *d_parameters = norm.vjp(
            z, statistics, scale, ct_y, ct_statistics, scale_factor, groups, ordinary
        )
        if ct_z is not None:
            dz = dz + widen(ct_z)
        branches = [(coefficient * dz).astype(data_dtype) for coefficient in branch_scales(mode)]
        return *branches, *d_parameters[: 1 + norm.bias]

    def attributes(*, mode, epsilon, scale_factor, **_):
        return {
            "sum_scale": mode.sum_scale,
            "residual_scale": mode.residual_scale,
            "epsilon": epsilon,
            "scale_factor": scale_factor,
        }

    def cotangent_attributes(*, mode, scale_factor, **_):
        identity_scale, residual_scale = branch_scales(mode)
        return {
            "identity_scale": identity_scale,
            "residual_scale": residual_scale,
            "scale_factor": scale_factor,
        }

    return _declared(
        name,
        norm,
        default=default,
        inputs=(Input("identity"), Input("residual")),
        outputs=(Output("y", dtype="dtype"), Output("z")),
        saved="z",
        reference=reference,
        tangent=tangent,
        cotangent=cotangent,
        kernels=Kernels(
            attributes=attributes,
            cotangent_attributes=cotangent_attributes,
            twins=one_gradient,
            scratch=scratch_size,
        ),
    )


def _declared(name, norm: Norm, *, inputs, outputs, saved, **forms) -> Operation:
    parameters = ("scale", "bias") if norm.bias else ("scale",)
    statistics = Output(
        "statistics", "statistics", dtype="accumulation", size=norm.statistics, inner=True
    )
    return Operation(
        name=name,
        inputs=(
            *inputs,
            *(Input(p, "parameter", reaches=("y",), optional=True) for p in parameters),
        ),
        outputs=(*outputs, statistics),
        saved=(saved, "statistics", "scale"),
        forward_only=("epsilon",),
        on_cpu=_on_cpu,
        cotangent_on_cpu=functools.partial(_cotangent_on_cpu, norm.is_ordinary),
        # Where a row has neither variance nor ε, and is divided by zero, for `checkify`.
        divides_by_zero=lambda results, **_: jnp.isinf(results[-1][..., norm.slope]),
        **forms,
    )


def _both(d_parameters) -> tuple[Any, Any]:
    """The tangents of scale and bias."""
    return (*d_parameters, None) if len(d_parameters) == 1 else tuple(d_parameters)


def _normalised(
    norm: Norm, z, parameters, epsilon, scale_factor, groups, dtype, *, of, one_cpu
) -> tuple[Any, Any]:
    """y, of type `dtype`, and the statistics of rows z, numbers of the type `of`.

    On one CPU device rows are searched for their largest numbers only if they must be. What it
    costs to look is a pass over the rows; a second form of the norm is compiled for it. Over
    several devices all would have to ask each other.
    """
    scale, bias = _both(parameters)

    def rows(z, scale, bias, ordinary):
        divided = not ordinary and of != jnp.float16  # no number of which is too large
        y, statistics = norm.apply(z, scale, bias, epsilon, scale_factor, groups, divided, ordinary)
        return y.astype(dtype), statistics

    if not one_cpu:
        return rows(z, scale, bias, False)
    return lax.cond(
        is_ordinary(z, epsilon),
        functools.partial(rows, ordinary=True),
        functools.partial(rows, ordinary=False),
        *(z, scale, bias),
    )


def _on_cpu(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The form for a CPU of a reference that takes `one_cpu`."""

    def form(*operands, devices, **params):
        return reference(*operands, one_cpu=devices == 1, **params)

    return form


def _cotangent_on_cpu(ordinary_by, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The form for a CPU of a cotangent that takes `ordinary`.

    The second of what is saved are the statistics. A sum over rows takes as long there as its
    arithmetic, of which ordinary rows need less.
    """

    def form(saved, cotangents, devices, **params):
        if devices > 1:
            return reference(saved, cotangents, **params)
        return lax.cond(
            ordinary_by(saved[1]),
            functools.partial(reference, ordinary=True, **params),
            functools.partial(reference, **params),
            *(saved, cotangents),
        )

    return form


# ----------------------------------------------------------------------- public functions
#
# Their arguments are those of the public functions, `parameters` by name; what is not there is
# None.


def over_axes(
    operation: Operation,
    x: Any,
    parameters: Mapping[str, Any],
    axis: Any,
    *,
    target_variance: Any,
    epsilon: Any,
    dtype: Any,
    implementation: Any,
    scale_offset: float = 0.0,
) -> jax.Array:
    """A norm over any axes of x, which become rows."""
    name = operation.name
    epsilon, scale_factor = _numbers(name, epsilon, target_variance, implementation)
    _check.floating(name, x=x)
    given = _given(name, parameters)
    x = jnp.asarray(x)
    axes = _check.axes(name, axis, x.ndim)
    shape = tuple(x.shape[a] for a in axes)
    if not axes or 0 in shape:
        raise ValueError(
            f"{name}: axis must name at least one axis, of at least one element, to normalise "
            f"over, got axes {axes} of shape {x.shape}"
        )
    _check.parameter(name, shape, **given)
    arrays = {k: jnp.asarray(p) for k, p in given.items()}
    merge = merge_of(x, axes)
    merged = {k: merge.parameter(p) for k, p in arrays.items()}
    (y,) = operation(
        merge.array(x),
        *_in_accumulation(parameters, merged, x.dtype, scale_offset),
        epsilon=epsilon,
        scale_factor=scale_factor,
        dtype=_check.result_dtype(name, dtype, x.dtype),
        implementation=implementation,
    )
    spec = spec_of_formula(merge, x, list(arrays.values())) if len(axes) > 1 else None
    return merge.restore(y, spec)


def over_sum(
    operation: Operation,
    identity: Any,
    residual: Any,
    parameters: Mapping[str, Any],
    *,
    mode: Any,
    target_variance: Any,
    epsilon: Any,
    return_sum: bool,
    dtype: Any,
    implementation: Any,
    scale_offset: float = 0.0,
) -> Any:
    """A norm over the last axis of the residual sum of two branches."""
    name = operation.name
    mode = check_mode(name, mode)
    epsilon, scale_factor = _numbers(name, epsilon, target_variance, implementation)
    _check.floating(name, identity=identity, residual=residual)
    _check.same_shape(name, identity=identity, residual=residual)
    given = _given(name, parameters)
    data_dtype = jnp.result_type(identity, residual)
    identity = jnp.asarray(identity, data_dtype)
    if identity.ndim == 0 or identity.shape[-1] == 0:
        raise ValueError(
            f"{name}: identity must have a last axis of at least one element to normalise over, "
            f"got shape {identity.shape}"
        )
    _check.parameter(name, identity.shape[-1:], **given)
    arrays = {k: jnp.asarray(p) for k, p in given.items()}
    y, *z = operation(
        identity,
        jnp.asarray(residual, data_dtype),
        *_in_accumulation(parameters, arrays, data_dtype, scale_offset),
        outputs=("z",) if return_sum else (),
        mode=mode,
        epsilon=epsilon,
        scale_factor=scale_factor,
        dtype=_check.result_dtype(name, dtype, data_dtype),
        implementation=implementation,
    )
    return (y, *z) if return_sum else y


def _numbers(name: str, epsilon, target_variance, implementation) -> tuple[float, float]:
    epsilon = _check.epsilon(name, epsilon)
    scale_factor = _check.scale_factor(name, target_variance)
    _dispatch.check_implementation(name, implementation)
    return epsilon, scale_factor


def _given(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    given = {k: v for k, v in parameters.items() if v is not None}
    _check.floating(name, **given)
    return given


def _in_accumulation(names, arrays: Mapping[str, Any], dtype: Any, scale_offset: float):
    """The parameters `names` as the operation takes them, None for those that are not there."""
    accumulation = accumulation_dtype(dtype)
    wide = {k: p.astype(accumulation) for k, p in arrays.items()}
    if scale_offset and "scale" in wide:
        wide["scale"] = wide["scale"] + scale_offset
    return [wide.get(name) for name in names]
