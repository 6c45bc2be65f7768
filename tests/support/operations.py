"""The one list of operations: every public function once or twice, as battery.py describes them.

It is what the tests of transformations, sharding, export, handlers and the installation go through.
Where options lead to other primitives or other rules there is a case for each; the layouts and
modes of one operation are the business of its own test module.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import softmax_cases
from battery import Operation

import syntonic_jax as sj

EPSILON = 0.1  # large beside the variance, and not a float32


def golden_sum(identity, residual):
    return identity + oracles.PHI_INV * residual


def normalised(x, scale=None, bias=None, axes=-1, where=None):
    """To the variance φ⁻¹."""
    mean = jnp.mean(x, axes, where=where, keepdims=True)
    var = jnp.mean((x - mean) ** 2, axes, where=where, keepdims=True)
    y = np.sqrt(oracles.PHI_INV).item() * (x - mean) / jnp.sqrt(var + EPSILON)
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias), mean, var


def layer_norm(x, scale, bias):
    return normalised(x, scale, bias)[0]


def rms_norm(x, scale):
    mean_square = jnp.mean(x**2, -1, keepdims=True)
    return np.sqrt(oracles.PHI_INV).item() * x / jnp.sqrt(mean_square + EPSILON) * scale


def residual_layer_norm(identity, residual, scale, bias):
    z = golden_sum(identity, residual)
    return layer_norm(z, scale, bias), z


def residual_rms_norm(identity, residual, scale):
    z = golden_sum(identity, residual)
    return rms_norm(z, scale), z


def mask_like(x):
    """Some of every column, the first row whole: no channel is without elements."""
    row, column = (jax.lax.broadcasted_iota("int32", x.shape, axis) for axis in (0, x.ndim - 1))
    return (row == 0) | ((row + 2 * column) % 5 < 3)


def batch_norm(x, *parameters, masked=False):
    y, mean, var = normalised(x, *parameters, axes=0, where=mask_like(x) if masked else None)
    return y, mean[0], var[0]


def masked_batch_norm(x, *parameters, **options):
    return sj.golden_batch_norm(x, *parameters, where=mask_like(x), epsilon=EPSILON, **options)


def inference(x, mean, var, scale, bias):
    y = np.sqrt(oracles.PHI_INV).item() * (x - mean) / jnp.sqrt(var + EPSILON)
    return y * scale + bias


def positive_variance(x, mean, var, *rest):
    return x, mean, jnp.abs(var) + 0.25, *rest


def statistics(x, implementation=None):
    del implementation  # there is no such argument
    return sj.output_statistics(x)


def off_the_kink(identity, residual):
    z = golden_sum(identity, residual)
    return identity + 0.2 * jnp.sign(z).astype(identity.dtype), residual


def activated(activation):
    return lambda *branches: activation(golden_sum(*branches))


def nearest(x):
    """Straight-through, of the nearest of all candidates."""
    b = jnp.arange(-3, 4)
    rest = jax.lax.stop_gradient(x)[..., None] - b * oracles.PHI
    a = jnp.clip(jnp.round(rest), -3, 3)
    best = jnp.argmin(jnp.abs(rest - a), -1, keepdims=True)
    y = jnp.take_along_axis(a + b * oracles.PHI, best, -1)[..., 0]
    return x + jax.lax.stop_gradient(y - x)


def with_epsilon(f):
    return functools.partial(f, epsilon=EPSILON)


def case(f, reference, kinds, label="", call=None, **more) -> Operation:
    name = f.__name__
    more.setdefault("bad", (jnp.nan,))
    more.setdefault("targets", (name, f"{name}_cotangent"))
    return Operation(f"{name}{label}", name, call or f, reference, kinds, name, **more)


ROW, ROWS, PARAMETERS = ("rows",), ("rows", "rows"), ("par", "par")
ELEMENTS = {"along": "nothing"}
PHI_RESIDUAL = {"targets": ("phi_residual", "phi_residual_cotangent"), **ELEMENTS}
MOMENTS, NORMALISE, SUMS = (
    f"golden_batch_norm_{part}" for part in ("moments", "normalise", "sums")
)
BATCH_NORM = {"targets": (MOMENTS, NORMALISE, SUMS), "along": "lead"}

OPERATIONS = (
    case(sj.phi_residual, golden_sum, ROWS, linear=True, **PHI_RESIDUAL),
    case(
        sj.phi_residual,
        activated(lambda z: z * jax.nn.sigmoid(oracles.PHI * z)),
        ROWS,
        "-golden_gelu",
        functools.partial(sj.phi_residual, activation="golden_gelu"),
        **PHI_RESIDUAL,
    ),
    case(sj.phi_residual_relu, activated(jax.nn.relu), ROWS, adjust=off_the_kink, **PHI_RESIDUAL),
    case(
        sj.phi_residual_gelu,
        activated(functools.partial(jax.nn.gelu, approximate=True)),
        ROWS,
        **PHI_RESIDUAL,
    ),
    case(
        sj.phi_residual_layernorm,
        residual_layer_norm,
        ROWS + PARAMETERS,
        call=functools.partial(
            sj.phi_residual_layernorm, return_sum=True, epsilon=EPSILON, target_variance="golden"
        ),
    ),
    case(
        sj.phi_residual_rmsnorm,
        residual_rms_norm,
        (*ROWS, "par"),
        call=functools.partial(
            sj.phi_residual_rmsnorm, return_sum=True, epsilon=EPSILON, target_variance="golden"
        ),
    ),
    case(
        sj.golden_layer_norm,
        layer_norm,
        ROW + PARAMETERS,
        call=with_epsilon(sj.golden_layer_norm),
    ),
    case(sj.golden_rms_norm, rms_norm, (*ROW, "par"), call=with_epsilon(sj.golden_rms_norm)),
    case(
        sj.golden_batch_norm,
        batch_norm,
        ROW + PARAMETERS,
        call=with_epsilon(sj.golden_batch_norm),
        statistics=2,
        **BATCH_NORM,
    ),
    case(
        sj.golden_batch_norm,
        functools.partial(batch_norm, masked=True),
        ROW + PARAMETERS,
        "-masked",
        masked_batch_norm,
        statistics=2,
        **BATCH_NORM,
    ),
    case(
        sj.golden_batch_norm_inference,
        inference,
        ROW + 2 * PARAMETERS,
        call=with_epsilon(sj.golden_batch_norm_inference),
        adjust=positive_variance,
        targets=(NORMALISE, SUMS),
        along="nothing",
    ),
    case(
        sj.output_statistics,
        lambda x: (jnp.mean(x, 0), jnp.var(x, 0)),
        ROW,
        call=statistics,
        takes_dtype=False,
        statistics=2,
        along="lead",
        targets=(MOMENTS, SUMS),
    ),
    case(sj.golden_gelu, lambda x: x * jax.nn.sigmoid(oracles.PHI * x), ROW, **ELEMENTS),
    case(
        sj.residual_component_norm,
        lambda x: oracles.PHI_INV * jnp.sqrt(jnp.sum(x**2)),
        ROW,
        takes_dtype=False,
        along="everything",
        targets=("sum_of_squares", "sum_of_squares_cotangent"),
    ),
    softmax_cases.operation("syntonic_softmax", "learned"),
    softmax_cases.operation("syntonic_softmax", "provided", masked=True),
    softmax_cases.operation("syntonic_log_softmax", "learned", masked=True),
    softmax_cases.operation("syntonic_log_softmax", "shared"),
    softmax_cases.operation("syntonic_cross_entropy", "learned"),
    softmax_cases.operation("syntonic_cross_entropy", "provided", masked=True),
    case(
        sj.crystallize,
        nearest,
        ROW,
        call=functools.partial(sj.crystallize, precision=3),
        targets=("crystallize",),
        **ELEMENTS,
    ),
)
BY_LABEL = {o.label: o for o in OPERATIONS}
FIRST = {o.name: o for o in reversed(OPERATIONS)}  # the first case of each
FIRST = dict(reversed(FIRST.items()))
TARGETS = {target for o in OPERATIONS for target in o.targets}
