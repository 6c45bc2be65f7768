"""An integer beside a GoldenArray is taken exactly or refused; none wraps around."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from syntonic_jax.lattice import GoldenArray

pytestmark = pytest.mark.usefixtures("x64")

RING = {"+": operator.add, "-": operator.sub, "*": operator.mul, "@": operator.matmul}
ORDER = {
    **{"==": operator.eq, "!=": operator.ne},
    **{"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge},
}
# What int32 does not hold; what it would be taken for is in range, or 0.
BEYOND = [2**31, -(2**31) - 1, 2**32, 2**32 + 1, -(2**32), 2**33 + 7, 2**62 + 3]


def narrow(a=(1, 1), b=(0, -1)) -> GoldenArray:
    return GoldenArray(jnp.asarray(a, "int32"), jnp.asarray(b, "int32"))


def python(x: GoldenArray) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in zip(np.ravel(x.a), np.ravel(x.b), strict=True)]


@pytest.mark.parametrize("symbol", RING)
def test_operators(symbol):
    x = narrow()
    wide = GoldenArray(x.a.astype("int64"), x.b.astype("int64"))
    for f in (RING[symbol], lambda x, y: RING[symbol](y, x)):
        for integer in BEYOND:
            array = np.full(2, integer)
            for strong in (array, jnp.asarray(array), np.int64(integer))[
                : 2 if symbol == "@" else 3
            ]:
                assert python(f(x, strong)) == python(f(wide, strong))
            if symbol == "@":
                continue
            for weak in (integer, jnp.asarray(integer)):
                with pytest.raises(
                    ValueError, match=f"GoldenArray .*must fit int32, got {integer}"
                ):
                    f(x, weak)
        if symbol != "@":
            with pytest.raises(ValueError, match="must fit int32"):
                jax.jit(lambda x, f=f: f(x, 2**32 + 1))(x)


@pytest.mark.parametrize("integer", [*BEYOND, 2**63, -(2**70), 2**200])
@pytest.mark.parametrize("symbol", ORDER)
def test_comparisons(symbol, integer):
    f, x = ORDER[symbol], narrow([2**31 - 1, -(2**31), 1], [2**31 - 1, -(2**31), 0])
    values = [a + b * (1 + 5**0.5) / 2 for a, b in python(x)]  # none is near an integer of BEYOND
    expected = [bool(f(v, integer)) for v in values]
    numbers = [integer]
    if abs(integer) < 2**63:
        numbers += [np.int64(integer), np.full(3, integer), jnp.asarray(integer)]
        numbers += [jnp.full(3, integer), GoldenArray(integer, 0)]
    for number in numbers:
        assert list(f(x, number)) == expected, type(number)


@pytest.mark.parametrize("symbol", ORDER)
def test_comparisons_of_traced_numbers(symbol):
    f, x = ORDER[symbol], narrow()
    for integer in (2**32 + 1, -(2**40)):
        expected = [f(a, integer) for a, _ in python(x)]
        assert list(jax.jit(lambda x, integer=integer: f(x, integer))(x)) == expected
        assert list(jax.jit(f)(x, integer)) == expected  # of a weak type


@pytest.mark.parametrize("symbol", ORDER)
def test_comparisons_at_the_ends_of_int64(symbol):
    x = GoldenArray(np.array([2**63 - 1, -(2**63)]), np.zeros(2, "int64"))
    for integer in (2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64 - 1, 2**65):
        expected = [ORDER[symbol](a, integer) for a, _ in python(x)]
        assert list(ORDER[symbol](x, integer)) == expected


@pytest.mark.parametrize("integer", BEYOND)
def test_constructors(integer):
    one = jnp.int32(1)
    for number in (integer, jnp.asarray(integer)):
        with pytest.raises(ValueError, match=f"GoldenArray: b must fit int32, got {integer}"):
            GoldenArray(one, number)
        with pytest.raises(ValueError, match=f"GoldenArray: a must fit int32, got {integer}"):
            GoldenArray(number, one)
        assert python(GoldenArray(number, 1)) == [(integer, 1)]
        assert python(GoldenArray.from_int(number)) == [(integer, 0)]
    for number in (np.int64(integer), np.asarray(integer)):
        with pytest.raises(TypeError, match="same integer type, got int32 and int64"):
            GoldenArray(one, number)
    with pytest.raises(ValueError, match="GoldenArray: a must fit int64"):
        GoldenArray(integer << 64, 0)


@pytest.mark.parametrize("integer", BEYOND)
def test_without_wide_types(integer):
    x = narrow()
    with jax.enable_x64(False):
        for f in RING.values():
            with pytest.raises(ValueError, match="must fit int32"):
                f(x, np.full(2, integer))
        for number in (integer, np.int64(integer)):
            assert not (x == number).any()
            assert (x != number).all()
            assert (x < number).all() == (integer > 0)
            with pytest.raises(ValueError, match="must fit int32"):
                x + number
            with pytest.raises(ValueError, match="b must fit int32"):
                GoldenArray(0, number)
        with pytest.raises(ValueError, match="must fit int32"):
            GoldenArray.from_int(np.array([integer]))


def test_traced_integers_in_the_checked_mode():
    """They have no value that could be refused: the checked mode sees what does not fit."""
    functions = {symbol: f for symbol, f in RING.items() if symbol != "@"}
    functions |= {f"- {symbol}": lambda x, n, f=f: f(n, x) for symbol, f in functions.items()}
    functions["GoldenArray"] = lambda x, n: GoldenArray(x.a[0], n)
    for symbol, f in functions.items():
        checked = checkify.checkify(jax.jit(f), errors=checkify.user_checks)
        error, result = checked(narrow(), 3)
        assert error.get() is None, symbol
        assert result.dtype == "int32"
        for integer in BEYOND:
            assert "passes the range of int32" in checked(narrow(), integer)[0].get(), symbol


def test_small_integers_of_every_type():
    x = narrow()
    for number in (3, np.int8(3), np.uint8(3), np.uint64(3), np.int32(3), jnp.asarray(3)):
        assert (x + number == x + 3).all()
        assert (x + number).dtype == "int32"
        assert (x == number).tolist() == [False, False]
        assert (GoldenArray(number, 0) == 3).all()
    assert (x + np.int64(3)).dtype == "int64"
    for wrong in (np.uint64(2**63), np.uint64(2**64 - 1)):
        with pytest.raises(ValueError, match="must fit int"):
            x + wrong
        assert (x < wrong).all()
