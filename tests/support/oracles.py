"""What the operations are, in NumPy float64, written from their definitions alone.

Nothing here imports the library. Every oracle returns an `Estimate`: the exact value (up to
float64) and how far a correct implementation may be from it *before* it rounds the result to the
output type. The distance is derived beside each oracle from

    u(type)  half the spacing of numbers at 1: the relative error of one rounding,
    n        the number of terms of a sum: adding them in any order errs by at most
             n * u * sum(|terms|),

with u that of the accumulation type (float64 for float64 data, else float32). Rounding to the
output type then adds half a unit in the last place. All of these are bounds, not averages, so no
seed can break them; `STEPS` is the number of roundings in the elementwise part of a formula, the
few units of the last place of exp, tanh and rsqrt included.
"""

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np

PHI = (1 + math.sqrt(5)) / 2
PHI_INV = (math.sqrt(5) - 1) / 2
STEPS = 16

# mode: (s, c) in z = s * (identity + c * residual)
MODES = {"phi": (1.0, PHI_INV), "phi_symmetric": (PHI_INV, 1.0), "standard": (1.0, 1.0)}
DTYPES = ("float16", "bfloat16", "float32", "float64")


class Estimate(NamedTuple):
    value: np.ndarray  # float64
    slack: np.ndarray  # float64, the same shape


# --- number formats ------------------------------------------------------------------------------


def info(dtype) -> ml_dtypes.finfo:
    return ml_dtypes.finfo(np.dtype(dtype))


def accumulation(dtype) -> str:
    return "float64" if np.dtype(dtype) == np.float64 else "float32"


def unit(dtype) -> float:
    """Relative error of one rounding to nearest."""
    return float(info(dtype).eps) / 2


