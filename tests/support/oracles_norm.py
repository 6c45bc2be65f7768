"""The golden batch norm in NumPy float64, and how far an implementation may be from it.

As in oracles.py, whose estimates and tolerances these are. A layer norm is `oracles.layernorm`, a
batch norm whose features are the axes that it does not reduce.
"""

import math
from typing import NamedTuple

import numpy as np
from oracles import STEPS, Estimate, real, unit


class Statistics(NamedTuple):
    """Of the channels, with the reduced axes kept as ones, and how far computed ones may be."""

    mean: Estimate
    var: Estimate
    centred: Estimate
    xhat: Estimate
    rstd: np.ndarray
    rstd_relative: np.ndarray  # slack of rstd, relative to it
    kept: np.ndarray  # 1 where an element counts, else 0
    count: np.ndarray


class BatchNorm(NamedTuple):
    y: Estimate
    mean: Estimate
    var: Estimate


class BatchNormCotangents(NamedTuple):
    x: Estimate
    scale: Estimate
    bias: Estimate


def reduced_axes(x, features) -> tuple[int, ...]:
    ndim = np.ndim(x)
    return tuple(a for a in range(ndim) if a not in {f % ndim for f in features})


def spread(parameter, x, features, default=0.0) -> np.ndarray:
    """A parameter of the shape of the feature axes, in a shape that broadcasts to that of x."""
    if parameter is None:
        return np.asarray(default)
    shape = [1 if a in reduced_axes(x, features) else n for a, n in enumerate(np.shape(x))]
    return real(parameter).reshape(shape)


def statistics(x, features, epsilon: float, where, acc: str) -> Statistics:
    """The mean is kept to twice the precision: a rounded one, and that of what it leaves.

    The first mean errs by `first` = (n + 1) u mean|x|, so the differences from it are at most
    a = |x - mean| + first, and their rounding is u a. Their mean, which corrects the first one,
    errs by dm = (n + STEPS) u mean(a), the differences that result by dm + 2 u a. Around a mean
    that is off by dm the variance is too large by dm**2, its sum errs by (n + STEPS) u mean(a**2).
    rstd errs relatively by half of what var + epsilon does, and a few roundings. The mean that is
    returned is one number, and rounded.
    """
    x, u, over = real(x), unit(acc), reduced_axes(x, features)
    kept = np.broadcast_to(True if where is None else np.asarray(where), x.shape)
    n = kept.sum(over, keepdims=True)

    def mean_of(values):
        with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 in a fully masked channel
            return np.where(kept, values, 0.0).sum(over, keepdims=True) / n

    with np.errstate(invalid="ignore", over="ignore"):  # NaN and inf stay in their channels
        mean = mean_of(x)
        first = (n + 1) * u * mean_of(np.abs(x))
        centred = x - mean
        shift = mean_of(centred)  # or float64 results were compared with something less exact
        mean, centred = mean + shift, centred - shift
        a = np.abs(centred) + first
        dm = (n + STEPS) * u * mean_of(a)
        var = mean_of(centred**2)
        dv = (n + STEPS) * u * mean_of(a**2) + dm**2
        rstd = 1 / np.sqrt(var + epsilon)
        relative = dv * rstd**2 / 2 + STEPS * u
        off = dm + 2 * u * a
        xhat = Estimate(centred * rstd, rstd * off + np.abs(centred * rstd) * relative)
    return Statistics(
        Estimate(mean, dm + 2 * u * np.abs(mean)),
        Estimate(var, dv),
        Estimate(centred, off),
        xhat,
        rstd,
        relative,
        kept.astype(np.float64),
        n,
    )


def affine(xhat: Estimate, x, scale, bias, features, variance: float, acc: str) -> Estimate:
    """scale * sqrt(variance) * xhat + bias."""
    scale = np.sqrt(variance) * spread(scale, x, features, 1.0)
    bias = spread(bias, x, features)
    with np.errstate(invalid="ignore"):
        y = scale * xhat.value
        slack = np.abs(scale) * xhat.slack + 4 * unit(acc) * (np.abs(y) + np.abs(bias))
    return Estimate(y + bias, slack)


