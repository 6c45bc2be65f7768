"""A ResonantTensor carries its straight-through gradient, and is a parameter in flux."""

import copy
import functools
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from syntonic_jax import GoldenArray, ResonantTensor, crystallize, phi_residual, phi_residual_relu
from syntonic_jax.lattice import ResonantPhase

pytestmark = pytest.mark.usefixtures("x64")

MODES = ["phi", "phi_symmetric", "standard"]
BOTH = {"crystallized": lambda x: x, "in flux": lambda x: x.flux()}
both = pytest.mark.parametrize("in_phase", BOTH.values(), ids=BOTH)


def tensor(rng, shape=(4, 3)) -> ResonantTensor:
    return ResonantTensor.from_floats(rng.normal(size=shape), 50)


def floats(t: ResonantTensor, v, dtype="float64"):
    return t.with_values(v).crystallize().to_floats(dtype)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "out"),
    [*zip(oracles.DTYPES, oracles.DTYPES), ("float32", "float64"), ("float64", "float16")],
)
def test_crystallize_is_straight_through(dtype, out, rng):
    """Like the function, in value and derivatives, forward, backward, under jit and vmap."""
    t = ResonantTensor.zeros(6, 20).flux(dtype)
    v = jnp.asarray([*rng.normal(size=4), jnp.inf, jnp.nan], dtype)
    ct = jnp.asarray(rng.normal(size=6), out)
    t_v = jnp.asarray(rng.normal(size=6), dtype)
    method = functools.partial(floats, t, dtype=out)
    function = functools.partial(crystallize, precision=20, dtype=out)
    y, pull = jax.vjp(method, v)
    expected, expected_pull = jax.vjp(function, v)
    np.testing.assert_array_equal(y, expected)
    assert y.dtype == out
    assert pull(ct)[0].dtype == dtype
    np.testing.assert_array_equal(pull(ct)[0], expected_pull(ct)[0])
    np.testing.assert_array_equal(jax.jvp(method, (v,), (t_v,))[1], t_v.astype(out))
    for transformed in (jax.jit(method), jax.linearize(method, v) and method):
        np.testing.assert_array_equal(jax.vjp(transformed, v)[1](ct)[0], pull(ct)[0])
    single = functools.partial(floats, ResonantTensor.zeros((), 20).flux(dtype), dtype=out)
    np.testing.assert_array_equal(jax.vmap(jax.grad(single))(v), jnp.ones(6))
    assert not jax.jvp(jax.grad(lambda v: method(v).sum()), (v,), (t_v,))[1].any()


def test_from_floats_is_straight_through(rng):
    v = rng.normal(size=5)
    slope = jax.grad(lambda v: ResonantTensor.from_floats(v).to_floats("float64").sum())(v)
    np.testing.assert_array_equal(slope, np.ones(5))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("f", [phi_residual, phi_residual_relu])
def test_gradients_go_through_exact_residuals(f, mode, dtype, rng):
    """To both operands, or to one beside a constant, with the factors of the formula."""
    v, w = jnp.asarray(rng.normal(size=(2, 40)), dtype)
    ct = jnp.asarray(rng.integers(1, 9, 40), "float64")

    def exact(v, w):
        x, r = (ResonantTensor.from_floats(n) for n in (v, w))
        return f(x, r, mode).to_floats("float64")

    def plain(v, w):
        v, w = (crystallize(n, dtype="float64") for n in (v, w))
        return f(v, w, mode)

    # The plain cotangent is rounded to the type of v; the exact one is, in accumulation, before.
    tolerance = 4 * oracles.unit(dtype)
    for operands in ((v, w), (v, np.asarray(w)), (np.asarray(v), w)):
        free = [i for i, x in enumerate(operands) if isinstance(x, jax.Array)]
        y, pull = jax.vjp(
            lambda *x, o=operands: exact(*_filled(o, x)), *(operands[i] for i in free)
        )
        z, expected = jax.vjp(
            lambda *x, o=operands: plain(*_filled(o, x)), *(operands[i] for i in free)
        )
        np.testing.assert_allclose(y, z, rtol=1e-12, atol=1e-12)
        for got, right in zip(pull(ct), expected(ct), strict=True):
            assert got.dtype == dtype
            np.testing.assert_allclose(oracles.real(got), oracles.real(right), rtol=tolerance)
            assert oracles.real(got).any()


def _filled(operands, free):
    entries = iter(free)
    return [next(entries) if isinstance(x, jax.Array) else x for x in operands]


def test_operands_of_two_types(rng):
    v, w = jnp.asarray(rng.normal(size=5), "float32"), jnp.asarray(rng.normal(size=5), "float64")

    def f(v, w):
        x, r = ResonantTensor.from_floats(v), ResonantTensor.from_floats(w)
        return phi_residual(x, r, "standard").to_floats("float64").sum()

    with jax.numpy_dtype_promotion("strict"):
        slopes = jax.grad(f, (0, 1))(v, w)
    assert [s.dtype for s in slopes] == ["float32", "float64"]
    np.testing.assert_array_equal(slopes, np.ones((2, 5)))


def test_gradients_go_through_flux(rng):
    """flux after crystallize, and round and round."""
    v = rng.normal(size=5)

    def f(v):
        x = ResonantTensor.from_floats(v).flux("float64")
        x = x.with_values(3 * x.values).crystallize()
        return jax.jit(lambda y: y.crystallize().to_floats("float64"))(x.flux("float64")).sum()

    np.testing.assert_array_equal(jax.grad(f)(v), np.full(5, 3))


