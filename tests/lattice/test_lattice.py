"""GoldenArray: the laws of the ring as properties, ranges and overflow, every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_lattice
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracles_lattice import Golden

from syntonic_jax.lattice import GoldenArray, stack, where

settings.register_profile("lattice", deadline=None, max_examples=30, database=None)
settings.load_profile("lattice")

SIZE = 8  # of every array, so that a function is compiled once
LIMIT = 2**31 - 1


def arrays(limit):
    """GoldenArrays whose coefficients are at most `limit`, beside the same in Python's integers."""
    numbers = st.lists(st.integers(-limit, limit), min_size=SIZE, max_size=SIZE)
    return st.tuples(numbers, numbers).map(Pair)


class Pair:
    def __init__(self, coefficients):
        self.python = [Golden(a, b) for a, b in zip(*coefficients, strict=True)]
        self.array = GoldenArray(*(jnp.asarray(c, "int32") for c in coefficients))

    def __repr__(self):
        return f"{self.python}"


def python(x: GoldenArray) -> list[Golden]:
    return [Golden(int(a), int(b)) for a, b in zip(np.ravel(x.a), np.ravel(x.b), strict=True)]


def same(x: GoldenArray, y: GoldenArray) -> bool:
    return bool(jnp.all(x == y))


# Three factors with sums inside: 3 · 2 · 2 · limit³ below 2³¹.
SMALL = arrays(500)


@given(SMALL, SMALL, SMALL)
def test_ring_axioms(x, y, z):
    x, y, z = x.array, y.array, z.array
    zero, one = GoldenArray(0, 0), GoldenArray(1, 0)
    assert same((x + y) + z, x + (y + z))
    assert same(x + y, y + x)
    assert same(x + zero, x)
    assert same(x + -x, x - x)
    assert same(x - x, zero)
    assert same((x * y) * z, x * (y * z))
    assert same(x * y, y * x)
    assert same(x * one, x)
    assert same(x * (y + z), x * y + x * z)


@given(arrays(15000), arrays(15000))
def test_operators_are_those_of_integers(x, y):
    """|ac + bd| and |ad + bc + bd| stay below 3 · 15000², which fits."""
    pairs = list(zip(x.python, y.python, strict=True))
    assert python(x.array + y.array) == [a + b for a, b in pairs]
    assert python(x.array - y.array) == [a + -b for a, b in pairs]
    assert python(x.array * y.array) == [a * b for a, b in pairs]
    assert python(3 - x.array) == [Golden(3, 0) + -a for a in x.python]


def test_phi_is_the_golden_ratio():
    phi = GoldenArray(0, 1)
    assert same(phi * phi, phi + 1)
    assert float(phi.to_float()) == np.float32(oracles.PHI)
    assert int(phi.norm()) == -1
    assert int(phi.trace()) == 1


@given(arrays(10**9))
def test_mul_phi_and_div_phi(x):
    x = x.array
    assert same(x.mul_phi(), x * GoldenArray(0, 1))
    assert same(x.mul_phi().div_phi(), x)
    assert same(x.div_phi().mul_phi(), x)


@given(arrays(30))
def test_powers_of_phi(x):
    power = x.array
    for n in range(1, 30):
        power = power.mul_phi()
        assert same(x.array.phi_power(n), power)
        assert same(power.phi_power(-n), x.array)
    assert same(x.array.phi_power(0), x.array)


@given(arrays(100), arrays(100))
def test_conjugate_norm_and_trace(x, y):
    """A norm of a product: below (3 · 100²)² · 3 = 2.7e9 at worst; 100 keeps it below 2³¹."""
    x, y = x.array, y.array
    assert same(x.conjugate().conjugate(), x)
    assert same((x * y).conjugate(), x.conjugate() * y.conjugate())
    assert same((x + y).conjugate(), x.conjugate() + y.conjugate())
    assert same(x * x.conjugate(), GoldenArray.from_int(x.norm()))
    assert same(x + x.conjugate(), GoldenArray.from_int(x.trace()))
    wide = [(a * b) for a, b in zip(python(x), python(y), strict=True)]
    norms = [z.a**2 + z.a * z.b - z.b**2 for z in wide]
    products = np.asarray(x.norm(), object) * np.asarray(y.norm(), object)
    assert list(products) == norms
    if max(abs(z.a) + abs(z.b) for z in wide) < 30000:
        assert list((x * y).norm()) == norms


@given(arrays(LIMIT), arrays(LIMIT))
def test_order_over_the_whole_range(x, y):
    assert list(x.array.sign()) == [z.sign for z in x.python]
    values = [(a.value, b.value) for a, b in zip(x.python, y.python, strict=True)]
    assert list(x.array < y.array) == [a < b for a, b in values]
    assert list(x.array <= y.array) == [a <= b for a, b in values]
    assert list(x.array > y.array) == [a > b for a, b in values]
    assert list(x.array >= y.array) == [a >= b for a, b in values]
    assert list(x.array == y.array) == [a == b for a, b in values]
    assert list(x.array != y.array) == [a != b for a, b in values]


