"""The norm of what the residual branch contributes to a phi residual: a diagnostic for training."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .. import _check, _dispatch, _public
from .._custom_call import Value, row_call
from .._geometry import GROUPS
from .._kernel_calls import KernelsByHand
from .._numerics import accumulation_dtype, widen
from .._operation import Input, Operation, Output
from ..modes import PhiResidualMode, check_mode
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
      A scalar, summed and returned in float32 (float64 for float64), also where its square is out
      of the range of that type. The derivative at a residual of zeros is taken as 0.

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
    (norm,) = RESIDUAL_COMPONENT_NORM(
        jnp.asarray(residual), coefficient=branch_scales(mode)[1], implementation=implementation
    )
    return norm


# ------------------------------------------------------------------------------- reference
#
# A sum of squares may overflow or vanish where the norm does not. So there are three of them, after
# J. L. Blue (1978): of the numbers as they are, of large ones by a small power of two, and of small
# ones by a large one. Each is a sum, over rows, blocks and devices alike; none needs a maximum.


class _Range(NamedTuple):
    """Powers of two: the factor of small numbers, and between what sums of squares are exact."""

    factor: float
    least: float
    most: float


# The square of factor times the least subnormal number is a normal one, that of the greatest number
# by it leaves room for 2^40 terms. Below `least` squares that vanished might show; a sum of factor²
# times it is finite. (cuda/ops/residual_component_norm.cu has the first.)
_RANGES = {
    "float32": _Range(2.0**88, 2.0**-56, 2.0**120),
    "float64": _Range(2.0**600, 2.0**-180, 2.0**1000),
}


def _sum_of_squares(x, groups, factor=None):
    x = x if factor is None else x * factor
    return jnp.square(x).sum(tuple(range(groups, x.ndim)))


def _in_range(total):
    """Whether nothing of a sum of squares can be lost; not so for NaN."""
    _, least, most = _RANGES[total.dtype.name]
    return (total >= least) & (total <= most)


def _root(total):
    """The square root, with the derivative 0 at 0."""
    some = total != 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, total, 1)), 0)


def _reference(x, *, coefficient, groups):
    wide = widen(x)
    total = _sum_of_squares(wide, groups)
    norm = coefficient * _root(total)
    if x.dtype == jnp.float16:  # whose squares float32 holds
        return (norm,)
    factor, least, most = _RANGES[wide.dtype.name]
    # The coefficient comes first: it may bring the norm back into the range.
    large = coefficient * _root(_sum_of_squares(wide, groups, 1 / factor)) * factor
    small = coefficient * _root(_sum_of_squares(wide, groups, factor)) * (1 / factor)
    return (jnp.where(total > most, large, jnp.where(total < least, small, norm)),)


def _on_cpu(reference):
    """The same for where three sums take three times as long as one, and a branch is nothing."""

    def form(x, *, coefficient, groups, devices):
        if devices > 1:  # all would have to ask each other
            return reference(x, coefficient=coefficient, groups=groups)
        total = _sum_of_squares(widen(x), groups)
        usual = jnp.array(True) if x.dtype == jnp.float16 else jnp.all(_in_range(total))
        return jax.lax.cond(
            usual,
            lambda x, total: (coefficient * jnp.sqrt(total),),
            lambda x, total: reference(x, coefficient=coefficient, groups=groups),
            x,
            total,
        )

    return form


def _norm_of_sums(sums, coefficient):
    """The norm from the sums of small, middle and large numbers, [*G, 3], each in its own scale."""
    factor = _RANGES[sums.dtype.name].factor
    # One constant for each: XLA multiplies constants with each other, and a square of these is out
    # of range.
    small, middle, large = (
        coefficient * jnp.sqrt(sums[..., kind]) * by
        for kind, by in enumerate((1 / factor, 1, factor))
    )
    return _hypotenuse(_hypotenuse(small, middle), large)


def _hypotenuse(a, b):
    """√(a² + b²) for a, b ≥ 0, whose squares may be out of range."""
    most, least = jnp.maximum(a, b), jnp.minimum(a, b)
    ratio = least / jnp.where(most == 0, 1, most)
    return jnp.where(most == jnp.inf, most, most * jnp.sqrt(1 + jnp.square(ratio)))


def _slope(norm, coefficient):
    """Two factors of coefficient² / norm, the gradient being theirs and x's: x · first is near 1.

    Both are 0 at 0, where the norm has no derivative. Only the second counts for derivatives of
    higher order, that of the product: alone, 1 / norm has squares that are out of range.
    """
    tiny = jnp.finfo(norm.dtype).smallest_normal
    zero, infinite = norm == 0, norm == jnp.inf
    # What keeps the inverse of the smallest and the largest norms in range.
    shift = jnp.where(norm < tiny * 256, 2.0**40, jnp.where(norm > 1 / (256 * tiny), 2.0**-10, 1))
    shift = jax.lax.stop_gradient(shift.astype(norm.dtype))
    first = jax.lax.stop_gradient(1 / jnp.where(zero, 1, norm * shift))
    one = jnp.where(zero | infinite, 1, norm * first * shift)
    second = coefficient**2 * shift / one
    return jnp.where(zero, 0, first), jnp.where(zero, 0, second)


def _tangent(saved, tangents, *, coefficient, groups, data_dtype):
    del data_dtype
    (x, norm), (dx,) = saved, tangents
    first, second = _slope(norm, coefficient)
    along = (widen(x) * _spread(first, x)) * (widen(dx) * _spread(second, x))
    return (along.sum(tuple(range(groups, x.ndim))),)


def _cotangent(saved, cotangents, *, coefficient, groups, data_dtype):
    del groups
    (x, norm), (ct,) = saved, cotangents
    first, second = _slope(norm, coefficient)
    return ((widen(x) * _spread(first, x) * _spread(second * ct, x)).astype(data_dtype),)


def _spread(number, x):
    return number.reshape(number.shape + (1,) * (x.ndim - number.ndim))


# -------------------------------------------------------------------------------- kernels

_SCRATCH_ELEMENTS = 3 * 4096  # workers that may leave sums: a few for each multiprocessor


def _forward_pass(x, *, coefficient, groups, devices):
    accumulation = accumulation_dtype(x.dtype)
    (sums,) = row_call(
        "syntonic_sum_of_squares",
        [Value("x", "vector", x)],
        [
            Value("sums", "totals", dtype=accumulation, size=3),
            Value("scratch", "scratch", dtype=accumulation, size=_SCRATCH_ELEMENTS),
        ],
        groups=groups,
        devices=devices,
    )
    return (_norm_of_sums(sums, coefficient),)


def _backward_pass(saved, cotangents, wanted, *, coefficient, groups, data_dtype, devices):
    del wanted
    (x, norm), (ct,) = saved, cotangents
    first, second = _slope(norm, coefficient)
    # Rows of one element: a value whose dimensions are all batch dimensions would be gathered.
    (dx,) = row_call(
        "syntonic_sum_of_squares_cotangent",
        [
            Value("x", "row", x[..., None]),
            Value("first", "scalar", first),
            Value("second", "scalar", second * ct),
        ],
        [Value("dx", "row", dtype=data_dtype)],
        groups=groups,
        devices=devices,
    )
    return (dx[..., 0],)


# ----------------------------------------------------------------------------- declaration

# Over all but the first `groups` axes, which vmap adds.
RESIDUAL_COMPONENT_NORM = Operation(
    name="residual_component_norm",
    inputs=(Input("x"),),
    outputs=(Output("norm", "totals", dtype="accumulation"),),
    saved=("x", "norm"),
    reference=_reference,
    tangent=_tangent,
    cotangent=_cotangent,
    kernels=KernelsByHand(forward_pass=_forward_pass, backward_pass=_backward_pass),
    default="xla",
    on_cpu=_on_cpu,
    geometry=GROUPS,
)
