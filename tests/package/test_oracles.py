"""The oracles against each other: derivatives in closed form against differences of the values."""

import numpy as np
import oracles
import oracles_norm
import oracles_softmax
import pytest


def difference(f, x, direction, step=1e-5):
    """Central difference; errs by about step**2 + 1e-16 / step, some 1e-10 here."""
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "golden_gelu"])
@pytest.mark.parametrize("mode", oracles.MODES)
def test_phi_residual_cotangents(rng, mode, activation):
    identity, residual, ct, direction = rng.normal(size=(4, 30))
    # Clear of the kink of relu, where a difference is no derivative.
    z = oracles.residual_sum(identity, residual, mode, "float64").value
    identity = identity + np.where(np.abs(z) < 0.1, 1.0, 0.0)
    cotangents = oracles.phi_residual_vjp(
        identity, residual, ct, mode, activation, acc="float64", stored="float64"
    )

    def value(identity, residual):
        return np.sum(
            ct * oracles.phi_residual(identity, residual, mode, activation, acc="float64").value
        )

    for got, slope in zip(
        cotangents,
        (
            difference(lambda v: value(v, residual), identity, direction),
            difference(lambda v: value(identity, v), residual, direction),
        ),
        strict=True,
    ):
        np.testing.assert_allclose(np.sum(got.value * direction), slope, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("mode", oracles.MODES)
def test_layernorm_cotangents(rng, mode):
    s, c = oracles.MODES[mode]
    identity, residual, ct_y, ct_z = rng.normal(size=(4, 3, 7))
    scale, bias = rng.normal(size=(2, 7))
    options = {"epsilon": 0.01, "variance": oracles.PHI_INV, "acc": "float64"}

    def value(identity, residual, scale, bias):
        z = s * (identity + c * residual)
        y = oracles.layernorm(oracles.exactly(z), scale, bias, **options).value
        return np.sum(ct_y * y + ct_z * z)

    operands = [identity, residual, scale, bias]
    z = oracles.exactly(s * (identity + c * residual))
    got = oracles.layernorm_vjp(z, ct_y, ct_z, scale, mode=mode, **options)
    for i, cotangent in enumerate(got):
        direction = rng.normal(size=operands[i].shape)
        slope = difference(
            lambda v, i=i: value(*operands[:i], v, *operands[i + 1 :]), operands[i], direction
        )
        np.testing.assert_allclose(np.sum(cotangent.value * direction), slope, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("features", [(-1,), (1,), (2, 0)], ids=str)
def test_batch_norm_cotangents(rng, features, masked):
    shape = (4, 3, 5)
    x, ct_y = rng.normal(size=(2, *shape))
    channels = [shape[a] for a in range(3) if a in {f % 3 for f in features}]
    scale, bias, ct_mean, ct_var = rng.normal(size=(4, *channels))
    where = (rng.random(shape) < 0.5) | (np.indices(shape).sum(0) % 3 == 0) if masked else None
    options = {
        "features": features,
        "epsilon": 0.01,
        "variance": oracles.PHI_INV,
        "where": where,
        "acc": "float64",
    }

    def value(*operands):
        y, mean, var = oracles_norm.batch_norm(*operands, **options)
        return sum(np.sum(a * b.value) for a, b in ((ct_y, y), (ct_mean, mean), (ct_var, var)))

    operands = [x, scale, bias]
    got = oracles_norm.batch_norm_vjp(x, ct_y, ct_mean, ct_var, scale, **options)
    for i, cotangent in enumerate(got):
        direction = rng.normal(size=operands[i].shape)
        slope = difference(
            lambda v, i=i: value(*operands[:i], v, *operands[i + 1 :]), operands[i], direction
        )
        np.testing.assert_allclose(np.sum(cotangent.value * direction), slope, rtol=1e-7, atol=1e-7)


def test_batch_norm_is_a_layer_norm_of_other_axes(rng):
    x, ct = rng.normal(size=(2, 7, 4))
    options = {"epsilon": 0.1, "variance": 2.5, "acc": "float64"}
    batch = oracles_norm.batch_norm(x, **options).y
    layer = oracles.layernorm(oracles.exactly(x.T), **options)
    np.testing.assert_allclose(batch.value, layer.value.T, rtol=0, atol=1e-14)
    pulled = oracles_norm.batch_norm_vjp(x, ct, **options).x
    other = oracles.layernorm_vjp(oracles.exactly(x.T), ct.T, mode="standard", **options).identity
    np.testing.assert_allclose(pulled.value, other.value.T, rtol=0, atol=1e-14)


@pytest.mark.parametrize("weights", ["mode_norms", "syntony"])
@pytest.mark.parametrize("function", ["softmax", "log", "loss"])
def test_softmax_cotangents(rng, function, weights):
    """Along axis 1, with a mask of which one row is nothing else, and labels of all kinds."""
    x, ct, w = rng.normal(size=(3, 4, 5, 2))
    w = np.abs(w[0, :, 0]) if weights == "mode_norms" else np.exp(w)
    where = (rng.random(x.shape) < 0.7) | (np.arange(5) == 1)[:, None]
    where[0, :, 0] = False
    labels = np.array([[1, 1], [1, 7], [-1, 1], [1, 1]])
    operands = {"x": x, weights: w, "scale": 0.7}

    def logits(operands):
        return oracles_softmax.logits(**operands, axis=1, where=where, acc="float64")

    z, ct_rows = logits(operands), np.moveaxis(ct, 1, -1)
    dz = {
        "softmax": lambda: oracles_softmax.softmax_vjp(z, ct_rows, "float64"),
        "log": lambda: oracles_softmax.log_softmax_vjp(z, ct_rows),
        "loss": lambda: oracles_softmax.cross_entropy_vjp(z, labels, ct_rows[..., 0]),
    }[function]()

    def value(operands):
        z = logits(operands)
        if function == "loss":
            loss = oracles_softmax.cross_entropy(z, labels).value
            return np.sum(ct_rows[..., 0] * np.where(np.isfinite(loss), loss, 0.0))
        y = getattr(oracles_softmax.normalised(z), function).value
        return np.sum(ct_rows * np.where(z.kept, y, 0.0))

    others = oracles_softmax.parameters_vjp(z, dz)
    for name, operand in operands.items():
        got = dz if name == "x" else getattr(others, name)
        got = np.moveaxis(got.value, -1, 1) if np.ndim(got.value) == 3 else got.value
        direction = rng.normal(size=np.shape(operand))
        slope = difference(lambda v, name=name: value(operands | {name: v}), operand, direction)
        np.testing.assert_allclose(np.sum(got * direction), slope, rtol=1e-7, atol=1e-7)


def test_softmax_of_special_rows():
    x = np.array([[0.0, 0.0], [3.0, 1e4], [5.0, 6.0]])
    z = oracles_softmax.logits(x, where=[[True, True], [True, True], [False, False]], acc="float32")
    results = oracles_softmax.normalised(z)
    np.testing.assert_array_equal(results.softmax.value, [[0.5, 0.5], [0, 1], [0, 0]])
    np.testing.assert_array_equal(results.log.value[2], -np.inf)
    for labels, expected in (([0, 1, 0], [np.log(2), 0, 0]), ([2, -1, 9], [np.nan, np.nan, 0])):
        np.testing.assert_array_equal(oracles_softmax.cross_entropy(z, labels).value, expected)


def test_slack_of_a_mean_far_from_zero(rng):
    """Far below the spacing of float32 numbers there, which one rounded mean would cost."""
    x = rng.normal(1e4, size=(64, 3)).astype(np.float32)
    spacing = oracles.ulp(1e4, "float32")
    assert np.all(oracles_norm.batch_norm(x, acc="float32").y.slack < spacing / 4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rounding_is_that_of_the_type(rng, dtype):
    # Casting from float32 rounds once, so there round_to has something to be compared with.
    x = np.ldexp(rng.normal(size=2000), rng.integers(-20, 20, size=2000)).astype(np.float32)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(oracles.round_to(x, dtype), oracles.real(x.astype(dtype)))
    at_the_edge = float(oracles.info(dtype).max) * np.array([1, 2, -2])
    np.testing.assert_array_equal(
        oracles.round_to(at_the_edge, dtype), [at_the_edge[0], np.inf, -np.inf]
    )


def test_rounding_is_done_once():
    above_a_tie = 1 + 2.0**-8 + 2.0**-40
    assert oracles.round_to(above_a_tie, "bfloat16") == 1 + 2.0**-7
    assert oracles.round_to(np.float32(above_a_tie), "bfloat16") == 1  # by way of float32


def test_ulp():
    np.testing.assert_array_equal(oracles.ulp([1.0, 1.99, 2.0], "bfloat16"), [2**-7, 2**-7, 2**-6])
    assert oracles.ulp(0.0, "float16") == 2.0**-24


def test_comparison_can_fail(rng):
    exact = rng.normal(size=50)
    good = exact.astype(np.float32)
    oracles.assert_close(good, oracles.Estimate(exact, np.zeros(50)))
    for wrong in (np.nextafter(good, np.float32(9)), good * np.float32(np.nan)):
        with pytest.raises(AssertionError, match="values are off"):
            oracles.assert_close(wrong, oracles.Estimate(exact, np.zeros(50)))
    with pytest.raises(AssertionError, match="shape"):
        oracles.assert_close(good[:3], oracles.Estimate(exact, np.zeros(50)))
