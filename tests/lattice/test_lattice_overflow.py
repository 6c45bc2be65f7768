"""The checked mode: what passes the range of the coefficients, and the largest that does not."""

import functools

import jax
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from syntonic_jax import phi_residual
from syntonic_jax.lattice import GoldenArray, ResonantTensor

LIMIT = 2**31 - 1

big, one = GoldenArray(LIMIT, LIMIT), GoldenArray(1, 1)
half = GoldenArray(2**16, 2**16)
row = GoldenArray(np.full(3, 2**30, "int32"), np.zeros(3, "int32"))

OVERFLOWS = {
    "+": (lambda x, y: x + y, (big, one), (big, -one)),
    "-": (lambda x, y: x - y, (-big - one, one), (-big, one)),
    "negative": (lambda x: -x, (GoldenArray(-(2**31), 0),), (big,)),
    "*": (lambda x, y: x * y, (half, half), (GoldenArray(2**15, 0), GoldenArray(2**15, 2**15))),
    "mul_phi": (lambda x: x.mul_phi(), (big,), (GoldenArray(LIMIT, 0),)),
    "div_phi": (lambda x: x.div_phi(), (GoldenArray(-2, LIMIT),), (GoldenArray(0, LIMIT),)),
    "phi_power": (lambda x: x.phi_power(40), (GoldenArray(30, 0),), (GoldenArray(10, 0),)),
    "conjugate": (lambda x: x.conjugate(), (big,), (GoldenArray(LIMIT, -1),)),
    "norm": (lambda x: x.norm(), (half,), (GoldenArray(46340, 0),)),
    "trace": (lambda x: x.trace(), (GoldenArray(2**30, 0),), (GoldenArray(2**30, -1),)),
    "sum": (lambda x: x.sum(), (row,), (row[:1],)),
    "@": (lambda x: x @ np.ones(3, "int32"), (row,), (GoldenArray(row.a // 2, row.b),)),
}


@pytest.mark.parametrize("transformed", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", OVERFLOWS)
def test_overflow_is_detected_in_the_checked_mode(name, transformed):
    f, beyond, within = OVERFLOWS[name]
    checked = checkify.checkify(transformed(f), errors=checkify.user_checks)
    message = checked(*beyond)[0].get()
    assert message is not None
    assert "a coefficient passes the range of int32" in message
    error, result = checked(*within)
    assert error.get() is None
    jax.tree.map(np.testing.assert_array_equal, result, f(*within))
    f(*beyond)  # elsewhere nothing is raised


def test_checked_mode_under_transformations():
    """Powers of φ leave int32 after 46 steps, wherever they are taken."""

    def power(x, n):
        return jax.lax.scan(lambda x, _: (x.mul_phi(), None), x, None, length=n)[0]

    def power_of_one(n):
        return lambda x: x.phi_power(40).phi_power(n - 40)  # jax cannot check a scan in shard_map

    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x = GoldenArray.from_int(np.ones(8, "int32"))
    for n, passes in ((46, False), (47, True)):
        here = functools.partial(power, n=n)
        mapped = jax.shard_map(power_of_one(n), mesh=mesh, in_specs=P("d"), out_specs=P("d"))
        for f in (here, jax.vmap(here), jax.jit(mapped)):
            message = checkify.checkify(f, errors=checkify.user_checks)(x)[0].get()
            assert (message is not None) == passes, (n, message)


def test_symmetric_residuals_last_44_steps():
    def chain(n):
        x = z = ResonantTensor.ones(2)
        for _ in range(n):
            z = phi_residual(z, x, "phi_symmetric")
        return z

    for n, passes in ((44, False), (45, True)):
        checked = checkify.checkify(functools.partial(chain, n), errors=checkify.user_checks)
        assert (checked()[0].get() is not None) == passes


def test_sums_may_leave_the_range_in_between():
    x = GoldenArray(np.array([LIMIT, LIMIT, -LIMIT], "int32"), np.zeros(3, "int32"))
    error, total = checkify.checkify(lambda x: x.sum(), errors=checkify.user_checks)(x)
    assert error.get() is None
    assert total == GoldenArray(LIMIT, 0)


def test_checked_mode_costs_nothing_elsewhere():
    def program(f):
        return jax.jit(f).lower(half, half).compile().as_text()

    checked = checkify.checkify(lambda x, y: x * y, errors=checkify.user_checks)
    assert "shift-right-logical(" in program(checked)  # halves of words
    assert "shift-right-logical(" not in program(lambda x, y: x * y)
