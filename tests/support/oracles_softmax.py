"""The softmax operations in NumPy float64, and how far an implementation may be from them.

As in oracles.py, whose estimates and tolerances these are. The logarithm of a float32 weight errs
by a few units in the last place, of itself or, near 1, of 1.
"""

from typing import NamedTuple

import numpy as np
from oracles import PHI_INV, STEPS, Estimate, accumulation, info, real, ulp, unit

FLOOR = 1e-10


class Logits(NamedTuple):
    """z, with the softmax's axis last, and −inf where masked; and what made it, likewise."""

    value: np.ndarray
    slack: np.ndarray
    kept: np.ndarray
    scale: float
    mode_norms: np.ndarray | None
    syntony: np.ndarray | None
    acc: str


def logits(x, *, mode_norms=None, syntony=None, scale=1.0, axis=-1, where=None, acc) -> Logits:
    """Three products and the constants make what is added, one sum z."""
    u, scale = unit(acc), float(scale)
    x = np.moveaxis(real(x), axis, -1)
    added, slack = np.zeros_like(x), np.zeros_like(x)
    if mode_norms is not None:
        mode_norms = real(mode_norms)
        added = added - scale * PHI_INV * mode_norms
        slack = 6 * u * (np.abs(x) + np.abs(added))
    if syntony is not None:
        whole = np.moveaxis(x, -1, axis).shape
        syntony = np.moveaxis(np.broadcast_to(real(syntony), whole), axis, -1)
        log = np.log(np.maximum(syntony, FLOOR))
        added = scale * log
        slack = STEPS * u * abs(scale) * (np.abs(log) + 1) + u * (np.abs(x) + np.abs(added))
    kept = np.ones(x.shape, bool)
    if where is not None:
        kept = np.moveaxis(np.broadcast_to(where, np.moveaxis(x, -1, axis).shape), axis, -1)
    z = np.where(kept, x + added, -np.inf)
    return Logits(z, np.where(kept, slack, 0.0), kept, scale, mode_norms, syntony, acc)


class Normalised(NamedTuple):
    """Softmax and logarithm of it; a third is the softmax that the backward pass computes."""

    softmax: Estimate
    log: Estimate
    again: Estimate


def normalised(z: Logits) -> Normalised:
    """With a = z − max z: exp(a) / total, and a − log total.

    An error of the largest logit moves all of a alike, and so neither result. What moves a single
    one is the slack of z and the rounding of a. The logarithm of the total moves by at most that of
    the mean of the exponentials of these, and by (n + STEPS) u for the sum; the rest are a few
    roundings of the results. The backward pass takes exp of the logarithm.
    """
    u, n = unit(z.acc), z.value.shape[-1]
    largest = np.max(z.value, -1, keepdims=True, initial=-np.inf)
    some = np.isfinite(largest)  # of a fully masked row nothing is
    a = z.value - np.where(some, largest, 0.0)
    terms = np.exp(a)
    total = terms.sum(-1, keepdims=True)
    p = terms / np.where(some, total, 1.0)
    moved = z.slack + u * np.where(np.isfinite(a), np.abs(a), 0.0)
    log_total = np.log(np.where(some, total, 1.0))
    of_total = np.log1p((p * np.expm1(moved)).sum(-1, keepdims=True))
    of_total = of_total + (n + STEPS) * u + STEPS * u * np.abs(log_total)
    log = a - log_total
    log_slack = moved + of_total + 2 * u * np.where(np.isfinite(log), np.abs(log), 0.0)
    return Normalised(
        Estimate(p, p * (np.expm1(moved + of_total) + STEPS * u)),
        Estimate(log, np.where(np.isfinite(log), log_slack, 0.0)),
        Estimate(p, p * (np.expm1(log_slack) + STEPS * u)),
    )