def batch_norm(
    x, scale=None, bias=None, *, features=(-1,), epsilon=1e-5, variance=1.0, where=None, acc
) -> BatchNorm:
    stats, over = statistics(x, features, epsilon, where, acc), reduced_axes(x, features)
    y = affine(stats.xhat, x, scale, bias, features, variance, acc)
    mean, var = (Estimate(*(e.squeeze(over) for e in s)) for s in (stats.mean, stats.var))
    return BatchNorm(y, mean, var)


def inference(
    x, mean, var, scale=None, bias=None, *, features=(-1,), epsilon=1e-5, variance=1.0, acc
) -> Estimate:
    """With statistics that are given: a few roundings of x - mean, none of x or mean alone."""
    rstd = 1 / np.sqrt(spread(var, x, features) + epsilon)
    xhat = (real(x) - spread(mean, x, features)) * rstd
    slack = STEPS * unit(acc) * np.abs(xhat)
    return affine(Estimate(xhat, slack), x, scale, bias, features, variance, acc)


def batch_norm_vjp(
    x,
    ct_y,
    ct_mean=None,
    ct_var=None,
    scale=None,
    *,
    features=(-1,),
    epsilon=1e-5,
    variance=1.0,
    where=None,
    acc,
) -> BatchNormCotangents:
    """With w = scale * sqrt(variance) * ct_y, k = 1 for what the n of a channel count and else 0:

    dx = rstd w + k/n (ct_mean + 2 (x - mean) ct_var - rstd (sum(w) + xhat sum(w xhat))).

    The sums run over all N elements of a channel, which are all normalised, and err by
    (N + STEPS) u times their absolute sums, and with xhat. What rstd and xhat err by relatively
    enters at most three times: in both and in the sum, whichever way they are multiplied.
    """
    stats, over = statistics(x, features, epsilon, where, acc), reduced_axes(x, features)
    u, ct_y, (xhat, dxhat), rstd = unit(acc), real(ct_y), stats.xhat, stats.rstd
    ct_mean, ct_var = spread(ct_mean, x, features), spread(ct_var, x, features)
    root = np.sqrt(variance)
    w = root * spread(scale, x, features, 1.0) * ct_y
    error = (math.prod(np.shape(x)[a] for a in over) + STEPS) * u

    def total(values):
        return values.sum(over, keepdims=True)

    with np.errstate(invalid="ignore"):  # 0 / 0 in a fully masked channel
        share = stats.kept / stats.count
    plain, along = total(w), total(w * xhat)
    of_statistics = share * (ct_mean + 2 * stats.centred.value * ct_var)
    dx = rstd * (w - share * (plain + xhat * along)) + of_statistics

    along_slack = error * total(np.abs(w * xhat)) + total(np.abs(w) * dxhat)
    sums_slack = error * total(np.abs(w)) + dxhat * np.abs(along) + np.abs(xhat) * along_slack
    magnitude = rstd * (np.abs(w) + share * (np.abs(plain) + np.abs(xhat * along)))
    slack = rstd * share * sums_slack + magnitude * (stats.rstd_relative + STEPS * u)
    magnitude = np.abs(ct_mean) + 2 * np.abs(stats.centred.value * ct_var)
    slack = slack + share * (STEPS * u * magnitude + 2 * np.abs(ct_var) * stats.centred.slack)

    terms = root * ct_y * xhat
    d_scale_slack = error * total(np.abs(terms)) + total(root * np.abs(ct_y) * dxhat)
    return BatchNormCotangents(
        Estimate(dx, slack),
        Estimate(total(terms).squeeze(over), d_scale_slack.squeeze(over)),
        Estimate(total(ct_y).squeeze(over), error * total(np.abs(ct_y)).squeeze(over)),
    )