def real(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def ulp(x, dtype) -> np.ndarray:
    """Distance between neighbouring numbers of a type at |x|; fixed below the normal range."""
    limits = info(dtype)
    _, exponent = np.frexp(np.maximum(np.abs(real(x)), float(limits.smallest_normal)))
    return np.ldexp(1.0, exponent - 1 - limits.nmant)


def round_to(x, dtype) -> np.ndarray:
    """x rounded once to a type, to nearest and ties to even, and back in float64.

    A cast will not do: before 0.7 ml_dtypes takes float64 to bfloat16 by way of float32, and so
    rounds twice.
    """
    x = real(x)
    if np.dtype(dtype) == np.float64:
        return x
    with np.errstate(invalid="ignore"):
        step = ulp(np.where(np.isfinite(x), x, 0.0), dtype)
        rounded = np.rint(x / step) * step
    return np.where(np.abs(rounded) > float(info(dtype).max), np.copysign(np.inf, x), rounded)


# --- comparison ----------------------------------------------------------------------------------


def flushed(x, dtype) -> np.ndarray:
    """x, with 0 for what is below the normal range of the type."""
    x = real(x)
    return np.where(np.abs(x) < float(info(dtype).smallest_normal), 0 * x, x)


def assert_kept_or_flushed(actual, estimates) -> None:
    """Every number is one of the estimates, or 0 where one of them is below the normal range.

    For numbers around the smallest normal one. XLA:CPU may replace those below it by 0 at any step;
    the estimates are of the exact result and of what is left where it did.
    """
    dtype = np.asarray(actual).dtype
    actual, good = real(actual), False
    least = float(max(info(t).smallest_normal for t in (dtype, accumulation(dtype))))
    for value, slack in estimates:
        good |= np.abs(actual - value) <= ulp(np.abs(value) + slack, dtype) / 2 + slack
        good |= (actual == 0) & (np.abs(value) < least)
    assert np.all(good), (actual[~good], [value[~good] for value, _ in estimates])


def assert_close(actual, estimate: Estimate, what: str = "", flush: bool = False):
    """`actual` is the estimate rounded once to its own type, give or take the estimate's slack.

    With `flush`, numbers below the normal range may have become zero on the way (XLA:CPU does
    that), at the price of at most the smallest normal number of the type and of float32.

    XLA's own casts from float64 to a 16-bit type go by way of float32, which rounds twice: results
    of 16 bits may be off by a rounding to float32 as well.
    """
    dtype = np.asarray(actual).dtype
    value, slack = np.broadcast_arrays(*estimate)
    assert np.shape(actual) == value.shape, f"{what}: shape {np.shape(actual)}, not {value.shape}"
    actual = real(actual)
    if flush:
        slack = slack + 2 * max(
            float(info(t).smallest_normal) for t in (dtype, accumulation(dtype))
        )
    if dtype.itemsize == 2:
        slack = slack + unit("float32") * np.abs(value)
    nonfinite = ~np.isfinite(value)
    np.testing.assert_array_equal(actual[nonfinite], value[nonfinite], err_msg=what)
    allowed = (ulp(np.abs(value) + slack, dtype) / 2 + slack)[~nonfinite]
    error = np.abs(actual[~nonfinite] - value[~nonfinite])
    with np.errstate(invalid="ignore", divide="ignore"):  # nothing is allowed where 0 is exact
        excess = np.where(error <= allowed, 0.0, error / allowed)
        excess = np.where(np.isnan(error), np.inf, excess)
    if np.any(excess > 1):
        i = int(np.argmax(excess))
        raise AssertionError(
            f"{what}: {np.count_nonzero(excess > 1)} of {excess.size} values are off; the worst is "
            f"{actual[~nonfinite][i]!r}, not {value[~nonfinite][i]!r}: an error of {error[i]:.3g}, "
            f"allowed {allowed[i]:.3g} ({dtype})"
        )


# --- phi residual --------------------------------------------------------------------------------


def residual_sum(identity, residual, mode: str, acc: str) -> Estimate:
    """z. Three roundings and that of the constant, each of at most u (|identity| + |residual|)."""
    s, c = MODES[mode]
    identity, residual = real(identity), real(residual)
    magnitude = s * (np.abs(identity) + c * np.abs(residual))
    return Estimate(s * (identity + c * residual), 4 * unit(acc) * magnitude)


def sigmoid(x):
    return np.exp(-np.logaddexp(0.0, -x))


def activate(z, activation: str | None) -> tuple[np.ndarray, np.ndarray]:
    """The activation of z and its derivative. relu'(0) = 0."""
    z = real(z)
    if activation is None:
        return z, np.ones_like(z)
    if activation == "relu":
        return np.where(z > 0, z, 0.0), np.where(z > 0, 1.0, 0.0)
    if activation == "gelu":
        root = np.sqrt(2 / np.pi)
        t = np.tanh(root * (z + 0.044715 * z**3))
        inner = root * (1 + 3 * 0.044715 * z**2)
        return 0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * inner
    if activation == "golden_gelu":
        s = sigmoid(PHI * z)
        return z * s, s + PHI * z * s * (1 - s)
    raise ValueError(activation)


# |f'| and |f''| of both gelus stay below these: how far an error of z moves f and f'.
STEEPNESS, CURVATURE = 1.13, 1.7


def activation_slack(z, acc: str) -> np.ndarray:
    """Error of either gelu of an exact z: z times a factor in [0, 1] that errs by STEPS * u.

    The factor's argument errs by u times itself, but |x| tanh'(x) and |x| sigmoid'(x) are below 1.
    """
    return STEPS * unit(acc) * np.abs(real(z))


def slope_slack(z, acc: str) -> np.ndarray:
    """Error of the derivative of either gelu at an exact z.

    It multiplies an error of u in 1 - tanh**2 by up to 0.4 |z| (1 + 0.14 z**2) before that
    saturates, for |z| < 8 in float64: at most 4 (1 + |z|) there.
    """
    return STEPS * unit(acc) * (1 + np.minimum(4 * np.abs(real(z)), 32))


def phi_residual(identity, residual, mode="phi", activation=None, *, acc) -> Estimate:
    z = residual_sum(identity, residual, mode, acc)
    if activation in (None, "relu"):
        return Estimate(activate(z.value, activation)[0], z.slack)
    slack = STEEPNESS * z.slack + activation_slack(z.value, acc)
    return Estimate(activate(z.value, activation)[0], slack)


def phi_residual_vjp(identity, residual, ct, mode="phi", activation=None, *, acc, stored):
    """Cotangents of identity and residual.

    The backward pass of the gelus reads z as it was stored, in the type of the data: half a unit
    in the last place of z, through the second derivative, is part of the slack. relu is exact but
    where z is within its slack of 0, or is stored as 0.
    """
    s, c = MODES[mode]
    z, ct = residual_sum(identity, residual, mode, acc), real(ct)
    slope = activate(z.value, activation)[1]
    slack = np.zeros_like(slope)
    moved = z.slack + ulp(z.value, stored) / 2
    if activation == "relu":
        slack = np.where(np.abs(z.value) <= moved, 1.0, 0.0)
    elif activation is not None:
        slack = CURVATURE * moved + slope_slack(z.value, acc)
    grad, slack = ct * slope, np.abs(ct) * (slack + 4 * unit(acc) * np.abs(slope))
    return Estimate(s * grad, s * slack), Estimate(s * c * grad, s * c * slack)


def golden_gelu(x, *, acc) -> Estimate:
    return Estimate(activate(x, "golden_gelu")[0], activation_slack(x, acc))


def golden_gelu_vjp(x, ct, *, acc) -> Estimate:
    slope, ct = activate(x, "golden_gelu")[1], real(ct)
    return Estimate(ct * slope, np.abs(ct) * slope_slack(x, acc))


def residual_component_norm(residual, mode="phi", *, acc) -> Estimate:
    """n squares and sums err by (n + 2) u relatively, the root halves that."""
    s, c = MODES[mode]
    residual = real(residual)
    norm = s * c * np.sqrt(np.sum(residual**2))
    return Estimate(norm, norm * (residual.size / 2 + 8) * unit(acc))


def residual_component_norm_vjp(residual, ct, mode="phi", *, acc) -> Estimate:
    """ct · s c · residual / |residual|; the norm's slack, and some products and quotients."""
    s, c = MODES[mode]
    residual = real(residual)
    norm = residual_component_norm(residual, mode, acc=acc)
    value = real(ct) * (s * c) ** 2 * residual / norm.value
    return Estimate(value, np.abs(value) * (norm.slack / norm.value + STEPS * unit(acc)))


# --- residual + layer norm -----------------------------------------------------------------------


class RowStatistics(NamedTuple):
    """Of the rows of a stored z, and how far computed ones may be from them."""

    xhat: np.ndarray
    xhat_slack: np.ndarray
    rstd: np.ndarray
    rstd_relative: np.ndarray  # slack of rstd, relative to it


def stored_sum(identity, residual, mode: str, dtype) -> Estimate:
    """z rounded to its own type, and how far the z that was really stored may be from it.

    A 16-bit z is the same number whatever the last bits of the float32 sum were, except where
    the sum is so close to a tie that they decide.
    """
    z = residual_sum(identity, residual, mode, accumulation(dtype))
    if accumulation(dtype) == dtype:
        return z
    tie = round_to(z.value - z.slack, dtype) != round_to(z.value + z.slack, dtype)
    return Estimate(round_to(z.value, dtype), np.where(tie, ulp(z.value, dtype), 0.0))


def row_statistics(z: Estimate, epsilon: float, acc: str) -> RowStatistics:
    """(z - mean) / sqrt(var + epsilon) over the last axis; epsilon may be one number a row.

    The mean is kept to twice the precision: a rounded one, and the mean of what it leaves. The
    first errs by `first` = (n + 1) u mean|z|, so the differences from it are at most a = |z - mean|
    + first, and their rounding is u a. Their mean, which corrects the first one, errs by dm =
    (n + STEPS) u mean(a), the differences that result by dm + 2 u a. Around a mean that is off by
    dm the sum of squares is too large by n dm**2, so var errs relatively by (n + STEPS) u +
    dm**2 / (var + epsilon), rstd by half of that, and xhat by that of the differences times rstd +
    |xhat| * (that + a few roundings). A z that is itself off by dz moves xhat by up to
    rstd * (dz + mean(dz)) and, through the variance, by as much again times |xhat|.
    """
    value, dz = z
    n, u = value.shape[-1], unit(acc)

    def mean(x):
        return np.mean(x, -1, keepdims=True)

    centred = value - mean(value)
    rstd = 1 / np.sqrt(mean(centred**2) + epsilon)
    xhat = centred * rstd
    spread = np.abs(centred) + (n + 1) * u * mean(np.abs(value))
    off = (n + STEPS) * u * mean(spread) + mean(dz)
    relative = ((n + STEPS) * u + off**2 * rstd**2) / 2 + STEPS * u
    relative = relative + 2 * rstd * mean(dz * (1 + np.abs(xhat)))
    slack = rstd * (off + 2 * u * spread + dz) + np.abs(xhat) * relative
    return RowStatistics(xhat, slack, rstd, relative)


def exactly(z) -> Estimate:
    return Estimate(real(z), np.zeros(np.shape(z)))


def layernorm(z: Estimate, scale=None, bias=None, *, epsilon=1e-5, variance=1.0, acc) -> Estimate:
    """scale * sqrt(variance) * xhat + bias of a stored z."""
    rows, u = row_statistics(z, epsilon, acc), unit(acc)
    scale = np.sqrt(variance) * (1.0 if scale is None else real(scale))
    bias = 0.0 if bias is None else real(bias)
    y = scale * rows.xhat
    slack = np.abs(scale) * rows.xhat_slack + 4 * u * (np.abs(y) + np.abs(bias))
    return Estimate(y + bias, slack)


class LayernormCotangents(NamedTuple):
    identity: Estimate
    residual: Estimate
    scale: Estimate
    bias: Estimate


def layernorm_vjp(
    z: Estimate, ct_y, ct_z=None, scale=None, *, mode="phi", epsilon=1e-5, variance=1.0, acc
) -> LayernormCotangents:
    """Cotangents from the stored z; those of scale and bias are sums over all rows.

    With w = scale * sqrt(variance) * ct_y: dz = rstd * (w - mean(w) - xhat * mean(w xhat)) + ct_z.
    The two means err by (n + STEPS) u times their absolute sums, and with xhat; the sums over R
    rows by (R + STEPS) u times theirs.
    """
    s, c = MODES[mode]
    rows, ct_y, u = row_statistics(z, epsilon, acc), real(ct_y), unit(acc)
    ct_z = np.zeros_like(ct_y) if ct_z is None else real(ct_z)
    root = np.sqrt(variance)
    w = root * (1.0 if scale is None else real(scale)) * ct_y
    n, lead = w.shape[-1], tuple(range(w.ndim - 1))

    def mean(x):
        return np.mean(x, -1, keepdims=True)

    inner = mean(w * rows.xhat)
    dz = rows.rstd * (w - mean(w) - rows.xhat * inner) + ct_z
    error = (n + STEPS) * u
    inner_slack = error * mean(np.abs(w * rows.xhat)) + mean(np.abs(w) * rows.xhat_slack)
    slack = rows.rstd * (
        error * (np.abs(w) + mean(np.abs(w)))
        + rows.xhat_slack * np.abs(inner)
        + np.abs(rows.xhat) * inner_slack
    )
    slack = slack + np.abs(dz - ct_z) * rows.rstd_relative + STEPS * u * (np.abs(ct_z) + np.abs(dz))
    count = int(np.prod(w.shape[:-1]))
    terms = root * ct_y * rows.xhat
    total = (count + STEPS) * u
    d_scale = Estimate(
        terms.sum(lead),
        total * np.abs(terms).sum(lead) + (root * np.abs(ct_y) * rows.xhat_slack).sum(lead),
    )
    d_bias = Estimate(ct_y.sum(lead), total * np.abs(ct_y).sum(lead))
    return LayernormCotangents(
        Estimate(s * dz, s * slack), Estimate(s * c * dz, s * c * slack), d_scale, d_bias
    )
