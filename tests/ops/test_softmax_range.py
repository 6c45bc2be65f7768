"""The softmax operations over all magnitudes: right, or NaN where z is beyond its type.

The kind: a plausible wrong number in silence, because something on the way to a finite result is
too large or too small for its type. The oracle has 64 bits of mantissa and 15 of exponent. A term
scale · log w below the range is −inf, as in the formula in jnp: what it is added to cannot lift it.
"""

import functools

import battery
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from softmax_cases import FUNCTIONS

from syntonic_jax import syntonic_cross_entropy, syntonic_log_softmax, syntonic_softmax

Wide = np.longdouble
PHI_INV = (np.sqrt(Wide(5)) - 1) / 2
ROWS, CLASSES = 1000, 5

pytestmark = [
    pytest.mark.usefixtures("x64"),
    pytest.mark.skipif(np.finfo(Wide).maxexp < 2**14, reason="needs a wider type than float64"),
]


def wide(x):
    return np.asarray(np.asarray(x, np.float64), Wide)


def magnitudes(rng, shape, dtype):
    """Numbers of every size that the type has, rows of one size and of several; none subnormal."""
    info = jnp.finfo(dtype)
    low, high = np.log2(float(info.smallest_normal)), np.log2(float(info.max))
    middle, spread = rng.uniform(low, high, (shape[0], 1)), rng.choice([0.5, 8, 300], (shape[0], 1))
    exponents = np.clip(middle + spread * rng.uniform(-1, 1, (shape[0], CLASSES)), low, high)
    values = Wide(2) ** exponents * rng.choice([-1, 1], (shape[0], CLASSES))
    values = np.clip(values, -float(info.max), float(info.max)).astype(np.float64)
    values = np.where(np.abs(values) < float(info.smallest_normal), info.smallest_normal, values)
    return jnp.asarray(values[:, : shape[1]] if len(shape) > 1 else values[:, 0], dtype)


def drawn(rng, dtype, mode):
    """x, scale and weights, of each row its own."""
    acc = oracles.accumulation(dtype)
    x = magnitudes(rng, (ROWS, CLASSES), dtype)
    # Half of them in the ordinary range, where it is the weights that reach far.
    x = jnp.where(
        jnp.arange(ROWS)[:, None] % 2 == 0, jnp.asarray(rng.normal(size=x.shape), dtype), x
    )
    weights = jnp.abs(magnitudes(rng, (ROWS, CLASSES), dtype if mode == "provided" else acc))
    return x, magnitudes(rng, (ROWS,), acc), weights


class Exact:
    """What the rows should be, and how far rounding of z may move it.

    `infinite`: with a term below the range taken for −inf, as the formula has it in jnp. A fused
    multiply-add keeps it.
    """

    def __init__(self, x, scale, weights, mode, acc, infinite=False):
        top, u = wide(oracles.info(acc).max), Wide(oracles.unit(acc))
        floor = wide(np.asarray(1e-10, acc))
        by = wide(scale)[:, None]
        log = (
            -PHI_INV * wide(weights)
            if mode == "learned"
            else np.log(np.maximum(wide(weights), floor))
        )
        added = by * log
        # So far below all others that their distance counts for nothing; not −inf, less which
        # another −inf would be NaN.
        self.z = wide(x) + np.where(infinite & (added < -top), -1000 * top, added)
        # The product and the sum, of which two differ; a logarithm errs by units of 1 near 1.
        part = np.abs(wide(x)) + np.abs(added) + (mode != "learned") * np.abs(by)
        self.slack = 2 * oracles.STEPS * u * part.max(-1, keepdims=True)
        over = (np.abs(added) > top) | (np.abs(self.z) > top)
        sign = np.where(np.abs(added) > top, added, self.z)
        # NaN: a logit beyond the range, or nothing but logits below it.
        self.lost = (over & (sign > 0)).any(-1) | over.all(-1)
        # And where the class itself is below it, its logarithm is −inf.
        self.below = over & (sign < 0)

    def log(self, slack):
        """log softmax, with the other classes moved by `slack` against each."""
        apart = self.z[:, None, :] - self.z[:, :, None]
        apart = apart + np.where(np.eye(CLASSES, dtype=bool), 0, slack[:, :, None])
        most = apart.max(-1)
        return -(most + np.log(np.exp(apart - most[:, :, None]).sum(-1)))

    @property
    def interval(self):
        return self.log(self.slack), self.log(-self.slack)


