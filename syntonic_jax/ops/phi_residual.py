"""y = activation(z), z being one of three golden sums of an identity and a residual branch.

Written as z = s · (identity + c · residual), with (s, c) = (1, φ⁻¹) for 'phi', (φ⁻¹, 1) for
'phi_symmetric' and (1, 1) for 'standard'.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .. import _activation, _check, _dispatch, _public
from .._geometry import ELEMENTWISE
from .._kernel_calls import Kernels
from .._numerics import accumulation_dtype, widen
from .._operation import Input, Operation, Output
from ..lattice.resonant import ResonantTensor, exact_phi_residual
from ..modes import PhiResidualMode, check_mode

# ---------------------------------------------------------------------------------- public


@overload
def phi_residual(
    identity: ArrayLike,
    residual: ArrayLike,
    mode: str | PhiResidualMode = "phi",
    *,
    activation: str | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array: ...


@overload
def phi_residual(
    identity: ResonantTensor,
    residual: ResonantTensor,
    mode: str | PhiResidualMode = "phi",
    *,
    activation: str | None = None,
    dtype: None = None,
    implementation: str | None = None,
) -> ResonantTensor: ...


def phi_residual(
    identity: Any,
    residual: Any,
    mode: str | PhiResidualMode = "phi",
    *,
    activation: str | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Any:
    """Adds a residual by the golden ratio, and applies an activation in the same pass.

    ================= =======================================
    mode              sum z
    ================= =======================================
    ``phi``           identity + φ⁻¹ · residual
    ``phi_symmetric`` φ⁻¹ · (identity + residual)
    ``standard``      identity + residual
    ================= =======================================

    Args:
      identity: array of any shape; float16, bfloat16, float32 or float64. Or a crystallized
        `ResonantTensor`, as `residual` then has to be: the result is one too, and exact, for the
        activations None and 'relu'.
      residual: array of the same shape (nothing is broadcast); the two types promote as in jax.
      mode: a `PhiResidualMode` or its name.
      activation: None, 'relu' (derivative 0 at 0), 'gelu' (the tanh form, as
        ``jax.nn.gelu(approximate=True)``) or 'golden_gelu'.
      dtype: type of the result; None: the promoted type of the two branches.
      implementation: None, 'cuda' or 'xla' (docs/implementation.md).

    Returns:
      activation(z), of the shape of `identity`; computed in float32 (float64 for float64) and
      rounded once.

    Raises:
      TypeError: a branch or `dtype` is not real floating point, or one branch alone is a
        `ResonantTensor`.
      ValueError: the shapes differ, or `mode`, `activation` or `implementation` is unknown; for a
        `ResonantTensor` also where it is in flux, or something is asked for that is not exact.

    For branches that are orthogonal and of norm 10 the sum has norm 14.142 ('standard') or 11.756
    ('phi').

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> np.asarray(phi_residual(jnp.ones(4), jnp.array([1.0, 2.0, 3.0, 4.0]))).round(4)
    array([1.618 , 2.2361, 2.8541, 3.4721], dtype=float32)
    """
    name = "phi_residual"
    if type(identity) is ResonantTensor or type(residual) is ResonantTensor:
        return _exact(name, identity, residual, mode, activation, dtype, implementation)
    # jit hashes what is static and takes 1 for True: what is unusual is checked before it.
    if type(mode) is not str:
        mode = check_mode(name, mode)
    return _phi_residual(identity, residual, name, mode, activation, dtype, implementation)


@overload
def phi_residual_relu(
    identity: ArrayLike,
    residual: ArrayLike,
    mode: str | PhiResidualMode = "phi",
    *,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array: ...


@overload
def phi_residual_relu(
    identity: ResonantTensor,
    residual: ResonantTensor,
    mode: str | PhiResidualMode = "phi",
    *,
    dtype: None = None,
    implementation: str | None = None,
) -> ResonantTensor: ...


def phi_residual_relu(
    identity: Any,
    residual: Any,
    mode: str | PhiResidualMode = "phi",
    *,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Any:
    """`phi_residual` with ``activation='relu'``: the same arguments, types and errors.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> np.asarray(phi_residual_relu(jnp.array([1.0, -1.0]), jnp.array([1.0, 1.0]))).round(4)
    array([1.618, 0.   ], dtype=float32)
    """
    name = "phi_residual_relu"
    if type(identity) is ResonantTensor or type(residual) is ResonantTensor:
        return _exact(name, identity, residual, mode, "relu", dtype, implementation)
    if type(mode) is not str:
        mode = check_mode(name, mode)
    return _phi_residual(identity, residual, name, mode, "relu", dtype, implementation)


def phi_residual_gelu(
    identity: ArrayLike,
    residual: ArrayLike,
    mode: str | PhiResidualMode = "phi",
    *,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`phi_residual` with ``activation='gelu'``: the same arguments, types and errors.

    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> np.asarray(phi_residual_gelu(jnp.array([0.0, 1.0]), jnp.zeros(2))).round(4)
    array([0.    , 0.8412], dtype=float32)
    """
    name = "phi_residual_gelu"
    if type(identity) is ResonantTensor or type(residual) is ResonantTensor:
        return _exact(name, identity, residual, mode, "gelu", dtype, implementation)
    if type(mode) is not str:
        mode = check_mode(name, mode)
    return _phi_residual(identity, residual, name, mode, "gelu", dtype, implementation)