def softmax_vjp(z: Logits, ct, stored) -> Estimate:
    """y (ct − Σ y ct) from the y that was stored, in its own type."""
    u, n = unit(z.acc), z.value.shape[-1]
    y, dy = normalised(z).softmax
    dy = dy + ulp(y + dy, stored) / 2 + 2 * float(info(accumulation(stored)).smallest_normal)
    if np.dtype(stored).itemsize == 2:  # rounded by way of float32 where it comes from float64
        dy = dy + unit("float32") * y + float(info(stored).smallest_normal)
    dy = np.where(z.kept, dy, 0.0)
    ct = np.where(z.kept, real(ct), 0.0)
    inner = (y * ct).sum(-1, keepdims=True)
    inner_slack = (n + STEPS) * u * np.abs(y * ct).sum(-1, keepdims=True)
    inner_slack = inner_slack + (dy * np.abs(ct)).sum(-1, keepdims=True)
    slack = dy * np.abs(ct - inner) + (y + dy) * inner_slack
    return Estimate(y * (ct - inner), slack + STEPS * u * y * (np.abs(ct) + np.abs(inner)))


def log_softmax_vjp(z: Logits, ct) -> Estimate:
    """ct − p Σ ct; nothing where masked."""
    u, n = unit(z.acc), z.value.shape[-1]
    p, dp = normalised(z).again
    ct = np.where(z.kept, real(ct), 0.0)
    total = ct.sum(-1, keepdims=True)
    slack = dp * np.abs(total) + (p + dp) * (n + STEPS) * u * np.abs(ct).sum(-1, keepdims=True)
    slack = slack + STEPS * u * (np.abs(ct) + np.abs(p * total))
    return Estimate(ct - p * total, np.where(z.kept, slack, 0.0))


def one_hot(labels, n: int) -> np.ndarray:
    return np.asarray(labels)[..., None] == np.arange(n)


def cross_entropy(z: Logits, labels) -> Estimate:
    """−log softmax at the label: NaN for no class, +inf for a masked one, 0 without any class."""
    chosen, log = one_hot(labels, z.value.shape[-1]), normalised(z).log
    loss = -np.where(chosen, log.value, 0.0).sum(-1)
    loss = np.where(chosen.any(-1), loss, np.nan)
    loss = np.where((chosen & ~z.kept).any(-1), np.inf, loss)
    loss = np.where(z.kept.any(-1), loss, 0.0) + 0.0
    return Estimate(
        loss, np.where(np.isfinite(loss), np.where(chosen, log.slack, 0.0).sum(-1), 0.0)
    )


def cross_entropy_vjp(z: Logits, labels, ct) -> Estimate:
    """ct (p − one-hot); nothing in rows whose loss is no function of the logits."""
    chosen, (p, dp) = one_hot(labels, z.value.shape[-1]), normalised(z).again
    counts = (chosen & z.kept).any(-1, keepdims=True)
    ct = np.where(counts, real(ct)[..., None], 0.0)
    slack = np.abs(ct) * (dp + STEPS * unit(z.acc) * (p + chosen))
    return Estimate(ct * (p - chosen), slack)


class Cotangents(NamedTuple):
    mode_norms: Estimate | None
    syntony: Estimate | None  # as if it had the whole shape
    scale: Estimate


def parameters_vjp(z: Logits, dz: Estimate) -> Cotangents:
    """From the cotangent of z: sums over R rows, and over all N elements, err by u times count."""
    u, s = unit(z.acc), z.scale
    value, slack = dz
    count = value.size
    if z.mode_norms is not None:
        lead = tuple(range(value.ndim - 1))
        rows = count // max(1, value.shape[-1])
        total = value.sum(lead)
        error = slack.sum(lead) + (rows + STEPS) * u * np.abs(value).sum(lead)
        along, of_scale = -s * PHI_INV, -PHI_INV * z.mode_norms
        return Cotangents(
            Estimate(along * total, abs(along) * (error + 6 * u * np.abs(total))),
            None,
            Estimate(
                np.sum(of_scale * total),
                np.sum(np.abs(of_scale) * (error + (total.size + STEPS) * u * np.abs(total))),
            ),
        )
    if z.syntony is None:
        zero = np.zeros(())
        return Cotangents(None, None, Estimate(zero, zero))
    weights = np.maximum(z.syntony, FLOOR)
    slope = np.where(z.syntony > FLOOR, s / weights, 0.0)
    log = np.log(weights)
    terms = np.abs(value) * STEPS * u * (np.abs(log) + 1) + slack * np.abs(log)
    return Cotangents(
        None,
        Estimate(slope * value, np.abs(slope) * (slack + STEPS * u * np.abs(value))),
        Estimate(
            np.sum(value * log), np.sum(terms) + (count + STEPS) * u * np.sum(np.abs(value * log))
        ),
    )
