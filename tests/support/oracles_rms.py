"""The RMS norm in float64, with what each result may be off by: oracles.py says how."""

from typing import NamedTuple

import numpy as np
from oracles import MODES, STEPS, Estimate, real, unit


class Rows(NamedTuple):
    xhat: np.ndarray
    slack: np.ndarray
    rstd: np.ndarray
    relative: float  # error of rstd, and of xhat beside it


def _rows(z, epsilon, acc: str) -> Rows:
    """z / sqrt(mean(z**2) + epsilon); epsilon may be one number a row.

    A sum of n squares errs relatively by (n + STEPS) u, all being positive; its root by half of it,
    and a few roundings.
    """
    z, u = real(z), unit(acc)
    rstd = 1 / np.sqrt(np.mean(z**2, -1, keepdims=True) + epsilon)
    relative = (z.shape[-1] + STEPS) * u / 2 + STEPS * u
    xhat = z * rstd
    return Rows(xhat, np.abs(xhat) * relative, rstd, relative)


def _factor(scale, offset, variance):
    return np.sqrt(variance) * (1.0 if scale is None else offset + real(scale))


def rms_norm(z, scale=None, *, offset=0.0, epsilon=1e-6, variance=1.0, acc) -> Estimate:
    """(offset + scale) * sqrt(variance) * xhat of a stored z."""
    rows, factor = _rows(z, epsilon, acc), _factor(scale, offset, variance)
    y = factor * rows.xhat
    return Estimate(y, np.abs(factor) * rows.slack + 4 * unit(acc) * np.abs(y))


def rms_norm_vjp(
    z, ct_y, ct_z=None, scale=None, *, mode="standard", offset=0.0, epsilon=1e-6, variance=1.0, acc
) -> dict[str, Estimate]:
    """Cotangents from the stored z, by name; that of scale is a sum over all rows.

    With w = (offset + scale) * sqrt(variance) * ct_y: dz = rstd * (w - xhat * mean(w xhat)) + ct_z.
    The mean errs by (n + STEPS) u times its absolute sum, and with xhat; the sum over R rows by
    (R + STEPS) u times its own.
    """
    s, c = MODES[mode]
    rows, ct_y, u = _rows(z, epsilon, acc), real(ct_y), unit(acc)
    ct_z = np.zeros_like(ct_y) if ct_z is None else real(ct_z)
    w = _factor(scale, offset, variance) * ct_y
    n, lead = w.shape[-1], tuple(range(w.ndim - 1))

    def mean(x):
        return np.mean(x, -1, keepdims=True)

    inner = mean(w * rows.xhat)
    own = rows.rstd * (w - rows.xhat * inner)
    inner_slack = (n + STEPS) * u * mean(np.abs(w * rows.xhat)) + mean(np.abs(w) * rows.slack)
    slack = rows.rstd * (
        STEPS * u * np.abs(w) + rows.slack * np.abs(inner) + np.abs(rows.xhat) * inner_slack
    )
    slack = slack + np.abs(own) * rows.relative + STEPS * u * (np.abs(ct_z) + np.abs(own + ct_z))
    terms = np.sqrt(variance) * ct_y * rows.xhat
    total = (int(np.prod(w.shape[:-1])) + STEPS) * u
    return {
        "identity": Estimate(s * (own + ct_z), s * slack),
        "residual": Estimate(s * c * (own + ct_z), s * c * slack),
        "scale": Estimate(
            terms.sum(lead),
            total * np.abs(terms).sum(lead)
            + (np.sqrt(variance) * np.abs(ct_y) * rows.slack).sum(lead),
        ),
    }
