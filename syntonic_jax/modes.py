"""How a residual is added, and what variance a normalisation aims at."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from . import _number
from .constants import PHI_INV


class PhiResidualMode(enum.StrEnum):
    """How a residual is added to the identity branch.

    ================= =======================================
    mode              sum z
    ================= =======================================
    ``phi``           identity + φ⁻¹ · residual
    ``phi_symmetric`` φ⁻¹ · (identity + residual)
    ``standard``      identity + residual
    ================= =======================================

    Members equal their strings and are built from them.

    >>> PhiResidualMode("phi")
    PhiResidualMode('phi')
    >>> PhiResidualMode.PHI_SYMMETRIC == "phi_symmetric"
    True
    """

    PHI = "phi"
    PHI_SYMMETRIC = "phi_symmetric"
    STANDARD = "standard"

    def __repr__(self) -> str:
        return f"PhiResidualMode({self.value!r})"

    @property
    def sum_scale(self) -> float:
        """s of z = s · (identity + c · residual)."""
        return PHI_INV if self is PhiResidualMode.PHI_SYMMETRIC else 1.0

    @property
    def residual_scale(self) -> float:
        """c of z = s · (identity + c · residual)."""
        return PHI_INV if self is PhiResidualMode.PHI else 1.0


_MODES = {mode.value: mode for mode in PhiResidualMode}  # members equal their strings


def check_mode(function: str, mode: Any) -> PhiResidualMode:
    """The mode named by `mode`; raises ValueError naming the modes there are."""
    try:
        return _MODES[mode]  # a third of the time of PhiResidualMode(mode)
    except (KeyError, TypeError):
        names = ", ".join(repr(m.value) for m in PhiResidualMode)
        raise ValueError(f"{function}: mode must be one of {names}, got {mode!r}") from None


@dataclass(frozen=True, init=False, repr=False)
class GoldenNormMode:
    """The target variance of a golden normalisation, by name or as a number.

    ``GoldenNormMode('golden')`` is φ⁻¹, ``GoldenNormMode('standard')`` is 1 and
    ``GoldenNormMode.custom(t)`` is t. All functions that take a ``target_variance`` take it, its
    name or the number.

    Attributes:
      target_variance: t, a positive float.
      scale_factor: √t, by which normalised values are multiplied.

    Raises (when built):
      ValueError: an unknown name, or a custom variance that is not a positive finite number.

    >>> GoldenNormMode("golden").target_variance
    0.6180339887498949
    >>> GoldenNormMode.custom(4.0).scale_factor
    2.0
    """

    target_variance: float
    VARIANCES: ClassVar[dict[str, float]] = {"golden": PHI_INV, "standard": 1.0}

    def __init__(self, name: str):
        if not isinstance(name, str) or name not in self.VARIANCES:
            raise ValueError(
                f"GoldenNormMode: name must be 'golden' or 'standard', got {name!r}; "
                "GoldenNormMode.custom(t) takes a number"
            )
        object.__setattr__(self, "target_variance", self.VARIANCES[name])

    @classmethod
    def custom(cls, target_variance: float) -> GoldenNormMode:
        """The mode that aims at this variance."""
        variance = _number.positive(target_variance)
        if variance is None:
            raise ValueError(
                "GoldenNormMode.custom: target_variance must be a positive Python number, "
                f"got {target_variance!r}"
            )
        mode = object.__new__(cls)
        object.__setattr__(mode, "target_variance", variance)
        return mode

    def __repr__(self) -> str:
        for name, variance in self.VARIANCES.items():
            if variance == self.target_variance:
                return f"GoldenNormMode({name!r})"
        return f"GoldenNormMode.custom({self.target_variance!r})"

    @property
    def scale_factor(self) -> float:
        """√t."""
        return math.sqrt(self.target_variance)