def run(name, implementation, mode, x, scale, weights, labels=None):
    """Every row with its own scale and weights."""
    f = functools.partial(FUNCTIONS[name], implementation=implementation)

    def row(x, scale, weights, label):
        given = (x[None], label[None]) if name == "syntonic_cross_entropy" else (x[None],)
        w = {"mode_norms": weights} if mode == "learned" else {"syntony": weights}
        if mode == "provided":
            w["syntony"] = weights[None] + jnp.zeros_like(x[None])
        return f(*given, scale=scale, **w)[0]

    labels = jnp.zeros(len(x), int) if labels is None else labels
    return jax.jit(jax.vmap(row))(x, scale, weights, labels)


def is_right(y, low, high, dtype, acc, lost, infinite):
    """Between the bounds, up to rounding; or NaN in a row that is lost, or infinite where allowed.

    A product beyond the range may survive in a fused multiply-add: then it is to be right, too.
    """
    u, unit = Wide(oracles.unit(acc)), Wide(oracles.unit(dtype))
    most = np.maximum(np.abs(low), np.abs(high))
    # The logarithm of a total of five errs by units of 2; an exponential and a quotient relatively.
    allowed = (
        oracles.STEPS * u * (2 + most) + unit * most + wide(oracles.info(dtype).smallest_normal)
    )
    right = (y >= low - allowed) & (y <= high + allowed)
    right |= np.isinf(y) & (infinite | (most > wide(oracles.info(dtype).max) * (1 - 4 * unit)))
    return right | (np.isnan(y) & lost)


def check(results, given, labels, mode, dtype):
    """Every row of each result by the exact formula, or by the one with −inf."""
    acc = oracles.accumulation(dtype)
    softmax, log_softmax, loss = results
    at = (np.arange(len(loss)), labels)
    answers = []
    for infinite in (False, True):
        exact = Exact(*given, mode, acc, infinite)
        low, high = exact.interval
        lost, below = exact.lost[:, None], exact.below
        assert not lost.all()
        no = np.zeros_like(lost)
        answers.append(
            [
                is_right(softmax, np.exp(low), np.exp(high), dtype, acc, lost, no).all(-1),
                is_right(log_softmax, low, high, dtype, acc, lost, below).all(-1),
                is_right(loss, -high[at], -low[at], acc, acc, exact.lost, below[at]),
            ]
        )
    right = np.any(answers, 0).all(0)
    row = np.argmin(right)
    assert np.all(right), [each[row] for each in (*given, *results)]
    assert np.mean(answers[0]) > 0.9  # the other answer is for few


@pytest.mark.parametrize("mode", ["learned", "provided", "shared"])
@pytest.mark.parametrize("dtype", battery.thinned(oracles.DTYPES, 3))
def test_right_or_beyond_the_range(dtype, mode, implementation, rng):
    given = drawn(rng, dtype, mode)
    labels = rng.integers(0, CLASSES, ROWS)
    results = [
        wide(oracles.real(run(name, implementation, mode, *given, *more)))
        for name, *more in (
            ("syntonic_softmax",),
            ("syntonic_log_softmax",),
            ("syntonic_cross_entropy", jnp.asarray(labels)),
        )
    ]
    check(results, given, labels, mode, dtype)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_small_scale_and_large_norms(dtype, implementation):
    """φ⁻¹ times the least normal scale is none any more: it is the norms that it goes to."""
    acc = oracles.accumulation(dtype)
    least = float(oracles.info(acc).smallest_normal)
    for scale, norms in ((least, [1 / least, 0.0]), (1 / least, [least, 0.0])):
        y = syntonic_softmax(
            jnp.zeros(2, dtype),
            mode_norms=jnp.asarray(norms, acc),
            scale=jnp.asarray(scale, acc),
            implementation=implementation,
        )
        expected = 1 / (1 + np.exp(np.float64(PHI_INV)))
        np.testing.assert_allclose(oracles.real(y)[0], expected, rtol=2 * oracles.unit(dtype))


