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
from .._batching import batch_elementwise
from .._custom_call import elementwise_call
from .._numerics import accumulation_dtype, widen
from .._primitive import bind, define, forward_mode, is_zero, linear, transposes
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
    y, *_ = bind(
        phi_residual_p,
        jnp.asarray(identity, data_dtype),
        jnp.asarray(residual, data_dtype),
        mode=mode,
        activation=activation,
        dtype=_check.result_dtype(function, dtype, data_dtype),
        residuals=False,
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


def _reference(identity, residual, *, mode, activation, dtype, residuals):
    z = golden_sum(identity, residual, mode)
    y = _activation.apply(activation, z).astype(dtype)
    keeps_sum = residuals and _keeps_sum(activation, dtype, identity.dtype)
    return (y, z.astype(identity.dtype)) if keeps_sum else (y,)


def _keeps_sum(activation: str | None, dtype: Any, data_dtype: Any) -> bool:
    """Whether the backward pass needs z: that of a plain sum needs nothing.

    Where y suffices z is kept only if y may be 0 where z is not.
    """
    if activation is None or not _activation.ACTIVATIONS[activation].of_y:
        return activation is not None
    least, least_of_data = (jnp.finfo(t).smallest_normal for t in (dtype, data_dtype))
    return bool(least > least_of_data)


def branch_scales(mode: PhiResidualMode) -> tuple[float, float]:
    """∂z/∂identity and ∂z/∂residual."""
    return mode.sum_scale, mode.sum_scale * mode.residual_scale


def _split(operands, activation):
    """What was saved (nothing without an activation), and the tangents or cotangents."""
    saved = 0 if activation is None else 1
    return operands[:saved], iter(operands[saved:])


def _slope(activation, saved, accumulation) -> Any:
    return _activation.derivative(activation, *(x.astype(accumulation) for x in saved))


def _tangent_reference(*operands, mode, activation, dtype, data_dtype, inputs, outputs):
    accumulation = accumulation_dtype(data_dtype)
    saved, tangents = _split(operands, activation)
    if all(inputs):
        identity, residual = (t.astype(accumulation) for t in tangents)
        dz = golden_sum(identity, residual, mode)
    else:
        dz = branch_scales(mode)[inputs.index(True)] * next(tangents).astype(accumulation)
    results = []
    if outputs[0]:
        results.append((_slope(activation, saved, accumulation) * dz).astype(dtype))
    if any(outputs[1:]):
        results.append(dz.astype(data_dtype))
    return tuple(results)


def _cotangent_reference(*operands, mode, activation, dtype, data_dtype, inputs, outputs):
    accumulation = accumulation_dtype(data_dtype)
    saved, cotangents = _split(operands, activation)
    terms = []
    if outputs[0]:
        slope = _slope(activation, saved, accumulation)
        terms.append(slope * next(cotangents).astype(accumulation))
    if any(outputs[1:]):
        terms.append(next(cotangents).astype(accumulation))
    dz = functools.reduce(operator.add, terms)
    scales = [scale for scale, wanted in zip(branch_scales(mode), inputs) if wanted]
    return tuple((scale * dz).astype(data_dtype) for scale in scales)


# ------------------------------------------------------------------------------ primitives


def _kernel(identity, residual, *, mode, activation, dtype, residuals, devices):
    if identity.size == 0:
        return _reference(
            identity, residual, mode=mode, activation=activation, dtype=dtype, residuals=residuals
        )
    keeps_sum = residuals and _keeps_sum(activation, dtype, identity.dtype)
    return elementwise_call(
        "syntonic_phi_residual",
        {"identity": identity, "residual": residual},
        {"y": dtype, "z": identity.dtype} if keeps_sum else {"y": dtype},
        sum_scale=mode.sum_scale,
        residual_scale=mode.residual_scale,
        activation=_activation.code(activation),
    )


def _cotangent_kernel(*operands, devices, **params):
    activation, data_dtype, ct = params["activation"], params["data_dtype"], operands[-1]
    if ct.size == 0 or any(params["outputs"][1:]):  # a cotangent of z: second order only
        return _cotangent_reference(*operands, **params)
    scales = branch_scales(params["mode"])
    asked = [scale for scale, wanted in zip(scales, params["inputs"]) if wanted]
    # A gradient for each scale: where the two are equal, one buffer serves both branches. What a
    # plain sum takes as it is has the cotangent itself for a gradient.
    gradients = {1.0: ct} if activation is None and ct.dtype == data_dtype else {}
    missing = set(asked).difference(gradients)
    wanted = {"d_identity": scales[0], "d_residual": scales[1]}
    wanted = {name: scale for name, scale in wanted.items() if scale in missing}
    if scales[0] == scales[1]:
        wanted.pop("d_residual", None)
    if wanted:
        results = elementwise_call(
            "syntonic_phi_residual_cotangent",
            dict(zip(("saved", "ct") if activation else ("ct",), operands, strict=True)),
            dict.fromkeys(wanted, data_dtype),
            identity_scale=scales[0],
            residual_scale=scales[1],
            activation=_activation.code(activation),
        )
        gradients.update(zip(wanted.values(), results))
    return [gradients[scale] for scale in asked]


phi_residual_p = define("phi_residual", _reference, operation="phi_residual", kernel=_kernel)
phi_residual_tangent_p = define(
    "phi_residual_tangent", _tangent_reference, operation="phi_residual"
)
phi_residual_cotangent_p = define(
    "phi_residual_cotangent",
    _cotangent_reference,
    operation="phi_residual",
    kernel=_cotangent_kernel,
)

# ----------------------------------------------------------------------------------- rules


def _jvp(primals, tangents, *, residuals, **params):
    y, *z = bind(phi_residual_p, *primals, residuals=True, **params)
    saved = [] if params["activation"] is None else [z[0] if z else y]
    count = 2 if residuals and z else 1
    results = bind(
        phi_residual_tangent_p,
        *saved,
        *(t for t in tangents if not is_zero(t)),
        data_dtype=primals[0].dtype,
        inputs=tuple(not is_zero(t) for t in tangents),
        outputs=(True,) * count,
        **params,
    )
    return [y, *z][:count], results


def _transpose(cotangents, avals, wanted, *, residuals, **params):
    if params["activation"] is not None:
        raise NotImplementedError(
            f"phi_residual: it is linear, and has a transpose, only without an activation, "
            f"got activation={params['activation']!r}"
        )
    return bind(
        phi_residual_cotangent_p,
        *cotangents,
        data_dtype=avals[0].dtype,
        inputs=wanted,
        outputs=(True,),
        **params,
    )


forward_mode(phi_residual_p, _jvp)
linear(phi_residual_p, _transpose)
transposes(
    phi_residual_tangent_p,
    phi_residual_cotangent_p,
    _tangent_reference,
    _cotangent_reference,
    reach=((True, True), (True, True)),
)
for _primitive in (phi_residual_p, phi_residual_tangent_p, phi_residual_cotangent_p):
    batch_elementwise(_primitive)
