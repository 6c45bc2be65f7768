"""Everything taken from jax that its public modules do not offer.

Each entry says why it is needed. Checked on jax 0.10.2, 0.11.2 and 0.12.0.1.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax import lax

# The table of checkify's rules and what they are made of; the public module has neither.
from jax._src import checkify as _checkify

# What a trace does before it runs a function, and the names of mapped axes.
from jax._src.core import extend_axis_env_nd, get_axis_env, set_current_trace

# The rule by which jax runs one primitive outside jit. A cached `jax.jit` of `bind` in its place
# recurses without end under `jax_debug_nans`, which re-runs the primitive op by op.
from jax._src.dispatch import apply_primitive
from jax.experimental import jet as _jet
from jax.extend.core import Primitive

__all__ = [
    "Indices",
    "apply_primitive",
    "bare_context",
    "checkify_rule",
    "cuda_compute_capabilities",
    "lowering_platforms",
    "match_varying_axes",
    "no_series",
    "partition_devices",
    "taylor_rule",
    "taylor_series",
    "varying_axes",
]


def varying_axes(x: Any) -> frozenset[str]:
    """The manual mesh axes over which `x` varies (empty outside `jax.shard_map`)."""
    aval = jax.typeof(x)
    # jax 0.10 moved the set of varying axes from `aval.vma` into `aval.manual_axis_type`.
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset(manual.varying if manual is not None else getattr(aval, "vma", ()))


def match_varying_axes(*operands: Any) -> list[Any]:
    """Casts all operands to the union of their varying axes, as jax's own operators do."""
    axes = [varying_axes(x) for x in operands]
    union = frozenset().union(*axes)
    return [
        lax.pcast(x, tuple(sorted(union - own)), to="varying") if union - own else x
        for x, own in zip(operands, axes)
    ]


def partition_devices(ctx: Any) -> int:
    """Over how many devices XLA may partition the computation that is being lowered.

    `ctx` is a lowering rule's context. The classes of its `axis_context` are private: a
    ShardingContext knows its `num_devices`; an SPMDAxisContext (inside shard_map) leaves to XLA
    only the mesh axes that are not manual.
    """
    axes = ctx.module_context.axis_context
    devices = getattr(axes, "num_devices", None)
    if devices is not None:
        return devices
    if (mesh := getattr(axes, "mesh", None)) is not None:
        return math.prod(n for name, n in mesh.shape.items() if name not in axes.manual_axes)
    return 1


def bare_context(ctx: Any) -> Any:
    """`ctx` with plain shapes and dtypes: no explicit shardings, no varying axes."""

    def bare(aval: Any) -> Any:
        return jax.core.ShapedArray(aval.shape, aval.dtype)

    return ctx.replace(
        avals_in=[bare(aval) for aval in ctx.avals_in],
        avals_out=[bare(aval) for aval in ctx.avals_out],
    )


def lowering_platforms(ctx: Any) -> tuple[str, ...]:
    """The platforms that a lowering rule's result is for."""
    return tuple(ctx.platforms or ctx.module_context.platforms)


def cuda_compute_capabilities() -> tuple[str, ...]:
    """Compute capabilities ("9.0") of the CUDA devices of this process; none without a GPU."""
    try:
        devices = jax.devices("cuda")
    except RuntimeError:  # jax knows no such platform here
        return ()
    return tuple(sorted({str(d.compute_capability) for d in devices}))  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------- jet


def taylor_rule(primitive: Primitive, rule: Callable[..., tuple[Any, Any]]) -> None:
    """Sets the rule of `jax.experimental.jet`.

    `rule(primals, series, **params) -> results, series of the results`; the coefficients are those
    of the Taylor polynomial, not the derivatives.
    """
    _jet.jet_rules[primitive] = rule


def taylor_series(f: Callable[..., Any], primals: Sequence[Any], series: Sequence[Any]) -> Any:
    """The series of f's results, without the factorials, which `jet` takes in floating point."""
    return _jet.jet(f, tuple(primals), tuple(series), factorial_scaled=False)[1]


# Of a result that has no series, as integers have none.
no_series = _jet.zero_series


def _rounded_series(primals: Any, series: Any, **params: Any) -> tuple[Any, Any]:
    return lax.reduce_precision(primals[0], **params), series[0]


# jax lacks this one. Rounding is a constant beside the value: the series passes as it is.
_jet.jet_rules.setdefault(lax.reduce_precision_p, _rounded_series)