@pytest.mark.parametrize("dtype", oracles.DTYPES)
@pytest.mark.parametrize("shared", [False, True])
def test_the_floor_of_a_syntony(dtype, shared, implementation):
    """1e-10 is no number of float16, whose least is 6e-8: only 0 is below it there."""
    info = oracles.info(dtype)
    smallest = 2.0**-24 if dtype == "float16" else float(info.smallest_normal)
    syntony = np.array([0, smallest, 1e-3, float(info.max)])
    given = jnp.asarray(syntony if shared else np.tile(syntony, (2, 1)), dtype)
    f = functools.partial(syntonic_log_softmax, implementation=implementation)
    y, pull = jax.vjp(lambda w: f(jnp.zeros((2, 4), "float64"), syntony=w), given)
    weights = np.maximum(oracles.real(given), 1e-10)
    logs = np.log(weights) - np.log(weights.sum(-1, keepdims=True))
    expected = np.broadcast_to(logs, (2, 4))
    # Logarithms of up to 750 and their difference, in float64.
    np.testing.assert_allclose(y, expected, rtol=0, atol=750 * 2.0**-50)
    slope = oracles.real(pull(jnp.ones_like(y).at[:, 3].set(-3.0))[0]).reshape(-1, 4)
    below = oracles.real(given).reshape(-1, 4) <= 1e-10
    np.testing.assert_array_equal(slope[below], 0)
    assert np.all(slope[:, 2] != 0)


@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_logits_at_the_ends_of_the_range(dtype, implementation):
    """Their distance is beyond the type: probability 0, the logarithm −inf, and no NaN."""
    top = float(oracles.info(dtype).max)
    x = jnp.asarray([[top, -top, 0, top], [-top, -top, -top, -top], [0, -top, 1, 2]], dtype)
    options = {"implementation": implementation}
    y, pull = jax.vjp(lambda x: syntonic_softmax(x, **options), x)
    expected = np.array([[0.5, 0, 0, 0.5], [0.25] * 4, [0.09003057, 0, 0.24472847, 0.66524096]])
    np.testing.assert_allclose(oracles.real(y), expected, rtol=oracles.unit(dtype), atol=1e-8)
    assert np.all(np.isfinite(oracles.real(pull(jnp.ones_like(y).at[0].set(2))[0])))
    y, pull = jax.vjp(lambda x: syntonic_log_softmax(x, **options), x)
    assert oracles.real(y)[0, 1] == -np.inf
    assert np.all(np.isfinite(oracles.real(pull(jnp.ones_like(y))[0])))
    loss, pull = jax.vjp(lambda x: syntonic_cross_entropy(x, jnp.array([1, 2, 1]), **options), x)
    # Computed in float32 at least, which holds the distance of those of float16.
    expected = 2 * top + np.log(2) if dtype == "float16" else np.inf
    np.testing.assert_allclose(loss[0], expected, rtol=4 * oracles.unit("float32"))
    np.testing.assert_allclose(
        loss[1:], [np.log(4), top + 2.4076059644], rtol=4 * oracles.unit("float32")
    )
    dx = oracles.real(pull(jnp.ones_like(loss))[0])
    np.testing.assert_allclose(dx[0], [0.5, -1, 0, 0.5], atol=oracles.unit(dtype))
