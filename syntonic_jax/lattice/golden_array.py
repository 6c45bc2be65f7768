"""Arrays over Z[φ]: pairs of integer arrays with the arithmetic of a + bφ."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from .. import _check, _dispatch, _fixed
from ..ops.crystallize import coefficients
from . import _formulas as formulas
from ._overflow import checked

_INTEGERS = (np.dtype("int32"), np.dtype("int64"))


@jax.tree_util.register_pytree_with_keys_class
class GoldenArray:
    """An array of numbers a + bφ with integers a and b, in exact arithmetic.

    A pytree of two integer arrays, so that every transformation of jax takes it. Operators are
    those of the ring Z[φ] and broadcast as in NumPy; the other operand may be an integer or an
    array of integers, never floats: `from_float` converts those. Comparisons compare the numbers,
    exactly, and give arrays of booleans.

    Coefficients wrap around beyond their type, as integers do. Under
    ``jax.experimental.checkify.checkify(f, errors=checkify.user_checks)`` that is an error instead.
    docs/exact-arithmetic.md has the safe range of each operation.

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
        one, phi = _integers(name, "a", a), _integers(name, "b", b)
        if one.shape != phi.shape:
            raise ValueError(
                f"{name}: a and b must have the same shape, got {one.shape} and {phi.shape}"
            )
        if one.dtype != phi.dtype and one.weak_type == phi.weak_type:
            raise TypeError(
                f"{name}: a and b must have the same integer type, got {one.dtype} and {phi.dtype}"
            )
        dtype = jnp.result_type(one, phi)
        self.a, self.b = one.astype(dtype), phi.astype(dtype)

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
        a = _integers("GoldenArray.from_int", "x", x)
        return cls(a, jnp.zeros_like(a))

    def to_float(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """The numbers in a floating type, each rounded once from its exact value.

        Args:
          dtype: float16, bfloat16, float32 or float64.

        Raises:
          TypeError: `dtype` is not real floating point.
        """
        dtype = _check.result_dtype("GoldenArray.to_float", dtype, jnp.float32)
        return _to_float(self, dtype)

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
        """As of an array."""
        return _golden(self.a.reshape(*shape), self.b.reshape(*shape))

    def transpose(self, *axes: Any) -> GoldenArray:
        """As of an array."""
        return _golden(self.a.transpose(*axes), self.b.transpose(*axes))

    def __repr__(self) -> str:
        return f"GoldenArray(a={self.a}, b={self.b})"

    # --- the ring ---------------------------------------------------------------------------------

    def __add__(self, other: Any) -> GoldenArray:
        return _ring("+", formulas.add, self, other)

    def __sub__(self, other: Any) -> GoldenArray:
        return _ring("-", formulas.subtract, self, other)

    def __mul__(self, other: Any) -> GoldenArray:
        return _ring("*", formulas.multiply, self, other)

    def __matmul__(self, other: Any) -> GoldenArray:
        return _ring("@", formulas.matmul, self, other)

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Any) -> GoldenArray:
        return _operand("-", other, self) - self

    def __rmatmul__(self, other: Any) -> GoldenArray:
        return _operand("@", other, self) @ self

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
        if not isinstance(n, int | np.integer) or isinstance(n, bool):
            raise TypeError(f"{name}: n must be a Python integer, got {type(n).__name__}")
        most = 46 if self.dtype.itemsize == 4 else 92
        if not 1 - most <= n <= most:
            raise ValueError(
                f"{name}: n must lie between {1 - most} and {most} for {self.dtype}, got {n}"
            )
        power = formulas.power_of_phi(int(n))
        return _ring("phi_power", formulas.multiply, self, _golden(*map(self.dtype.type, power)))

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
        """Over some axes, all of them for None."""
        axis = tuple(axis) if isinstance(axis, Sequence) else axis
        formula = formulas.sum_over(axis, keepdims)
        return _golden(*checked("sum", formula, self.a, self.b))

    # --- order ------------------------------------------------------------------------------------

    def sign(self) -> jax.Array:
        """-1, 0 or 1 as int32, from integers alone, for all coefficients there are."""
        return _sign(self)

    def __eq__(self, other: Any) -> Any:
        other = _operand("==", other, self)
        return (self.a == other.a) & (self.b == other.b)

    def __ne__(self, other: Any) -> Any:
        return ~(self == other)

    def __lt__(self, other: Any) -> jax.Array:
        return _compare(self, _operand("<", other, self)) < 0

    def __le__(self, other: Any) -> jax.Array:
        return _compare(self, _operand("<=", other, self)) <= 0

    def __gt__(self, other: Any) -> jax.Array:
        return _compare(self, _operand(">", other, self)) > 0

    def __ge__(self, other: Any) -> jax.Array:
        return _compare(self, _operand(">=", other, self)) >= 0


