"""The norm of what the residual branch contributes to a phi residual: a diagnostic for training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .. import _check, _dispatch, _public
from .._partition import Value, row_call
from .._primitive import bind, define, forward_mode, transposes
from .._rows import batch_groups
from ..modes import PhiResidualMode, check_mode
from ._numerics import accumulation_dtype, widen
from .phi_residual import branch_scales

# ---------------------------------------------------------------------------------- public


def residual_component_norm(
    residual: ArrayLike,
    mode: str | PhiResidualMode = "phi",
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Euclidean norm, over the whole array, of the residual's contribution to z.

    ‖φ⁻¹ · residual‖₂ for 'phi' and 'phi_symmetric', ‖residual‖₂ for 'standard'.

    Args:
      residual: array of any shape; float16, bfloat16, float32 or float64.
      mode: a `PhiResidualMode` or its name.
      implementation: None, 'cuda' or 'xla' (docs/implementation.md).

    Returns:
      A scalar, summed and returned in float32 (float64 for float64). The derivative at a residual
      of zeros is taken as 0.

    Raises:
      TypeError: `residual` is not real floating point.
      ValueError: `mode` or `implementation` is unknown.

    >>> import jax.numpy as jnp
    >>> residual_component_norm(jnp.array([3.0, 4.0]), "standard")
    Array(5., dtype=float32)
    """
    # jit hashes what is static and takes 1 for True: what is unusual is checked before it.
    if type(mode) is not str:
        mode = check_mode("residual_component_norm", mode)
    return _residual_component_norm(residual, mode, implementation)


@_public.jit("mode", "implementation", function="residual_component_norm")
def _residual_component_norm(residual, mode, implementation):
    name = "residual_component_norm"
    mode = check_mode(name, mode)
    _dispatch.check_implementation(name, implementation)
    _check.floating(name, residual=residual)
    (total,) = bind(
        sum_of_squares_p, jnp.asarray(residual), groups=0, implementation=implementation
    )
    # The square root has no derivative at 0; NaN stays NaN.
    zero = total == 0
    norm = jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, total)))
    return norm * branch_scales(mode)[1]


# ------------------------------------------------------------------------------- reference


def _reference(x, *, groups):
    return (jnp.square(widen(x)).sum(tuple(range(groups, x.ndim))),)


def _tangent_reference(x, dx, *, groups, inputs, outputs):
    return (2 * (widen(x) * widen(dx)).sum(tuple(range(groups, x.ndim))),)


def _cotangent_reference(x, ct, *, groups, inputs, outputs):
    slope = jnp.expand_dims(2 * ct, tuple(range(groups, x.ndim)))
    return ((slope * widen(x)).astype(x.dtype),)


# ------------------------------------------------------------------------------ primitives

_SCRATCH_ELEMENTS = 4096  # workers that may leave a sum: a few for each multiprocessor


def _kernel(x, *, groups, devices):
    if x.size == 0:
        return _reference(x, groups=groups)
    accumulation = accumulation_dtype(x.dtype)
    return row_call(
        "syntonic_sum_of_squares",
        [Value("vector", x)],
        [
            Value("total", dtype=accumulation),
            Value("scratch", dtype=accumulation, size=_SCRATCH_ELEMENTS),
        ],
        groups=groups,
        devices=devices,
    )


def _cotangent_kernel(x, ct, *, groups, devices, **masks):
    if x.size == 0:
        return _cotangent_reference(x, ct, groups=groups, **masks)
    # Rows of one element: a value whose dimensions are all batch dimensions would be gathered.
    (dx,) = row_call(
        "syntonic_sum_of_squares_cotangent",
        [Value("row", x[..., None]), Value("scalar", ct)],
        [Value("row", dtype=x.dtype)],
        groups=groups,
        devices=devices,
    )
    return (dx[..., 0],)


# Over all but the first `groups` axes, which vmap adds.
sum_of_squares_p = define(
    "sum_of_squares", _reference, operation="residual_component_norm", kernel=_kernel
)
sum_of_squares_tangent_p = define(
    "sum_of_squares_tangent", _tangent_reference, operation="residual_component_norm"
)
sum_of_squares_cotangent_p = define(
    "sum_of_squares_cotangent",
    _cotangent_reference,
    operation="residual_component_norm",
    kernel=_cotangent_kernel,
)

# ----------------------------------------------------------------------------------- rules


def _jvp(primals, tangents, **params):
    (x,), (dx,) = primals, tangents
    total = bind(sum_of_squares_p, x, **params)
    masks = {"inputs": (True,), "outputs": (True,)}
    return total, bind(sum_of_squares_tangent_p, x, dx, **masks, **params)


forward_mode(sum_of_squares_p, _jvp)
transposes(
    sum_of_squares_tangent_p,
    sum_of_squares_cotangent_p,
    _tangent_reference,
    _cotangent_reference,
    reach=((True,),),
)
for _primitive in (sum_of_squares_p, sum_of_squares_tangent_p, sum_of_squares_cotangent_p):
    batch_groups(_primitive)
