"""Arrays over Z[φ]: pairs of integer arrays with the arithmetic of a + bφ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from .. import _check, _dispatch, _number
from . import _arguments as arguments
from . import _formulas as formulas
from . import _operators as operators
from . import _order as order
from . import _serialization as serialization
from ._crystallize import coefficients
from ._overflow import checked


@serialization.serializable
@jax.tree_util.register_pytree_with_keys_class
class GoldenArray:
    """An array of numbers a + bφ with integers a and b, in exact arithmetic.

    A pytree of two integer arrays, so that every transformation of jax takes it. Operators are
    those of the ring Z[φ] and broadcast as in NumPy; the other operand may be an integer or an
    array of integers, never floats: `from_float` converts those. Comparisons compare the numbers,
    exactly, and give arrays of booleans.

    Results wrap around beyond the type of the coefficients, as integers do. Under
    ``jax.experimental.checkify.checkify(f, errors=checkify.user_checks)`` that is an error instead.
    docs/exact-arithmetic.md has the safe range of each operation. Operands never wrap: an integer
    that the coefficients beside it cannot hold is a ValueError, and in a comparison it is compared.

    Args:
      a: integer array of any shape: int32, or int64 with x64; a Python integer is a scalar.
      b: the same shape and type.

    Attributes:
      a: the coefficient of 1.
      b: the coefficient of φ.

    Raises (when built):
      TypeError: a coefficient is not an array of int32 or int64, or their types differ.
      ValueError: their shapes differ, or a number does not fit the type.

    The ring is that of the original's `GoldenExact`.

    >>> import jax.numpy as jnp
    >>> phi = GoldenArray(0, 1)
    >>> phi * phi == phi + 1
    Array(True, dtype=bool)
    >>> x = GoldenArray(jnp.array([3, -5]), jnp.array([1, 3]))
    >>> x.to_float()
    Array([ 4.618034  , -0.14589803], dtype=float32)
    >>> x.sign()
    Array([ 1, -1], dtype=int32)
    >>> x.div_phi().mul_phi() == x
    Array([ True,  True], dtype=bool)
    """

    __slots__ = ("a", "b")
    __array_ufunc__ = None  # NumPy's operators leave the operation to those here
    __hash__ = None  # type: ignore[assignment]  # == compares elements

    a: Any
    b: Any

    def __init__(self, a: ArrayLike, b: ArrayLike):
        name = "GoldenArray"
        one, phi = arguments.integers(name, "a", a), arguments.integers(name, "b", b)
        _check.same_shape(name, a=one, b=phi)
        strong = [x.dtype for x in (one, phi) if not isinstance(x, int) and not x.weak_type]
        if len(set(strong)) > 1:
            raise TypeError(
                f"{name}: a and b must have the same integer type, got {strong[0]} and {strong[1]}"
            )
        serialization.announce()
        dtype = jnp.result_type(one, phi)
        self.a = arguments.as_dtype(name, "a", one, dtype)
        self.b = arguments.as_dtype(name, "b", phi, dtype)

    def tree_flatten_with_keys(self):
        """For jax."""
        key = jax.tree_util.GetAttrKey
        return ((key("a"), self.a), (key("b"), self.b)), None

    def tree_flatten(self):
        """For jax."""
        return (self.a, self.b), None

    @classmethod
    def tree_unflatten(cls, _, children) -> GoldenArray:
        """For jax, which also puts other things than arrays into its trees."""
        serialization.announce()
        array = object.__new__(cls)
        array.a, array.b = children
        return array

    # --- from and to other numbers ----------------------------------------------------------------

    @classmethod
    def from_float(
        cls, x: ArrayLike, precision: int = 100, *, implementation: str | None = None
    ) -> GoldenArray:
        """The nearest numbers with |a|, |b| ≤ precision: `crystallize`, but for the integers.

        Args:
          x: array of any shape; float16, bfloat16, float32 or float64. Non-finite elements give 0.
          precision: bound of the coefficients, a Python integer from 1 to 2²⁰.
          implementation: None, 'cuda' or 'xla' (docs/implementation.md).

        Raises:
          TypeError: `x` is not real floating point, or `precision` not an integer.
          ValueError: `precision` is out of range, or `implementation` unknown.

        >>> GoldenArray.from_float(0.382, precision=2)
        GoldenArray(a=2, b=-1)
        """
        name = "GoldenArray.from_float"
        precision = _check.precision(name, precision)
        _dispatch.check_implementation(name, implementation)
        a, b = coefficients(name, x, precision, implementation)
        dtype = jnp.asarray(0).dtype
        return _golden(a.astype(dtype), b.astype(dtype))

    @classmethod
    def from_int(cls, x: ArrayLike) -> GoldenArray:
        """The integers `x` as elements of Z[φ].

        >>> GoldenArray.from_int(3) * GoldenArray(0, 2)
        GoldenArray(a=0, b=6)
        """
        a = jnp.asarray(arguments.integers("GoldenArray.from_int", "x", x))
        return cls(a, jnp.zeros_like(a))

    def to_float(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """The numbers in a floating type, each rounded once from its exact value.

        Args:
          dtype: float16, bfloat16, float32 or float64.

        Raises:
          TypeError: `dtype` is not real floating point.
        """
        dtype = _check.result_dtype("GoldenArray.to_float", dtype, jnp.float32)
        return order.to_float(self.a, self.b, dtype)

    # --- shape ------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Of either coefficient."""
        return self.a.shape

    @property
    def ndim(self) -> int:
        """How many axes there are."""
        return self.a.ndim

    @property
    def size(self) -> int:
        """How many elements there are."""
        return self.a.size

    @property
    def dtype(self) -> np.dtype:
        """Of either coefficient."""
        return self.a.dtype

    @property
    def T(self) -> GoldenArray:
        """All axes in reverse."""
        return self.transpose()

    def __len__(self) -> int:
        return len(self.a)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> GoldenArray:
        return _golden(self.a[index], self.b[index])

    def reshape(self, *shape: Any) -> GoldenArray:
        """As of an array.

        Raises:
          TypeError: `shape` is not of integers.
          ValueError: it has another number of elements.
        """
        name = "GoldenArray.reshape"
        return self._mapped(lambda x: arguments.shaped(name, "shape", x.reshape, *shape))

    def transpose(self, *axes: Any) -> GoldenArray:
        """As of an array.

        Raises:
          TypeError: an axis is not an integer.
          ValueError: the axes are not all those that there are.
        """
        given: Any = axes if len(axes) > 1 else axes[0] if axes else None
        permutation = arguments.axes("GoldenArray.transpose", given, self.ndim)
        if permutation is not None and len(permutation) != self.ndim:
            raise ValueError(
                f"GoldenArray.transpose: axes must name each of {self.ndim} axes, got {given!r}"
            )
        return self._mapped(lambda x: x.transpose(permutation))

    def _mapped(self, f: Callable[[Any], Any]) -> GoldenArray:
        return _golden(f(self.a), f(self.b))

    def __repr__(self) -> str:
        return f"GoldenArray(a={self.a}, b={self.b})"

    # --- the ring ---------------------------------------------------------------------------------

    def __add__(self, other: Any) -> GoldenArray:
        return _golden(*operators.ring("+", formulas.add, self, other))

    def __sub__(self, other: Any) -> GoldenArray:
        return _golden(*operators.ring("-", formulas.subtract, self, other))

    def __mul__(self, other: Any) -> GoldenArray:
        return _golden(*operators.ring("*", formulas.multiply, self, other))

    def __matmul__(self, other: Any) -> GoldenArray:
        return _golden(*operators.ring("@", formulas.matmul, self, other))

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Any) -> GoldenArray:
        return _golden(*operators.operand("-", other, self)) - self

    def __rmatmul__(self, other: Any) -> GoldenArray:
        return _golden(*operators.operand("@", other, self)) @ self

    def __neg__(self) -> GoldenArray:
        return _golden(*checked("-", formulas.negate, self.a, self.b))

    def __pos__(self) -> GoldenArray:
        return self

    def mul_phi(self) -> GoldenArray:
        """φ (a + bφ) = b + (a + b) φ."""
        return _golden(*checked("mul_phi", formulas.mul_phi, self.a, self.b))

    def div_phi(self) -> GoldenArray:
        """(a + bφ) / φ = (b − a) + aφ."""
        return _golden(*checked("div_phi", formulas.div_phi, self.a, self.b))

    def phi_power(self, n: int) -> GoldenArray:
        """φⁿ (a + bφ) for a Python integer n of either sign: φⁿ = F(n−1) + F(n) φ.

        Raises:
          TypeError: `n` is not an integer.
          ValueError: a Fibonacci number does not fit the type: n must lie in −45..46 for int32 and
            in −91..92 for int64.

        >>> GoldenArray(1, 0).phi_power(10)
        GoldenArray(a=34, b=55)
        """
        name = "GoldenArray.phi_power"
        number = _number.integer(n)
        if number is None:
            raise TypeError(f"{name}: n must be a Python integer, got {type(n).__name__}")
        most = 46 if self.dtype.itemsize == 4 else 92
        if not 1 - most <= number <= most:
            raise ValueError(
                f"{name}: n must lie between {1 - most} and {most} for {self.dtype}, got {n}"
            )
        power = formulas.power_of_phi(number)
        factor = _golden(*map(self.dtype.type, power))
        return _golden(*operators.ring("phi_power", formulas.multiply, self, factor))

    def conjugate(self) -> GoldenArray:
        """a + b (1 − φ), the image under √5 → −√5: (a + b) − bφ."""
        return _golden(*checked("conjugate", formulas.conjugate, self.a, self.b))

    def norm(self) -> jax.Array:
        """The number times its conjugate, an integer: a² + ab − b²."""
        return checked("norm", formulas.norm, self.a, self.b)[0]

    def trace(self) -> jax.Array:
        """The number plus its conjugate, an integer: 2a + b."""
        return checked("trace", formulas.trace, self.a, self.b)[0]

    def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> GoldenArray:
        """Over some axes, all of them for None.

        Raises:
          TypeError: `axis` is not an integer or several, or `keepdims` no boolean.
          ValueError: there is no such axis, or one is named twice.
        """
        name = "GoldenArray.sum"
        axes = arguments.axes(name, axis, self.ndim)
        formula = formulas.sum_over(axes, _check.flag(name, "keepdims", keepdims))
        return _golden(*checked("sum", formula, self.a, self.b))

    # --- order ------------------------------------------------------------------------------------

    def sign(self) -> jax.Array:
        """-1, 0 or 1 as int32, from integers alone, for all coefficients there are."""
        return order.sign(self.a, self.b)

    def __eq__(self, other: Any) -> Any:
        return operators.equal("==", self, other)

    def __ne__(self, other: Any) -> Any:
        return ~operators.equal("!=", self, other)

    def __lt__(self, other: Any) -> jax.Array:
        return operators.order("<", self, other) < 0

    def __le__(self, other: Any) -> jax.Array:
        return operators.order("<=", self, other) <= 0

    def __gt__(self, other: Any) -> jax.Array:
        return operators.order(">", self, other) > 0

    def __ge__(self, other: Any) -> jax.Array:
        return operators.order(">=", self, other) >= 0