def test_what_becomes_leaves_has_no_gradient(rng):
    """Documented: integers have none. Nothing of a trace leaves it with them either."""
    v = rng.normal(size=5)

    def loss(through):
        return lambda v: through(ResonantTensor.from_floats(v)).to_floats("float64").sum()

    for through in (
        jax.lax.stop_gradient,
        jax.jit(lambda x: x),
        lambda x: jax.tree.map(jnp.array, x),
    ):
        np.testing.assert_array_equal(jax.grad(loss(through))(v), np.zeros(5))
    kept = []
    jax.grad(loss(lambda x: kept.append(jax.lax.stop_gradient(x)) or x))(v)
    assert (kept[0].lattice == GoldenArray.from_float(v)).all()
    with jax.checking_leaks():
        made = jax.jit(lambda v: ResonantTensor.from_floats(v))(v)
    np.testing.assert_array_equal(made.to_floats("float64"), crystallize(v))


# --- leaves ---------------------------------------------------------------------------------------


def test_leaves(rng):
    x = tensor(rng)
    assert [leaf.dtype for leaf in jax.tree.leaves(x)] == ["int64", "int64"]
    for dtype in oracles.DTYPES:
        assert [leaf.dtype for leaf in jax.tree.leaves(x.flux(dtype))] == [dtype]
        assert x.flux(dtype).shape == x.shape
    assert jax.tree.structure(x) != jax.tree.structure(x.flux())
    traced = jax.eval_shape(lambda v: ResonantTensor.from_floats(v), jnp.ones(3))
    assert [leaf.dtype for leaf in jax.tree.leaves(traced)] == ["int64", "int64"]


@both
def test_repr_of_what_holds_no_arrays(in_phase, rng):
    x = in_phase(tensor(rng))
    assert repr(x) == f"ResonantTensor(shape=(4, 3), precision=50, {x.phase})"
    assert "shape=(4, 3)" in repr(jax.eval_shape(lambda: x))
    for leaf in (
        lambda y: y.shape,
        lambda y: None,
        lambda y: "name",
        lambda y: object(),
        lambda y: 3,
    ):
        mapped = jax.tree.map(leaf, x)
        assert mapped.phase == x.phase
        assert repr(mapped).startswith(
            f"ResonantTensor({'values' if x.values is not None else 'la'}"
        )
    assert "None" in repr(jax.tree.map(lambda y: None, x))
    assert repr(jax.tree.map(lambda y: None, x, is_leaf=lambda y: isinstance(y, GoldenArray)))
    assert repr(jax.jit(lambda x: (repr(x), x)[1])(x))


@both
def test_copies(in_phase, rng):
    x = in_phase(tensor(rng))
    for other in (copy.copy(x), copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        assert jax.tree.structure(other) == jax.tree.structure(x)
        jax.tree.map(np.testing.assert_array_equal, other, x)


# --- a parameter ----------------------------------------------------------------------------------


def test_training_with_optax(rng):
    """By the gradient of a tensor in flux, which is one too."""
    target = ResonantTensor.from_floats(rng.uniform(0.5, 1.5, (4, 3)), 50)  # none is 0
    parameter = ResonantTensor.zeros((4, 3), 50).flux("float64")

    @jax.jit
    def step(parameter, state):
        def loss(p):
            return jnp.square(
                p.crystallize().to_floats("float64") - target.to_floats("float64")
            ).sum()

        value, slope = jax.value_and_grad(loss)(parameter)
        updates, state = optimizer.update(slope, state, parameter)
        return optax.apply_updates(parameter, updates), state, value

    optimizer = optax.adam(0.1)
    state = optimizer.init(parameter)
    first, losses = None, []
    for _ in range(60):
        parameter, state, value = step(parameter, state)
        losses.append(float(value))
        first = first or parameter
    assert parameter.phase is ResonantPhase.FLUX
    assert first.values.all()  # every number has moved
    assert losses[-1] < 0.05 * losses[0]


@both
def test_flax_serialization(in_phase, rng):
    x, blank = in_phase(tensor(rng)), in_phase(ResonantTensor.zeros((4, 3), 50))
    state = flax.serialization.to_state_dict({"w": x})["w"]
    expected = {"values"} if x.phase == "flux" else {"lattice"}
    assert set(state) == expected
    for restored in (
        flax.serialization.from_state_dict({"w": blank}, {"w": state})["w"],
        flax.serialization.from_bytes({"w": blank}, flax.serialization.to_bytes({"w": x}))["w"],
    ):
        assert jax.tree.structure(restored) == jax.tree.structure(x)
        jax.tree.map(np.testing.assert_array_equal, restored, x)
        np.testing.assert_array_equal(restored.to_floats(), x.to_floats())
    other = blank.crystallize() if x.phase == "flux" else blank.flux()
    with pytest.raises(ValueError, match="ResonantTensor: the state must have the entries"):
        flax.serialization.from_state_dict(other, state)
    with pytest.raises(ValueError, match="GoldenArray: the state must have the entries"):
        flax.serialization.from_state_dict(GoldenArray(1, 0), {"a": 1})


@both
def test_orbax(in_phase, rng, tmp_path):
    import orbax.checkpoint as ocp

    state = {"w": in_phase(tensor(rng))}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
