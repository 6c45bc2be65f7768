"""golden_gelu(x) = x · σ(φx)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .. import _activation, _check, _dispatch, _public
from .._geometry import ELEMENTWISE
from .._kernel_calls import Kernels
from .._numerics import widen
from .._operation import Input, Operation, Output

# ---------------------------------------------------------------------------------- public


def golden_gelu(
    x: ArrayLike, *, dtype: DTypeLike | None = None, implementation: str | None = None
) -> jax.Array:
    """Golden GELU: x · σ(φx), the sigmoid form of GELU with the golden ratio for 1.702.

    Args:
      x: array of any shape; float16, bfloat16, float32 or float64.
      dtype: type of the result; None: that of `x`.
      implementation: None, 'cuda' or 'xla' (docs/implementation.md).

    Returns:
      An array of the shape of `x`, computed in float32 (float64 for float64) and rounded once.

    Raises:
      TypeError: `x` or `dtype` is not real floating point.
      ValueError: `implementation` is unknown.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> np.asarray(golden_gelu(jnp.array([-1.0, 0.0, 1.0]))).round(4)
    array([-0.1655,  0.    ,  0.8345], dtype=float32)
    """
    return _golden_gelu(x, dtype, implementation)


@_public.jit("dtype", "implementation", function="golden_gelu")
def _golden_gelu(x, dtype, implementation):
    _dispatch.check_implementation("golden_gelu", implementation)
    _check.floating("golden_gelu", x=x)
    x = jnp.asarray(x)
    dtype = _check.result_dtype("golden_gelu", dtype, x.dtype)
    (y,) = GOLDEN_GELU(x, dtype=dtype, implementation=implementation)
    return y


# ------------------------------------------------------------------------------- reference


def _reference(x, *, dtype):
    return (_activation.apply("golden_gelu", widen(x)).astype(dtype),)


def _tangent(saved, tangents, *, dtype, data_dtype):
    del data_dtype
    (x,), (dx,) = saved, tangents
    dy = _activation.derivative("golden_gelu", widen(x)) * widen(dx)
    return (dy.astype(dtype),)


def _cotangent(saved, cotangents, *, dtype, data_dtype):
    del dtype
    (x,), (ct,) = saved, cotangents
    dx = _activation.derivative("golden_gelu", widen(x)) * ct.astype(widen(x).dtype)
    return (dx.astype(data_dtype),)


# ----------------------------------------------------------------------------- declaration

GOLDEN_GELU = Operation(
    name="golden_gelu",
    inputs=(Input("x"),),
    outputs=(Output("y", dtype="dtype"),),
    saved=("x",),
    default="xla",
    reference=_reference,
    tangent=_tangent,
    cotangent=_cotangent,
    kernels=Kernels(),
    geometry=ELEMENTWISE,
)
