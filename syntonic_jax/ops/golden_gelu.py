"""golden_gelu(x) = x · σ(φx)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .. import _activation, _check, _dispatch, _public
from .._batching import batch_elementwise
from .._custom_call import elementwise_call
from .._numerics import widen
from .._primitive import bind, define, forward_mode, transposes

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
    (y,) = bind(golden_gelu_p, x, dtype=dtype, implementation=implementation)
    return y


# ------------------------------------------------------------------------------- reference


def _reference(x, *, dtype):
    return (_activation.apply("golden_gelu", widen(x)).astype(dtype),)


def _tangent_reference(x, dx, *, dtype, inputs, outputs):
    dy = _activation.derivative("golden_gelu", widen(x)) * widen(dx)
    return (dy.astype(dtype),)


def _cotangent_reference(x, ct, *, dtype, inputs, outputs):
    dx = _activation.derivative("golden_gelu", widen(x)) * ct.astype(widen(x).dtype)
    return (dx.astype(x.dtype),)


# ------------------------------------------------------------------------------ primitives


def _kernel(x, *, dtype, devices):
    if x.size == 0:
        return _reference(x, dtype=dtype)
    return elementwise_call("syntonic_golden_gelu", [x], [dtype])


def _cotangent_kernel(x, ct, *, devices, **params):
    if x.size == 0:
        return _cotangent_reference(x, ct, **params)
    return elementwise_call("syntonic_golden_gelu_cotangent", [x, ct], [x.dtype])


golden_gelu_p = define("golden_gelu", _reference, operation="golden_gelu", kernel=_kernel)
golden_gelu_tangent_p = define("golden_gelu_tangent", _tangent_reference, operation="golden_gelu")
golden_gelu_cotangent_p = define(
    "golden_gelu_cotangent",
    _cotangent_reference,
    operation="golden_gelu",
    kernel=_cotangent_kernel,
)

# ----------------------------------------------------------------------------------- rules


def _jvp(primals, tangents, **params):
    (x,), (dx,) = primals, tangents
    y = bind(golden_gelu_p, x, **params)
    return y, bind(golden_gelu_tangent_p, x, dx, inputs=(True,), outputs=(True,), **params)


forward_mode(golden_gelu_p, _jvp)
transposes(
    golden_gelu_tangent_p,
    golden_gelu_cotangent_p,
    _tangent_reference,
    _cotangent_reference,
    reach=((True,),),
)
for _primitive in (golden_gelu_p, golden_gelu_tangent_p, golden_gelu_cotangent_p):
    batch_elementwise(_primitive)