def stack(arrays: Sequence[GoldenArray], axis: int = 0) -> GoldenArray:
    """Arrays of one shape along a new axis.

    Raises:
      TypeError: an entry is not a `GoldenArray`, or `axis` not an integer.
      ValueError: there is no entry, the shapes differ, or there is no such axis.

    >>> stack([GoldenArray(1, 2), GoldenArray(3, 4)])
    GoldenArray(a=[1 3], b=[2 4])
    """
    if not isinstance(arrays, Iterable):
        raise TypeError(f"stack: arrays must be a sequence, got {type(arrays).__name__}")
    arrays = [_exact("stack", "arrays", x) for x in arrays]
    if len(shapes := {x.shape for x in arrays}) != 1:
        raise ValueError(f"stack: arrays must be some of one shape, got {sorted(shapes)}")
    axis = _check.axis("stack", _check.integer_axis("stack", axis), arrays[0].ndim + 1)
    return _golden(jnp.stack([x.a for x in arrays], axis), jnp.stack([x.b for x in arrays], axis))


def where(condition: ArrayLike, x: GoldenArray, y: GoldenArray) -> GoldenArray:
    """Elements of `x` where the condition holds, else of `y`.

    Raises:
      TypeError: `x` or `y` is not a `GoldenArray`, or `condition` no array of booleans.
      ValueError: the shapes do not broadcast.

    >>> x = GoldenArray(1, -1)
    >>> where(x.sign() > 0, x, GoldenArray(0, 0))
    GoldenArray(a=0, b=0)
    """
    x, y = _exact("where", "x", x), _exact("where", "y", y)
    condition = arguments.condition("where", condition)
    try:
        return _golden(jnp.where(condition, x.a, y.a), jnp.where(condition, x.b, y.b))
    except ValueError:
        arguments.broadcast("where", "condition, x and y", condition, x, y)
        raise


# --------------------------------------------------------------------------------- helpers


def _golden(a: Any, b: Any) -> GoldenArray:
    return GoldenArray.tree_unflatten(None, (a, b))


def _exact(function: str, name: str, x: Any) -> GoldenArray:
    if not isinstance(x, GoldenArray):
        raise TypeError(f"{function}: {name} must be GoldenArrays, got {type(x).__name__}")
    return x