def _check_static(function, mode, activation, implementation) -> PhiResidualMode:
    _activation.check(function, activation)
    _dispatch.check_implementation(function, implementation)
    return check_mode(function, mode)


def _exact(function, identity, residual, mode, activation, dtype, implementation) -> Any:
    mode = _check_static(function, mode, activation, implementation)
    return exact_phi_residual(function, identity, residual, mode, activation, dtype, implementation)


@_public.jit("function", "mode", "activation", "dtype", "implementation")
def _phi_residual(identity, residual, function, mode, activation, dtype, implementation):
    mode = _check_static(function, mode, activation, implementation)
    _check.floating(function, identity=identity, residual=residual)
    _check.same_shape(function, identity=identity, residual=residual)
    data_dtype = jnp.result_type(identity, residual)
    (y,) = PHI_RESIDUAL(
        jnp.asarray(identity, data_dtype),
        jnp.asarray(residual, data_dtype),
        mode=mode,
        activation=activation,
        dtype=_check.result_dtype(function, dtype, data_dtype),
        implementation=implementation,
    )
    return y


# ------------------------------------------------------------------------------- reference


def golden_sum(identity: Any, residual: Any, mode: PhiResidualMode) -> Any:
    """z in the accumulation type."""
    residual = widen(residual)
    if mode is PhiResidualMode.PHI:
        residual = mode.residual_scale * residual
    identity = widen(identity)
    z = identity + residual
    if mode is not PhiResidualMode.PHI_SYMMETRIC:
        return z
    # The sum may overflow where z does not.
    z, terms = mode.sum_scale * z, mode.sum_scale * identity + mode.sum_scale * residual
    return jnp.where(jnp.isinf(z), terms, z)


def branch_scales(mode: PhiResidualMode) -> tuple[float, float]:
    """∂z/∂identity and ∂z/∂residual."""
    return mode.sum_scale, mode.sum_scale * mode.residual_scale


def _reference(identity, residual, *, mode, activation, dtype):
    z = golden_sum(identity, residual, mode)
    return _activation.apply(activation, z).astype(dtype), z.astype(identity.dtype)


def _saved(*, activation, dtype, data_dtype, **_):
    """y where that suffices, otherwise z; a plain sum needs nothing."""
    if activation is None:
        return ()
    # y may be 0 where z is not.
    least, least_of_data = (jnp.finfo(t).smallest_normal for t in (dtype, data_dtype))
    of_y = _activation.ACTIVATIONS[activation].of_y and least <= least_of_data
    return ("y",) if of_y else ("z",)


def _slope(activation, saved, accumulation) -> Any:
    return _activation.derivative(activation, *(x.astype(accumulation) for x in saved))


def _tangent(saved, tangents, *, mode, activation, dtype, data_dtype):
    accumulation = accumulation_dtype(data_dtype)
    there = [t for t in tangents if t is not None]
    if len(there) == 2:
        dz = golden_sum(there[0], there[1], mode)
    else:
        dz = branch_scales(mode)[tangents[0] is None] * widen(there[0])
    dy = _slope(activation, saved, accumulation) * dz
    return dy.astype(dtype), dz.astype(data_dtype)


def _cotangent(saved, cotangents, *, mode, activation, dtype, data_dtype):
    del dtype
    accumulation = accumulation_dtype(data_dtype)
    ct_y, ct_z = (None if ct is None else ct.astype(accumulation) for ct in cotangents)
    terms = [] if ct_y is None else [_slope(activation, saved, accumulation) * ct_y]
    dz = functools.reduce(operator.add, terms if ct_z is None else [*terms, ct_z])
    return tuple((scale * dz).astype(data_dtype) for scale in branch_scales(mode))


# -------------------------------------------------------------------------------- kernels


def _attributes(*, mode, activation, **_):
    return {
        "sum_scale": mode.sum_scale,
        "residual_scale": mode.residual_scale,
        "activation": _activation.code(activation),
    }


def _cotangent_attributes(*, mode, activation, **_):
    identity_scale, residual_scale = branch_scales(mode)
    return {
        "identity_scale": identity_scale,
        "residual_scale": residual_scale,
        "activation": _activation.code(activation),
    }


def one_gradient(*, mode, **_) -> bool:
    """Whether both branches have the same gradient."""
    identity_scale, residual_scale = branch_scales(mode)
    return identity_scale == residual_scale


def _passes(*, mode, activation, dtype, data_dtype, **_):
    """What a plain sum takes as it is has the cotangent itself for a gradient."""
    if activation is not None or dtype != data_dtype:
        return ()
    scales = zip(("identity", "residual"), branch_scales(mode))
    return [name for name, scale in scales if scale == 1]


# ----------------------------------------------------------------------------- declaration


def _check_linear(*, activation, **_):
    if activation is not None:
        raise NotImplementedError(
            f"phi_residual: it is linear, and has a transpose, only without an activation, "
            f"got activation={activation!r}"
        )


PHI_RESIDUAL = Operation(
    name="phi_residual",
    inputs=(Input("identity"), Input("residual")),
    outputs=(Output("y", dtype="dtype"), Output("z", inner=True)),
    saved=_saved,
    reference=_reference,
    tangent=_tangent,
    cotangent=_cotangent,
    linear_if=_check_linear,
    kernels=Kernels(
        attributes=_attributes,
        cotangent_attributes=_cotangent_attributes,
        twins=one_gradient,
        passes=_passes,
    ),
    default="xla",
    geometry=ELEMENTWISE,
)
