"""The kernels of the golden norms against the float64 oracle and XLA's result in the same type."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import oracles_norm
import pytest
from batch_norm_check import check_inference

from syntonic_jax import golden_batch_norm, golden_batch_norm_inference, golden_layer_norm

pytestmark = pytest.mark.gpu

SHAPES = [  # of rows, channels last and channels first, and the feature axis
    ((1, 7), -1),
    ((257, 1), -1),
    ((4099, 33), -1),
    ((1000, 97), -1),
    ((129, 2048), -1),
    ((3, 70001), -1),
    ((64, 7, 7, 1), -1),
    ((64, 7, 7, 3), -1),
    ((5, 13, 11, 17), -1),
    ((32, 14, 14, 196), -1),
    ((4, 7, 7, 2048), -1),
    ((1, 28, 28, 97), -1),
    ((64, 1, 7, 7), 1),
    ((64, 3, 7, 7), 1),
    ((5, 17, 13, 11), 1),
    ((32, 196, 14, 14), 1),
    ((4, 2048, 7, 7), 1),
    ((1, 97, 28, 28), 1),
    ((129, 251, 1), 1),
    ((3, 5, 300, 301), 1),
    ((4, 5, 3, 2), 1),  # planes of whole pairs of numbers, and of no more
    ((33, 3, 7, 14), 1),
    ((70, 3, 56, 56), 1),  # planes beyond a block: of whole packs, of halves
    ((6, 5, 34, 34), 1),
    ((4, 4, 30, 35), 1),
]
WIDTHS = (1, 7, 33, 768, 1000, 4096, 16384, 65536)

FUNCTIONS = {"batch": golden_batch_norm, "layer": golden_layer_norm}
shapes = pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)


@functools.partial(jax.jit, static_argnames=("kind", "implementation", "options"))
def value_and_cotangents(kind, operands, cotangents, implementation, options=()):
    """Results and the cotangents of all operands: x and whatever parameters there are."""

    def f(*operands):
        return FUNCTIONS[kind](*operands, implementation=implementation, **dict(options))

    results, pull = jax.vjp(f, *operands)
    return results, pull(cotangents)


def draw(rng, shape, axis, dtype, kind="batch", mean=0.5):
    """Operands, and the cotangents of y and, for a batch norm, of mean and var."""
    acc, channels = oracles.accumulation(dtype), shape[axis]
    x = jnp.asarray(rng.normal(mean, size=shape), dtype)
    parameters = [jnp.asarray(p, acc) for p in rng.normal(size=(2, channels))]
    ct = jnp.asarray(rng.normal(size=shape), dtype)
    if kind == "layer":
        return (x, *parameters), ct
    return (x, *parameters), (ct, *(jnp.asarray(c, acc) for c in rng.normal(size=(2, channels))))


def expected(kind, operands, cotangents, axis, acc, **options):
    """Estimates of all results and cotangents, by name."""
    x, scale, bias = operands
    options = {"variance": oracles.PHI_INV, "acc": acc, **options}
    if kind == "batch":
        options["features"] = (axis,)
        results = oracles_norm.batch_norm(x, scale, bias, **options)
        pulled = oracles_norm.batch_norm_vjp(x, *cotangents, scale, **options)
        return results._asdict() | {f"d_{name}": e for name, e in pulled._asdict().items()}
    z = oracles.exactly(x)
    pulled = oracles.layernorm_vjp(z, cotangents, None, scale, mode="standard", **options)
    d_x, _, d_scale, d_bias = pulled
    y = oracles.layernorm(z, scale, bias, **options)
    return {"y": y, "d_x": d_x, "d_scale": d_scale, "d_bias": d_bias}


def relative_error(actual, exact) -> float:
    return float(np.linalg.norm(oracles.real(actual) - exact) / np.linalg.norm(exact))


def cancelled(name, exact, operands, cotangents, axis) -> float:
    """How much larger a sum of such terms of random sign would be on average, at least 1."""
    _, scale, bias = (oracles.real(operand) for operand in operands)
    terms = oracles.real(cotangents[0] if isinstance(cotangents, tuple) else cotangents)
    if name == "d_scale":
        terms = terms * np.moveaxis(
            (np.moveaxis(exact["y"].value, axis, -1) - bias) / scale, -1, axis
        )
    return max(1.0, float(np.linalg.norm(terms) / np.linalg.norm(exact[name].value)))


def check(kind, operands, cotangents, axis=-1, **options):
    """Within the oracle's bounds, and no further from it than XLA's result."""
    x = operands[0]
    acc = oracles.accumulation(x.dtype)
    given = (*options.items(), ("axis", axis))
    exact = expected(kind, operands, cotangents, axis, acc, **options)
    found = {}
    for implementation in ("cuda", "xla"):
        pair = value_and_cotangents(kind, operands, cotangents, implementation, given)
        actual = dict(zip(exact, jax.tree.leaves(pair), strict=True))
        if implementation == "cuda":
            for name, estimate in exact.items():
                oracles.assert_close(actual[name], estimate, name)
        found[implementation] = {
            name: relative_error(actual[name], estimate.value)
            for name, estimate in exact.items()
            if np.any(estimate.value)
        }
    width = x.shape[axis]
    terms = x.size // width if kind == "batch" else width
    if terms == 1:  # XLA simplifies what is left of such rows: x - x is 0
        return
    for name, error in found["cuda"].items():
        # Both round once, and which values lie near a tie is a matter of chance; so is what the
        # order of a sum of n terms leaves, a random walk of n roundings.
        sums = name in ("d_scale", "d_bias")
        most = max(terms, x.size // width) if sums else terms
        noise = (2 + most**0.5) * oracles.unit(acc)
        if sums:
            noise *= cancelled(name, exact, operands, cotangents, axis)
        noise += oracles.unit(np.asarray(actual[name]).dtype) / 4
        assert error <= 1.1 * found["xla"][name] + noise, (name, error, found["xla"][name])


# --- batch norm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@shapes
def test_batch_norm(shape, axis, dtype, rng, x64):
    check("batch", *draw(rng, shape, axis, dtype), axis)


@pytest.mark.parametrize(
    ("shape", "axis"), [((999, 33), -1), ((16, 28, 28, 24), -1), ((16, 24, 28, 28), 1)], ids=str
)
def test_mean_of_batch_far_above_deviation(shape, axis, rng, x64):
    """To 1e-5 in float32, where E[x**2] - E[x]**2 differs by multiples of 8."""
    operands, cotangents = draw(rng, shape, axis, "float32", mean=1e4)
    check("batch", operands, cotangents, axis)
    y, mean, var = golden_batch_norm(
        operands[0], axis=axis, epsilon=0.0, target_variance="standard", implementation="cuda"
    )
    exact = oracles_norm.batch_norm(operands[0], features=(axis,), epsilon=0.0, acc="float32")
    np.testing.assert_allclose(mean, exact.mean.value, rtol=oracles.unit("float32") * 2)
    np.testing.assert_allclose(var, exact.var.value, rtol=1e-5)
    assert relative_error(y, exact.y.value) < 1e-5


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("shape", "axis"), [((300, 40), -1), ((9, 40, 7, 7), 1)], ids=str)
def test_poisoned_channel_spoils_no_other(shape, axis, poison, rng):
    (x, *parameters), cotangents = draw(rng, shape, axis, "float32")
    x = jnp.moveaxis(jnp.moveaxis(x, axis, 0).at[13].set(poison), 0, axis)
    results, gradients = value_and_cotangents(
        "batch", (x, *parameters), cotangents, "cuda", (("axis", axis),)
    )
    for values in (*results, *gradients[:2]):
        channels = jnp.moveaxis(values, axis if values.ndim > 1 else 0, 0).reshape(40, -1)
        finite = np.isfinite(channels)
        assert not finite[13].any()
        assert np.delete(finite, 13, axis=0).all()
    assert np.isfinite(gradients[2]).all()


@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("shape", "axis"), [((99, 64), -1), ((9, 31, 7, 7), 1)], ids=str)
def test_optional_operands_and_results_of_batch_norm(shape, axis, given, rng):
    """Every subset of scale and bias, and of the gradients that are asked for."""
    (x, *parameters), (ct, *_) = draw(rng, shape, axis, "float32")
    names = [n for n, g in zip(("scale", "bias"), given) if g]
    parameters = [p for p, g in zip(parameters, given) if g]

    def gradients(implementation, argnums):
        def loss(x, *values):
            y, _, var = golden_batch_norm(
                x, **dict(zip(names, values)), axis=axis, implementation=implementation
            )
            return jnp.sum(y * ct) + jnp.sum(jnp.sqrt(var))

        return jax.jit(jax.grad(loss, argnums))(x, *parameters)

    count = 1 + len(parameters)
    for argnums in [tuple(range(count)), *((i,) for i in range(count))]:
        for ours, theirs in zip(gradients("cuda", argnums), gradients("xla", argnums)):
            # The same sums in another order, in float32.
            assert relative_error(ours, oracles.real(theirs)) < 64 * oracles.unit("float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("shape", "axis"), [((16, 7, 7, 33), -1), ((16, 33, 7, 7), 1)], ids=str)
def test_masked_batch_norm(shape, axis, dtype, rng):
    operands, cotangents = draw(rng, shape, axis, dtype)
    where = rng.random((shape[0], *(1 for _ in shape[1:]))) < 0.6
    where[:2] = True

    @jax.jit
    def both(operands, cotangents):
        def f(*operands):
            return golden_batch_norm(*operands, axis=axis, where=where, implementation="cuda")

        results, pull = jax.vjp(f, *operands)
        return results, pull(cotangents)

    exact = expected("batch", operands, cotangents, axis, "float32", where=where)
    found = jax.tree.leaves(both(operands, cotangents))
    for actual, (name, estimate) in zip(found, exact.items(), strict=True):
        oracles.assert_close(actual, estimate, name)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@shapes
def test_inference(shape, axis, dtype, rng, x64):
    """With the statistics of the batch, rounded: y for just these numbers."""
    (x, *parameters), _ = draw(rng, shape, axis, dtype)
    acc = oracles.accumulation(dtype)
    exact = oracles_norm.batch_norm(x, features=(axis,), acc=acc)
    statistics = [jnp.asarray(e.value, acc) for e in exact[1:]]
    for implementation in ("cuda", "xla"):
        check_inference(implementation, x, statistics, parameters, axis=axis)


def test_inference_of_few_very_wide_rows(rng):
    """So wide that the rows a block might have, if there were as many, pass 2**31 elements."""
    width = 8_600_001
    x = jnp.asarray(rng.integers(-4, 5, (1, width)), "bfloat16")
    shift = jnp.asarray(rng.integers(-4, 5, width), "float32")
    zero, one = jnp.zeros(width, "float32"), jnp.ones(width, "float32")
    y = golden_batch_norm_inference(
        *(x, zero, one, one, shift),
        target_variance="standard",
        epsilon=0.0,
        implementation="cuda",
    )
    np.testing.assert_array_equal(np.asarray(y, "float32")[0], np.asarray(x[0], "float32") + shift)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("shape", "axis"), [((64, 7, 7, 96), -1), ((64, 96, 7, 7), 1)], ids=str)
def test_default_of_batch_norm(shape, axis, dtype, rng):
    """Sums by kernels and y by XLA, which fuses it with what follows."""
    operands, cotangents = draw(rng, shape, axis, dtype)
    given = (("axis", axis),)
    exact = expected("batch", operands, cotangents, axis, "float32")
    found = value_and_cotangents("batch", operands, cotangents, None, given)
    for actual, (name, estimate) in zip(jax.tree.leaves(found), exact.items(), strict=True):
        oracles.assert_close(actual, estimate, name)

    def fused(*operands):
        y = golden_batch_norm(*operands, axis=axis)[0]
        return jax.nn.relu(y)

    program = jax.jit(fused).lower(*operands).compile().as_text()
    assert "syntonic_golden_batch_norm_moments" in program
    assert "syntonic_golden_batch_norm_normalise" not in program


# --- layer norm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(width, dtype, rng, x64):
    rows = max(3, min(1000, 2**17 // width)) | 1  # odd: the last block is not full
    check("layer", *draw(rng, (rows, width), -1, dtype, "layer"))


@pytest.mark.parametrize("width", [33, 1000, 16384])
def test_mean_of_row_far_above_deviation(width, rng, x64):
    check("layer", *draw(rng, (5, width), -1, "float32", "layer", mean=1e4))


@pytest.mark.parametrize("axis", [0, 1, (1, 2), (0, 2), (0, 1, 2)], ids=str)
def test_other_axes_of_layer_norm(axis, rng):
    """As the last axis of the same numbers, moved there."""
    x = jnp.asarray(rng.normal(size=(6, 33, 20)), "float32")
    axes = (axis,) if isinstance(axis, int) else axis
    last = tuple(range(-len(axes), 0))
    rows = np.moveaxis(np.asarray(x), axes, last)
    flat = rows.reshape(*rows.shape[: 3 - len(axes)], -1)
    scale = jnp.asarray(rng.normal(size=rows.shape[3 - len(axes) :]), "float32")
    y = golden_layer_norm(x, scale, axis=axis, implementation="cuda")
    exact = oracles.layernorm(
        oracles.exactly(flat), np.ravel(scale), variance=oracles.PHI_INV, acc="float32"
    )
    oracles.assert_close(np.moveaxis(np.asarray(y), axes, last).reshape(flat.shape), exact)


# --- both -----------------------------------------------------------------------------------------

EXAMPLES = [
    ("batch", (4, 60, 33), -1),
    ("batch", (4, 6, 7, 7, 24), -1),
    ("batch", (4, 6, 24, 7, 7), 1),
    ("layer", (4, 6, 33), -1),
    ("layer", (4, 6, 16384), -1),
]


@pytest.mark.parametrize(("kind", "shape", "axis"), EXAMPLES, ids=str)
def test_batched_parameters(kind, shape, axis, rng, x64):
    """Groups: one scale an example, and gradients of a shared bias for each."""
    examples = [draw(rng, shape[1:], axis, "float32", kind) for _ in range(shape[0])]
    bias = examples[0][0][2]
    stack = functools.partial(jax.tree.map, lambda *leaves: jnp.stack(leaves))
    x, scale, _ = stack(*(operands for operands, _ in examples))
    cotangents = stack(*(cotangents for _, cotangents in examples))

    def both(x, scale, cotangents):
        operands = x, scale, bias
        return value_and_cotangents(kind, operands, cotangents, "cuda", (("axis", axis),))

    found = jax.tree.leaves(jax.vmap(both)(x, scale, cotangents))
    for i, (operands, cts) in enumerate(examples):
        operands = (*operands[:2], bias)
        exact = expected(kind, operands, cts, axis, "float32")
        for actual, (name, estimate) in zip(found, exact.items(), strict=True):
            oracles.assert_close(actual[i], estimate, name)


@pytest.mark.parametrize(
    ("kind", "shape", "axis"),
    [
        ("batch", (4099, 512), -1),
        ("batch", (65537, 3), -1),
        ("batch", (32, 28, 28, 96), -1),
        ("batch", (32, 96, 28, 28), 1),
        ("batch", (64, 2048, 7, 7), 1),
        ("batch", (64, 16, 56, 56), 1),
        ("layer", (2049, 768), -1),
        ("layer", (33, 65536), -1),
    ],
    ids=str,
)
def test_same_bits_every_time(kind, shape, axis, rng):
    """Twenty runs of forward and backward pass, the parameter gradients included."""
    given = (("axis", axis),)
    operands, cotangents = draw(rng, shape, axis, "bfloat16", kind)
    first = value_and_cotangents(kind, operands, cotangents, "cuda", given)
    for _ in range(20):
        again = value_and_cotangents(kind, operands, cotangents, "cuda", given)
        jax.tree.map(np.testing.assert_array_equal, again, first)
