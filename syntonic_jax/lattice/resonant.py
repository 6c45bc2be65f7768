"""A tensor with two states: exact numbers of the lattice, and the floats they may turn into."""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .. import _check
from ..constants import PHI_INV
from ..modes import PhiResidualMode
from ..ops._numerics import widen
from .golden_array import GoldenArray, where


class ResonantPhase(enum.StrEnum):
    """Which of its two states a `ResonantTensor` is in.

    >>> ResonantPhase.CRYSTALLIZED == "crystallized"
    True
    """

    CRYSTALLIZED = "crystallized"
    FLUX = "flux"

    def __repr__(self) -> str:
        return f"ResonantPhase({self.value!r})"


@final  # the operations know it by its type
@jax.tree_util.register_pytree_with_keys_class
class ResonantTensor:
    """An exact tensor over Z[φ] that can be let loose as floats, and snapped back to the lattice.

    ============ =================================== =============================================
    phase        what it holds                       what it allows
    ============ =================================== =============================================
    crystallized `lattice`, exact                    phi residuals, `to_floats`, `flux`
    flux         `values`, floats; and the `lattice` `with_values`, `to_floats`, `crystallize`
                 that they came from
    ============ =================================== =============================================

    A pytree; nothing is changed in place. `phi_residual` and `phi_residual_relu` take two
    crystallized tensors in place of arrays and stay exact, in every mode.

    Args:
      lattice: the exact numbers, a `GoldenArray`.
      precision: bound of the coefficients that `crystallize` gives, an integer from 1 to 2²⁰. Sums
        may have larger ones: they are exact, and not moved.

    Attributes:
      lattice: the exact numbers, in the phase flux those that were left.
      values: the floats of the phase flux; None in the other.
      precision: as given.
      phase: a `ResonantPhase`.

    Raises (when built):
      TypeError: `lattice` is no `GoldenArray`, or `precision` no integer.
      ValueError: `precision` is out of range.

    The two states and their names are the original's.

    >>> x = ResonantTensor.ones([2, 3], precision=100)
    >>> x.shape, x.phase
    ((2, 3), ResonantPhase('crystallized'))
    >>> loose = x.flux()
    >>> loose.with_values(loose.values * 0.3).crystallize().lattice[0, 0]
    GoldenArray(a=99, b=-61)
    """

    __slots__ = ("lattice", "precision", "values")

    lattice: GoldenArray
    values: Any
    precision: int

    def __init__(self, lattice: GoldenArray, precision: int = 100):
        if not isinstance(lattice, GoldenArray):
            raise TypeError(
                f"ResonantTensor: lattice must be a GoldenArray, got {type(lattice).__name__}; "
                "ResonantTensor.from_floats converts floats"
            )
        self.lattice, self.values = lattice, None
        self.precision = _check.precision("ResonantTensor", precision)

    def tree_flatten_with_keys(self):
        """For jax."""
        key = jax.tree_util.GetAttrKey
        children = ((key("lattice"), self.lattice), (key("values"), self.values))
        return children, self.precision

    def tree_flatten(self):
        """For jax."""
        return (self.lattice, self.values), self.precision

    @classmethod
    def tree_unflatten(cls, precision, children) -> ResonantTensor:
        """For jax, which also puts other things than arrays into its trees."""
        tensor = object.__new__(cls)
        tensor.lattice, tensor.values = children
        tensor.precision = precision
        return tensor

    @classmethod
    def ones(cls, shape: int | Sequence[int], precision: int = 100) -> ResonantTensor:
        """A crystallized tensor of ones."""
        return _filled("ones", shape, 1, precision)

    @classmethod
    def zeros(cls, shape: int | Sequence[int], precision: int = 100) -> ResonantTensor:
        """A crystallized tensor of zeros."""
        return _filled("zeros", shape, 0, precision)

    @classmethod
    def from_floats(cls, x: ArrayLike, precision: int = 100) -> ResonantTensor:
        """The crystallized tensor nearest to the floats `x`; those that are not finite become 0.

        Raises:
          TypeError: `x` is not real floating point, or `precision` not an integer.
          ValueError: `precision` is out of range.
        """
        name = "ResonantTensor.from_floats"
        precision = _check.precision(name, precision)
        _check.floating(name, x=x)
        return cls(GoldenArray.from_float(x, precision), precision)

    @property
    def phase(self) -> ResonantPhase:
        """Whether it is crystallized or in flux."""
        return ResonantPhase.CRYSTALLIZED if self.values is None else ResonantPhase.FLUX

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the lattice and the values alike."""
        return self.lattice.shape

    def flux(self, dtype: DTypeLike = jnp.float32) -> ResonantTensor:
        """The tensor in flux: its numbers in a floating type, each rounded once.

        Raises:
          TypeError: `dtype` is not real floating point.
          ValueError: it is in flux already.
        """
        self._require("flux", ResonantPhase.CRYSTALLIZED)
        dtype = _check.result_dtype("ResonantTensor.flux", dtype, jnp.float32)
        return _resonant(self.lattice, self._values_as(dtype), self.precision)

    def with_values(self, values: ArrayLike) -> ResonantTensor:
        """The tensor in flux with other floats.

        Raises:
          TypeError: `values` are not real floating point.
          ValueError: it is crystallized, or the shape differs.
        """
        name = "ResonantTensor.with_values"
        self._require("with_values", ResonantPhase.FLUX)
        _check.floating(name, values=values)
        if jnp.shape(values) != self.shape:
            raise ValueError(
                f"{name}: values must have the shape {self.shape}, got {jnp.shape(values)}"
            )
        return _resonant(self.lattice, jnp.asarray(values), self.precision)

    def crystallize(self) -> ResonantTensor:
        """The crystallized tensor nearest to the values in flux.

        Raises:
          ValueError: it is crystallized already.
        """
        self._require("crystallize", ResonantPhase.FLUX)
        return ResonantTensor.from_floats(self.values, self.precision)

    def to_floats(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """The numbers of either phase in a floating type; exact ones are rounded once.

        Raises:
          TypeError: `dtype` is not real floating point.
        """
        dtype = _check.result_dtype("ResonantTensor.to_floats", dtype, jnp.float32)
        return self._values_as(dtype)

    def _values_as(self, dtype: Any) -> jax.Array:
        """`to_floats` for a type that was checked."""
        return self.lattice.to_float(dtype) if self.values is None else self.values.astype(dtype)

    def __repr__(self) -> str:
        return f"ResonantTensor(shape={self.shape}, precision={self.precision}, {self.phase})"

    def _require(self, action: str, phase: ResonantPhase) -> None:
        require_phase(f"ResonantTensor.{action}", "the tensor", self, phase)


def require_phase(function: str, name: str, x: ResonantTensor, phase: ResonantPhase) -> None:
    """Raises ValueError in the other phase."""
    if x.phase is not phase:
        raise ValueError(f"{function}: {name} must be in the phase {phase.value}, got {x.phase}")


def _filled(name, shape, number, precision) -> ResonantTensor:
    name = f"ResonantTensor.{name}"
    precision = _check.precision(name, precision)
    numbers = jnp.full(shape, number, jnp.asarray(0).dtype)
    return ResonantTensor(GoldenArray(numbers, jnp.zeros_like(numbers)), precision)


def _resonant(lattice, values, precision) -> ResonantTensor:
    return ResonantTensor.tree_unflatten(precision, (lattice, values))


def exact_phi_residual(
    function: str,
    identity: Any,
    residual: Any,
    mode: PhiResidualMode,
    activation: str | None,
    dtype: Any,
    implementation: str | None,
) -> ResonantTensor:
    """The phi residual of two crystallized tensors, exact: (a + bφ) / φ = (b − a) + aφ.

    The larger of two precisions is that of the result. For the public functions, which take
    either kind of operands.
    """
    for name, x in (("identity", identity), ("residual", residual)):
        if not isinstance(x, ResonantTensor):
            raise TypeError(
                f"{function}: {name} must be a ResonantTensor as the other operand is, got "
                f"{type(x).__name__}; ResonantTensor.from_floats or .to_floats converts"
            )
        require_phase(function, name, x, ResonantPhase.CRYSTALLIZED)
    if identity.shape != residual.shape:
        raise ValueError(
            f"{function}: identity and residual must have the same shape, "
            f"got {identity.shape} and {residual.shape}"
        )
    if activation not in (None, "relu"):
        raise ValueError(
            f"{function}: activation of a ResonantTensor must be None or 'relu', which are exact, "
            f"got {activation!r}"
        )
    if dtype is not None:
        raise ValueError(f"{function}: dtype must be None for a ResonantTensor, got {dtype}")
    if implementation == "cuda":
        raise ValueError(
            f"{function}: implementation must be None or 'xla' for a ResonantTensor, got 'cuda'"
        )
    x, r = identity.lattice, residual.lattice
    z = x + (r.div_phi() if mode is PhiResidualMode.PHI else r)
    if mode is PhiResidualMode.PHI_SYMMETRIC:
        z = z.div_phi()
    if activation == "relu":
        z = where(z.sign() > 0, z, GoldenArray(jnp.zeros_like(z.a), jnp.zeros_like(z.b)))
    return ResonantTensor(z, max(identity.precision, residual.precision))


def syntony(x: ArrayLike, mode_norms: ArrayLike) -> jax.Array:
    """How much of an array lies in modes of small norm: Σ w|x|² / Σ|x|², w = exp(−|n|²/φ).

    Args:
      x: array of any shape; float16, bfloat16, float32 or float64.
      mode_norms: |n|² ≥ 0 of each mode, of a shape that broadcasts to that of `x`; floating point.

    Returns:
      A scalar from 0 to 1, summed and returned in the accumulation type of `x`: float32 (float64
      for float64). 0 where `x` is all zeros. Nothing overflows: x is divided by its largest
      element first.

    Raises:
      TypeError: an argument is not real floating point.
      ValueError: `mode_norms` does not broadcast to the shape of `x`.

    >>> import jax.numpy as jnp
    >>> round(float(syntony(jnp.array([3.0, 4.0]), jnp.array([0.0, 1.0]))), 4)
    0.705
    """
    _check.floating("syntony", x=x, mode_norms=mode_norms)
    shape, own = jnp.shape(x), jnp.shape(mode_norms)
    if len(own) > len(shape) or any(n not in (1, m) for n, m in zip(own[::-1], shape[::-1])):
        raise ValueError(f"syntony: mode_norms must broadcast to the shape {shape}, got {own}")
    return _syntony(x, mode_norms)


@functools.partial(jax.jit, inline=True)
def _syntony(x, mode_norms):
    x = widen(jnp.asarray(x))
    weights = jnp.exp(-PHI_INV * jnp.asarray(mode_norms).astype(x.dtype))
    weights = weights.reshape((1,) * (x.ndim - weights.ndim) + weights.shape)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), initial=0))
    zero = largest == 0
    squares = jnp.square(x / jnp.where(zero, 1, largest))
    total = squares.sum()
    return (weights * squares).sum() / jnp.where(zero, 1, total)
