"""The three ways of adding a residual."""

from __future__ import annotations

import enum
from typing import Any

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
