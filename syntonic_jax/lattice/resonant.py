"""A tensor with two states: exact numbers of the lattice, and the floats they may turn into."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import Any, final

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from .. import _check, _number, _public
from .._numerics import widen
from ..constants import PHI_INV
from ..modes import PhiResidualMode
from . import _arguments as arguments
from . import _fixed_point
from . import _order as order
from . import _serialization as serialization
from ._crystallize import straight_through
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
@serialization.serializable
@jax.tree_util.register_pytree_with_keys_class
class ResonantTensor:
    """An exact tensor over Z[φ] that can be let loose as floats, and snapped back to the lattice.

    ============ =================================== =============================================
    phase        what it holds                       what it allows
    ============ =================================== =============================================
    crystallized `lattice`, exact                    phi residuals, `to_floats`, `flux`
    flux         `values`, floats                    `with_values`, `to_floats`, `crystallize`
    ============ =================================== =============================================

    A pytree; nothing is changed in place. `phi_residual` and `phi_residual_relu` take two
    crystallized tensors in place of arrays and stay exact, in every mode.

    In flux its only leaf is `values`: it may be a parameter, of `jax.grad`, optax, Orbax and
    flax.serialization (where Flax was imported before the tensor was made). Crystallized, its
    leaves are the two arrays of integers, which have no derivative.

    The derivative of `crystallize` and `from_floats` is straight-through, as that of the function
    `crystallize`, and goes on through phi residuals, `to_floats` and `flux`. A crystallized tensor
    carries it beside its integers as long as it stays in the trace that made it. It is lost, and
    then zero, where a tensor becomes its leaves and is built again: as an argument or result of a
    function under `jax.jit`, `jax.vmap`, `jax.checkpoint` or `jax.shard_map`, in the carry of
    `jax.lax.scan`, in `jax.tree.map` and `jax.lax.stop_gradient`, and in `lattice`. Let floats or a
    tensor in flux cross there. What a side effect keeps beyond its trace has to lose it.

    Args:
      lattice: the exact numbers, a `GoldenArray`.
      precision: bound of the coefficients that `crystallize` gives, an integer from 1 to 2²⁰. Sums
        may have larger ones: they are exact, and not moved.

    Attributes:
      lattice: the exact numbers; None in the phase flux.
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

    __slots__ = ("_source", "lattice", "phase", "precision", "values")

    lattice: Any
    values: Any
    precision: int
    phase: ResonantPhase
    _source: Any  # a traced array whose tangent is that of a crystallized tensor, or None

    def __init__(self, lattice: GoldenArray, precision: int = 100):
        if not isinstance(lattice, GoldenArray):
            raise TypeError(
                f"ResonantTensor: lattice must be a GoldenArray, got {type(lattice).__name__}; "
                "ResonantTensor.from_floats converts floats"
            )
        self._set(lattice, None, _check.precision("ResonantTensor", precision))

    def _set(self, lattice, values, precision, phase=ResonantPhase.CRYSTALLIZED, source=None):
        serialization.announce()
        self.lattice, self.values, self.precision = lattice, values, precision
        self.phase, self._source = phase, source

    def tree_flatten_with_keys(self):
        """For jax."""
        (child,), static = self.tree_flatten()
        return ((jax.tree_util.GetAttrKey(_LEAF[self.phase]), child),), static

    def tree_flatten(self):
        """For jax."""
        return (getattr(self, _LEAF[self.phase]),), (self.precision, self.phase)

    @classmethod
    def tree_unflatten(cls, static, children) -> ResonantTensor:
        """For jax, which also puts other things than arrays into its trees."""
        precision, phase = static
        tensor = object.__new__(cls)
        leaf = {"lattice": None, "values": None, _LEAF[phase]: children[0]}
        tensor._set(**leaf, precision=precision, phase=phase)
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

        The derivative is straight-through.

        Raises:
          TypeError: `x` is not real floating point, or `precision` not an integer.
          ValueError: `precision` is out of range.
        """
        name = "ResonantTensor.from_floats"
        precision = _check.precision(name, precision)
        _check.floating(name, x=x)
        x = jnp.asarray(x)
        return _crystallized(GoldenArray.from_float(x, precision), precision, x)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the lattice or the values."""
        return getattr(self, _LEAF[self.phase]).shape

    def flux(self, dtype: DTypeLike = jnp.float32) -> ResonantTensor:
        """The tensor in flux: its numbers in a floating type, each rounded once.

        Args:
          dtype: float16, bfloat16, float32 or float64.

        Raises:
          TypeError: `dtype` is not real floating point.
          ValueError: it is in flux already.
        """
        self._require("flux", ResonantPhase.CRYSTALLIZED)
        dtype = _check.result_dtype("ResonantTensor.flux", dtype, jnp.float32)
        return _in_flux(self._values_as(dtype), self.precision)

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
        return _in_flux(jnp.asarray(values), self.precision)

    def crystallize(self) -> ResonantTensor:
        """The crystallized tensor nearest to the values in flux; straight-through derivative.

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
        if self.phase is ResonantPhase.FLUX:
            return self.values.astype(dtype)
        floats = self.lattice.to_float(dtype)
        return floats if self._source is None else straight_through(floats, self._source)

    def __repr__(self) -> str:
        held = getattr(self, _LEAF[self.phase])
        shape = getattr(held, "shape", None)  # jax also puts other things than arrays into it
        what = f"{_LEAF[self.phase]}={held!r}" if shape is None else f"shape={shape}"
        return f"ResonantTensor({what}, precision={self.precision}, {self.phase})"

    def _require(self, action: str, phase: ResonantPhase) -> None:
        require_phase(f"ResonantTensor.{action}", "the tensor", self, phase)


_LEAF = {ResonantPhase.CRYSTALLIZED: "lattice", ResonantPhase.FLUX: "values"}


def require_phase(function: str, name: str, x: ResonantTensor, phase: ResonantPhase) -> None:
    """Raises ValueError in the other phase."""
    if x.phase is not phase:
        raise ValueError(f"{function}: {name} must be in the phase {phase.value}, got {x.phase}")


def _filled(name, shape, number, precision) -> ResonantTensor:
    name = f"ResonantTensor.{name}"
    precision = _check.precision(name, precision)
    dtype = jnp.asarray(0).dtype
    sizes = [_number.integer(n) or 0 for n in np.ravel(np.asarray(shape, object))]
    if math.prod(sizes) >= 2**63:  # of which XLA ends the process
        raise ValueError(f"{name}: shape does not fit: {shape} has more than 2**63 elements")
    numbers = arguments.shaped(name, "shape", lambda s: jnp.full(s, number, dtype), shape)
    return ResonantTensor(GoldenArray(numbers, jnp.zeros_like(numbers)), precision)


def _in_flux(values: Any, precision: int) -> ResonantTensor:
    return ResonantTensor.tree_unflatten((precision, ResonantPhase.FLUX), (values,))


def _crystallized(lattice: GoldenArray, precision: int, source: Any) -> ResonantTensor:
    """Without a trace there is no derivative, and `source` need not be kept."""
    tensor = ResonantTensor(lattice, precision)
    tensor._source = source if isinstance(source, jax.core.Tracer) else None
    return tensor


def _source(x: ResonantTensor, r: ResonantTensor, mode: PhiResidualMode) -> Any:
    """Of the sum of two tensors, with the derivative of the exact one in the accumulation type."""
    s, c = mode.sum_scale, mode.residual_scale
    terms = [
        factor * widen(tensor._source)
        for tensor, factor in ((x, s), (r, s * c))
        if tensor._source is not None
    ]
    if len(terms) < 2:
        return terms[0] if terms else None
    dtype = order.wider(*(term.dtype for term in terms))
    return terms[0].astype(dtype) + terms[1].astype(dtype)


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
    source = _source(identity, residual, mode)
    if activation == "relu":
        positive = z.sign() > 0
        z = where(positive, z, GoldenArray(jnp.zeros_like(z.a), jnp.zeros_like(z.b)))
        source = None if source is None else jnp.where(positive, source, 0)
    return _crystallized(z, max(identity.precision, residual.precision), source)


def syntony(x: ArrayLike, mode_norms: ArrayLike) -> jax.Array:
    """How much of an array lies in modes of small norm: Σ w|x|² / Σ|x|², w = exp(−|n|²/φ).

    Args:
      x: array of any shape; float16, bfloat16, float32 or float64.
      mode_norms: |n|² ≥ 0 of each mode, of a shape that broadcasts to that of `x`; floating point.

    Returns:
      A scalar from 0 to 1, summed and returned in the accumulation type of `x`: float32 (float64
      for float64). 0 where `x` is all zeros. Nothing overflows, and nothing that counts
      underflows: x, and x by the roots of the weights, are scaled by powers of two.

    Raises:
      TypeError: an argument is not real floating point.
      ValueError: `mode_norms` does not broadcast to the shape of `x`.

    >>> import jax.numpy as jnp
    >>> round(float(syntony(jnp.array([3.0, 4.0]), jnp.array([0.0, 1.0]))), 4)
    0.705
    """
    return _syntony(x, mode_norms)


@_public.jit(function="syntony")
def _syntony(x, mode_norms):
    _check.floating("syntony", x=x, mode_norms=mode_norms)
    _check.broadcasts("syntony", jnp.shape(x), "x", mode_norms=mode_norms)
    x = widen(jnp.asarray(x))
    roots = jnp.exp(-PHI_INV / 2 * jnp.asarray(mode_norms).astype(x.dtype))
    roots = roots.reshape((1,) * (x.ndim - roots.ndim) + roots.shape)
    x, _ = _over_largest(x)
    # Once more: many small modes outweigh a large one whose weight is 0, though each of their
    # squares may be below the range.
    weighted, size = _over_largest(roots * x)
    total = jnp.square(x).sum()
    ratio = jnp.square(weighted).sum() / jnp.where(total == 0, 1, total)
    return size * ratio * size


def _over_largest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x over a power of two that is about the largest of |x|, and that power, which is held.

    XLA may divide by one number as it multiplies by its inverse, which would be flushed next to the
    largest number there is. The inverses of these powers are normal.
    """
    _, exponent = jnp.frexp(jax.lax.stop_gradient(jnp.max(jnp.abs(x), initial=0)))
    least = jnp.finfo(x.dtype).minexp
    exponent = jnp.clip(exponent, least, -least)
    return x * _fixed_point.power_of_two(-exponent, x.dtype), _fixed_point.power_of_two(
        exponent, x.dtype
    )