def _call_custom_jvp(
    trace: Any, primitive: Any, f: Any, jvp: Any, tracers: Any, /, **_: Any
) -> Any:
    with set_current_trace(trace):
        return f.call_wrapped(*tracers)


# jet means to run a `custom_jvp` function as it stands, but while it does there is no trace, and
# whatever the function calls fails: `jax.nn.relu` too. Batch norms are such functions.
if _jet.JetTrace.process_custom_jvp_call.__code__.co_names == ("call_wrapped",):
    _jet.JetTrace.process_custom_jvp_call = _call_custom_jvp  # type: ignore[method-assign]

# ----------------------------------------------------------------------------- checkify


class Indices(NamedTuple):
    """Integers that choose along an axis of an array, for `index_checks`."""

    values: Any
    shape: tuple[Any, ...]  # of the array
    axis: int


class _DivisionByZero(_checkify.DivisionByZeroError):
    """jax's, with the name of the operation."""

    def __init__(self, traceback: Any, operation: str):
        super().__init__(traceback)
        self.prim = operation

    def tree_flatten(self) -> Any:
        return [], (self.traceback_info, self.prim)

    @classmethod
    def tree_unflatten(cls, metadata: Any, payload: Any) -> Any:
        del payload
        return cls(*metadata)

    def __str__(self) -> str:
        return f"{self.prim}: {super().__str__()}"


class _OutOfBounds(_checkify.OOBError):
    """jax's, with the name of the operation."""

    def __str__(self) -> str:
        return f"{self.prim}: {super().__str__()}"


# Since jax 0.11 rules begin with a context, which numbers the errors.
_report: Callable[..., Any] = _checkify.assert_func
_CONTEXTS = len(inspect.signature(_report).parameters) - 3


def checkify_rule(
    primitive: Primitive,
    operation: str,
    divides_by_zero: Callable[..., Any] | None,
    indices: Callable[..., Indices] | None,
) -> None:
    """Makes `checkify` report what a primitive of `operation` does.

    ``nan_checks`` a NaN in a result, ``div_checks`` a true value of
    `divides_by_zero(*operands, **params)`, and ``index_checks`` what is out of bounds among
    `indices(*operands, **params)`; `implementation` is not among the params.
    """

    def rule(*args: Any, implementation: Any, **params: Any) -> tuple[Any, Any]:
        context, (error, enabled, *operands) = args[:_CONTEXTS], args[_CONTEXTS:]
        results = primitive.bind(*operands, implementation=implementation, **params)
        traceback, found = _checkify.get_traceback(), []
        # Causes before consequences: of several errors the first is reported.
        if indices is not None and _checkify.OOBError in enabled:
            outside, payload = _out_of_bounds(given := indices(*operands, **params))
            found.append((outside, _OutOfBounds(traceback, operation, given.shape, payload)))
        if divides_by_zero is not None and _checkify.DivisionByZeroError in enabled:
            zero = jnp.any(divides_by_zero(*operands, **params))
            found.append((zero, _DivisionByZero(traceback, operation)))
        if _checkify.NaNError in enabled:
            for x in results:
                if jnp.issubdtype(x.dtype, jnp.floating):
                    nan = jnp.any(jnp.isnan(x))
                    found.append((nan, _checkify.NaNError(traceback, operation)))
        for failed, exception in found:
            error = _report(*context, error, failed, exception)
        return error, results

    _checkify.error_checks[primitive] = rule


def _out_of_bounds(indices: Indices) -> tuple[Any, Any]:
    """Whether one is, and what the message says of it: an index, the axis and its size.

    By reductions alone, which take every sharding.
    """
    values, (size, axis) = indices.values, (indices.shape[indices.axis], indices.axis)
    least = jnp.min(values, initial=0)
    largest = jnp.max(values, initial=-1)
    value = jnp.where(least < 0, least, largest)
    payload = jnp.stack([value.astype(jnp.int32), jnp.int32(axis), jnp.asarray(size, jnp.int32)])
    return (least < 0) | (largest >= size), payload


# ------------------------------------------------------------------------------ mapped axes


def mapped_axes(sizes: Sequence[tuple[Any, int]]) -> Any:
    """A context in which mapped axes of these names and sizes are known, where they are not.

    A rule with a collective is traced late: jax asks a jit that contains the `vmap` for its
    derivative where the axis has no name any more, but still does what the collective means.
    """
    env = get_axis_env()
    return extend_axis_env_nd([(n, size) for n, size in sizes if not env.axis_exists(n)])