def close_to_zero(rng, count):
    """b over the whole range, and the a for which a + bφ is as near to 0 as it gets."""
    b = rng.integers(-(2**30), 2**30, count) >> rng.integers(0, 30, count)
    a = np.array([round(-int(n) * oracles_lattice.PHI) for n in b]) + rng.integers(-1, 2, count)
    return a.astype("int32"), b.astype("int32")


def test_sign_and_value_where_almost_everything_cancels(rng):
    a, b = close_to_zero(rng, 400)
    fib = [0, 1]
    while fib[-1] < 2**30:
        fib.append(fib[-1] + fib[-2])
    a, b = (np.append(x, y).astype("int32") for x, y in ((a, fib[1:]), (b, np.negative(fib[:-1]))))
    x = GoldenArray(a, b)
    exact = [z.value for z in python(x)]
    assert list(x.sign()) == [(v > 0) - (v < 0) for v in exact]
    for dtype in ("float16", "bfloat16", "float32"):
        got = oracles.real(x.to_float(dtype))
        expected = [oracles_lattice.rounded(v, dtype) for v in exact]
        limit = float(oracles.info(dtype).max)
        expected = [e if abs(e) <= limit else np.copysign(np.inf, e) for e in expected]
        np.testing.assert_array_equal(got, expected)


def test_sixty_four_bits(rng, x64):
    b = rng.integers(-(2**62), 2**62, 200) >> rng.integers(0, 62, 200)
    a = [max(-(2**63), min(2**63 - 1, round(-int(n) * oracles_lattice.PHI))) for n in b]
    x = GoldenArray(np.array(a), b)
    assert x.dtype == "int64"
    exact = [z.value for z in python(x)]
    assert list(x.sign()) == [(v > 0) - (v < 0) for v in exact]
    expected = [oracles_lattice.rounded(v, "float64") for v in exact]
    np.testing.assert_array_equal(x.to_float("float64"), expected)
    product = GoldenArray(2**40, 1) * GoldenArray(2**20, 1)
    assert python(product) == [Golden(2**40, 1) * Golden(2**20, 1)]
    assert GoldenArray.from_float(0.3).dtype == "int64"


# --- shapes ---------------------------------------------------------------------------------------


def numbers(rng, *shape, limit=20):
    return GoldenArray(*rng.integers(-limit, limit, (2, *shape)).astype("int32"))


def test_shapes(rng):
    x = numbers(rng, 3, 4, 5)
    assert (x.shape, x.ndim, x.size, len(x), x.dtype) == ((3, 4, 5), 3, 60, 3, "int32")
    for index in (1, (slice(None), 2), ..., (0, 1, 2), np.array([2, 0])):
        assert same(x[index], GoldenArray(x.a[index], x.b[index]))
    assert same(x.reshape(12, 5).reshape((3, 4, 5)), x)
    assert same(x.transpose(2, 0, 1).transpose(1, 2, 0), x)
    assert x.T.shape == (5, 4, 3)
    assert same(stack(list(x)), x)
    assert same(stack([x, x], -1)[..., 1], x)
    assert same(where(x > 0, x, -x), where(x < 0, -x, x))
    assert (x + x[0, 0]).shape == x.shape
    assert "GoldenArray(a=" in repr(x)


def test_sum_and_matmul(rng):
    x, y = numbers(rng, 3, 4), numbers(rng, 4, 5)
    for axis, keepdims in ((None, False), (0, True), (-1, False), ((0, 1), True)):
        total = x.sum(axis, keepdims)
        assert total.dtype == x.dtype
        np.testing.assert_array_equal(total.a, np.asarray(x.a).sum(axis, keepdims=keepdims))
        np.testing.assert_array_equal(total.b, np.asarray(x.b).sum(axis, keepdims=keepdims))
    product = stack([(x[i] * y.T).sum(-1) for i in range(3)])
    assert same(x @ y, product)
    assert same(x[0] @ y, product[0])
    assert same(x @ y[:, 0], product[:, 0])
    assert same(x[0] @ y[:, 0], product[0, 0])
    assert same(numbers(rng, 2, 3, 0) @ numbers(rng, 0, 4), GoldenArray(0, 0))
    assert same(np.ones(3, "int32") @ x, x.sum(0))


# --- transformations ------------------------------------------------------------------------------


def polynomial(x, y):
    return (x * y + x.mul_phi() - y.div_phi()).conjugate()


