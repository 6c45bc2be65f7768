"""What a small convolutional network with the normalisation layers must show, written once.

`tests/nn/test_<framework>_norm.py` subclasses the contract and says in `network` how the network,
with the framework's own BatchNorm or with ours, is built there.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import battery
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from layer_contract import described
from sklearn.datasets import load_digits

CLASSES = 10
WIDTHS = (32, 64)  # of two 3 x 3 convolutions; the second has stride 2
MOMENTUM = 0.9


class Network(NamedTuple):
    """Convolution, batch norm and gelu twice, and a dense layer of all places.

    The convolutions have no bias: a batch norm would take it away again. gelu and not relu, whose
    derivative would make a rounding near 0 a difference between two networks.
    """

    init: Callable[..., tuple[Any, Any]]  # x -> parameters and statistics
    apply: Callable[..., tuple[jax.Array, Any]]  # (parameters, statistics, x, train) -> logits, ...


class Trained(NamedTuple):
    losses: list[float]
    parameters: Any
    statistics: Any
    logits: jax.Array  # of the images it did not see, in evaluation mode


@functools.cache
def digits():
    """Images [n, 8, 8, 1] of about mean 0, in an order without pattern."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return (images / 8 - 1).reshape(-1, 8, 8, 1)[order], labels[order]


def batches(count, size, epochs, rng):
    """Indices of the first `count` images, as [steps, size]."""
    steps = count // size
    return np.concatenate(
        [rng.permutation(count)[: steps * size].reshape(steps, size) for _ in range(epochs)]
    )


def train(network: Network, variables, rows, seen: int, dtype, optimizer) -> Trained:
    """Over the batches of `rows`; the images from number `seen` on are only looked at after."""
    images, labels = digits()
    images = jnp.asarray(images, dtype)

    @jax.jit
    def step(parameters, statistics, state, x, labels):
        def loss(parameters):
            logits, new = network.apply(parameters, statistics, x, True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

        (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), statistics, state, value

    parameters, statistics = variables
    state, losses = optimizer.init(parameters), []
    for row in rows:
        parameters, statistics, state, value = step(
            parameters, statistics, state, images[row], labels[row]
        )
        losses.append(value)
    logits, _ = jax.jit(network.apply, static_argnums=3)(
        parameters, statistics, images[seen:], False
    )
    return Trained([float(value) for value in losses], parameters, statistics, logits)


class TrainingContract:
    """Training with ours in place of theirs."""

    def network(self, theirs: bool, dtype, **options) -> Network:
        """With the framework's BatchNorm (use_fast_variance=False where that exists), or ours."""
        raise NotImplementedError

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), battery.thinned([("float64", 1e-9), ("float32", 1e-4)])
    )
    def test_trains_as_the_frameworks(self, rng, dtype, tolerance):
        """20 steps from the same parameters: losses, parameters, statistics and evaluation."""
        with jax.enable_x64(dtype == "float64"):
            ours = self.network(False, dtype, target_variance="standard")
            theirs = self.network(True, dtype)
            images = jnp.asarray(digits()[0][:2], dtype)
            variables = theirs.init(images)
            # The names, too, are theirs.
            assert described(ours.init(images)[0]) == described(variables[0])
            variables = jax.tree.map(
                lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, variables
            )
            rows = batches(1280, 64, 1, rng)
            assert len(rows) == 20
            rule = optax.sgd(0.1, momentum=0.9)
            got, want = (train(n, variables, rows, 1500, dtype, rule) for n in (ours, theirs))
        np.testing.assert_allclose(got.losses, want.losses, rtol=tolerance)
        assert got.losses[-1] < 0.5 * got.losses[0]
        for (path, a), b, start in zip(
            jax.tree_util.tree_leaves_with_path(got[1:]),
            jax.tree.leaves(want[1:]),
            [*jax.tree.leaves(variables), None],
            strict=True,
        ):
            assert a.dtype == b.dtype
            error = np.max(np.abs(a - b)) / np.max(np.abs(b))
            assert error <= tolerance, f"{path}: {error:.2g}"
            assert start is None or not np.array_equal(a, start), f"{path} did not move"

    def test_golden_mode_reads_digits(self):
        """Test accuracy of images that training did not see."""
        seen = 1437  # four fifths
        network = self.network(False, "float32")
        rows = batches(seen, 64, 10, np.random.default_rng(0))
        rule = optax.adam(optax.cosine_decay_schedule(5e-3, len(rows)))
        images, labels = digits()
        variables = network.init(jnp.asarray(images[:2], "float32"))
        trained = train(network, variables, rows, seen, "float32", rule)
        assert np.mean(trained.logits.argmax(-1) == labels[seen:]) >= 0.98