def stack(arrays: Sequence[GoldenArray], axis: int = 0) -> GoldenArray:
    """Arrays of one shape along a new axis.

    Raises:
      TypeError: an entry is not a `GoldenArray`.

    >>> stack([GoldenArray(1, 2), GoldenArray(3, 4)])
    GoldenArray(a=[1 3], b=[2 4])
    """
    arrays = [_exact("stack", "arrays", x) for x in arrays]
    return _golden(jnp.stack([x.a for x in arrays], axis), jnp.stack([x.b for x in arrays], axis))


def where(condition: ArrayLike, x: GoldenArray, y: GoldenArray) -> GoldenArray:
    """Elements of `x` where the condition holds, else of `y`.

    Raises:
      TypeError: `x` or `y` is not a `GoldenArray`.

    >>> x = GoldenArray(1, -1)
    >>> where(x.sign() > 0, x, GoldenArray(0, 0))
    GoldenArray(a=0, b=0)
    """
    x, y = _exact("where", "x", x), _exact("where", "y", y)
    return _golden(jnp.where(condition, x.a, y.a), jnp.where(condition, x.b, y.b))


# --------------------------------------------------------------------------------- helpers


def _golden(a: Any, b: Any) -> GoldenArray:
    return GoldenArray.tree_unflatten(None, (a, b))


def _integers(function: str, name: str, x: Any) -> Any:
    """`x` as an array of int32 or int64; a Python integer keeps its weak type."""
    if not isinstance(x, jax.Array | np.ndarray | np.integer | int) or isinstance(x, bool):
        raise TypeError(f"{function}: {name} must be an array of integers, got {type(x).__name__}")
    if isinstance(x, np.ndarray | np.integer | int):
        # jax would wrap around what its type does not hold.
        wide = np.asarray(x)
        if wide.dtype in _INTEGERS:
            limits = jnp.iinfo(jnp.asarray(0).dtype)
            if wide.size and not (wide.min() >= limits.min and wide.max() <= limits.max):
                raise ValueError(f"{function}: {name} must fit {limits.dtype}, got {x}")
        elif isinstance(x, int):
            raise ValueError(f"{function}: {name} must fit an integer type, got {x}")
    dtype = np.dtype(jnp.result_type(x))
    if dtype not in _INTEGERS:
        raise TypeError(f"{function}: {name} must be int32 or int64, got {dtype}")
    return jnp.asarray(x)


def _exact(function: str, name: str, x: Any) -> GoldenArray:
    if not isinstance(x, GoldenArray):
        raise TypeError(f"{function}: {name} must be GoldenArrays, got {type(x).__name__}")
    return x


def _operand(operator: str, x: Any, beside: GoldenArray) -> GoldenArray:
    """The other operand of an operator, in the type of the two together."""
    if isinstance(x, GoldenArray):
        return x
    try:
        x = _integers(f"GoldenArray {operator}", "the other operand", x)
    except TypeError as error:
        raise TypeError(f"{error}; GoldenArray.from_float converts floats") from None
    x = x.astype(jnp.result_type(x, beside.a))
    return _golden(x, jnp.zeros_like(x))


def _ring(operator: str, formula, x: GoldenArray, other: Any) -> GoldenArray:
    y = _operand(operator, other, x)
    return _golden(*checked(operator, formula, x.a, x.b, y.a, y.b))


# Of |a + bφ|, which is at least 1 / (√5 |b|) where it is not 0, these leave 66 bits exact.
_FRACTION = {4: 4, 8: 6}


def _value(x: GoldenArray) -> tuple[_fixed.Limbs, int]:
    size = x.dtype.itemsize
    return _fixed.value(x.a, x.b, size // 4 + 1, _FRACTION[size]), _FRACTION[size]


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _to_float(x: GoldenArray, dtype: np.dtype) -> jax.Array:
    limbs, fraction = _value(x)
    return _fixed.to_float(limbs, fraction, dtype)


@functools.partial(jax.jit, inline=True)
def _sign(x: GoldenArray) -> jax.Array:
    return _fixed.sign(_value(x)[0])


@functools.partial(jax.jit, inline=True)
def _compare(x: GoldenArray, y: GoldenArray) -> jax.Array:
    """The sign of x − y, whose coefficients may be out of range."""
    dtype = jnp.result_type(x.a, y.a)
    x, y = (_golden(z.a.astype(dtype), z.b.astype(dtype)) for z in (x, y))
    shape = jnp.broadcast_shapes(x.shape, y.shape)
    x, y = (_golden(*(jnp.broadcast_to(c, shape) for c in (z.a, z.b))) for z in (x, y))
    return _fixed.sign(_fixed.subtract(_value(x)[0], _value(y)[0]))