def test_transformations(rng, tmp_path):
    x, y = numbers(rng, 8, 3), numbers(rng, 8, 3)
    expected = polynomial(x, y)
    assert same(jax.jit(polynomial)(x, y), expected)
    assert same(jax.vmap(polynomial)(x, y), expected)
    assert same(jax.vmap(polynomial, (0, None))(x, y[0]), polynomial(x, y[0]))
    last, seen = jax.lax.scan(lambda c, z: (c.mul_phi() + z, c.sign()), x[0], y)
    step = x[0]
    for z in y:
        step = step.mul_phi() + z
    assert same(last, step)
    assert seen.shape == (8, 3)
    assert same(jax.lax.cond(True, lambda x: -x, lambda x: x, x), -x)
    assert same(jax.eval_shape(polynomial, x, y) and x, x)


def test_devices(rng):
    x, y = numbers(rng, 8, 3), numbers(rng, 8, 3)
    expected = polynomial(x, y)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    there = jax.device_put(x, NamedSharding(mesh, P("d")))
    assert len(there.a.devices()) == 8
    assert same(polynomial(there, jax.device_put(y, NamedSharding(mesh, P("d")))), expected)
    mapped = jax.shard_map(polynomial, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P("d"))
    assert same(jax.jit(mapped)(x, y), expected)
    assert same(jax.device_put(x, jax.devices()[3]), x)


def test_checkpoint(rng, tmp_path):
    import orbax.checkpoint as ocp

    state = {"weights": numbers(rng, 4, 3), "step": 3}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
    assert same(restored["weights"], state["weights"])


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (jnp.ones(3), jnp.ones(3, int), TypeError, "a must be int32 or int64, got float32"),
        (1, 2.0, TypeError, "b must be an array of integers, got float"),
        (True, 1, TypeError, "a must be an array of integers, got bool"),
        ([1, 2], [3, 4], TypeError, "a must be an array of integers, got list"),
        (jnp.ones(3, "uint8"), jnp.ones(3, "uint8"), TypeError, "a must be int32.*got uint8"),
        (
            jnp.ones(3, int),
            jnp.ones(4, int),
            ValueError,
            r"a and b .*same shape, got \(3,\) and \(4,\)",
        ),
        (2**31, 0, ValueError, "a must fit int32, got 2147483648"),
        (2**70, 0, ValueError, "a must fit int32"),
        (np.array([2**40]), np.array([0]), ValueError, "a must fit int32"),
    ],
)
def test_coefficients_are_checked(a, b, error, message):
    with pytest.raises(error, match=f"GoldenArray: {message}"):
        GoldenArray(a, b)


def test_types_of_coefficients_must_agree(x64):
    with pytest.raises(TypeError, match="same integer type, got int32 and int64"):
        GoldenArray(jnp.ones(2, "int32"), jnp.ones(2, "int64"))
    wide = GoldenArray(jnp.ones(2, "int32"), jnp.ones(2, "int32")) + GoldenArray(
        jnp.ones(2, "int64"), jnp.ones(2, "int64")
    )
    assert wide.dtype == "int64"


def test_floats_do_not_mix():
    x = GoldenArray(jnp.ones(3, int), jnp.ones(3, int))
    for other in (1.0, jnp.ones(3), np.ones(3), np.float32(1), True, "x", None):
        for operation in ("__add__", "__radd__", "__rsub__", "__mul__", "__matmul__", "__eq__"):
            with pytest.raises(TypeError, match=r"GoldenArray .* must be .*got .*from_float"):
                getattr(x, operation)(other)
    for mixed in (lambda: jnp.ones(3) + x, lambda: np.ones(3) * x, lambda: 1.0 - x):
        with pytest.raises(TypeError, match="GoldenArray"):
            mixed()
    assert same(np.arange(3) + x, x + jnp.arange(3))


def test_other_arguments_are_checked():
    x = GoldenArray(1, 1)
    for wrong in (1.0, True, None):
        with pytest.raises(TypeError, match=r"phi_power: n must be a Python integer, got "):
            x.phi_power(wrong)
    for wrong in (47, -46):
        with pytest.raises(ValueError, match=rf"phi_power: n must lie .*int32, got {wrong}"):
            x.phi_power(wrong)
    one = GoldenArray(1, 0)
    assert same(one.phi_power(46), GoldenArray(1134903170, 1836311903))
    assert same(one.phi_power(-45).phi_power(45), one)
    with pytest.raises(TypeError, match=r"GoldenArray.to_float: dtype must be float16.*got int32"):
        x.to_float("int32")
    with pytest.raises(TypeError, match="stack: arrays must be GoldenArrays, got int"):
        stack([x, 1])
    with pytest.raises(TypeError, match="where: y must be GoldenArrays, got float"):
        where(True, x, 1.0)
    with pytest.raises(TypeError, match="from_int: x must be int32 or int64, got float32"):
        GoldenArray.from_int(jnp.ones(2))
