"""Trains a small network on the digits whose weights lie on the golden lattice.

    pip install '.[examples]' && python examples/quantised.py

Every weight is crystallized on its way into the network, to the nearest a + bφ with |a| and |b| up
to the precision, and the gradient goes straight through to the float underneath. At precision 1
there are nine numbers to choose from, at 100 some are 0.004 apart. The plain network is trained
beside it, from the same start and on the same batches.
"""

import argparse
import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from syntonic_jax import crystallize, phi_residual_gelu
from syntonic_jax.lattice import snap_distance

PIXELS, WIDTH, CLASSES, BLOCKS = 64, 64, 10, 3
BATCH, LEARNING_RATE = 64, 3e-3
PRECISIONS = (1, 2, 3, 5, 10, 20, 50, 100)


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images and labels to train on, images and labels to test on."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 8 - 1).astype(np.float32)
    split: Any = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    return split[0], split[2], split[1], split[3]


def initial(key) -> dict[str, jax.Array]:
    sizes = [PIXELS] + [WIDTH] * (BLOCKS + 1) + [CLASSES]
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = itertools.pairwise(sizes)
    return {
        f"w{i}": jax.random.normal(k, shape) * shape[0] ** -0.5
        for i, (k, shape) in enumerate(zip(keys, shapes))
    }


def logits(weights, images, precision: int | None):
    if precision is not None:
        weights = {name: crystallize(w, precision) for name, w in weights.items()}
    x = images @ weights["w0"]
    for i in range(1, BLOCKS + 1):
        x = phi_residual_gelu(x, x @ weights[f"w{i}"])
    return x @ weights[f"w{BLOCKS + 1}"]


def train(precision: int | None, epochs: int, seed: int = 0) -> tuple[float, float]:
    """Test accuracy in percent, and how far the weights are from the lattice at the end."""
    images, labels, test_images, test_labels = load()
    steps = len(labels) // BATCH
    weights = initial(jax.random.key(seed))
    rule = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, epochs * steps))

    def loss(weights, images, labels):
        scores = logits(weights, images, precision)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    @jax.jit
    def epoch(weights, state, batches):
        def step(carry, batch):
            weights, state = carry
            updates, state = rule.update(jax.grad(loss)(weights, *batch), state)
            return (optax.apply_updates(weights, updates), state), None

        return jax.lax.scan(step, (weights, state), batches)[0]

    order, state = np.random.default_rng(seed), rule.init(weights)
    for _ in range(epochs):
        chosen = order.permutation(len(labels))[: steps * BATCH].reshape(steps, BATCH)
        weights, state = epoch(weights, state, (images[chosen], labels[chosen]))
    right = logits(weights, test_images, precision).argmax(-1) == test_labels
    every = jnp.concatenate([w.ravel() for w in weights.values()])
    return 100 * float(right.mean()), float(snap_distance(every, precision or 100).mean())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20, help="at least 1 (default 20)")
    parser.add_argument("--seeds", type=int, default=3, help="runs to average (default 3)")
    parser.add_argument("--precision", type=int, nargs="*", default=list(PRECISIONS))
    options = parser.parse_args(argv)
    if options.epochs < 1 or options.seeds < 1:
        parser.error("--epochs and --seeds must be at least 1")

    table = Table("weights", "test accuracy", "lowest", "mean snap distance")
    for precision in (None, *options.precision):
        runs = [train(precision, options.epochs, seed) for seed in range(options.seeds)]
        accuracies, distances = zip(*runs)
        table.add_row(
            "plain" if precision is None else f"precision {precision}",
            f"{np.mean(accuracies):.2f} %",
            f"{min(accuracies):.2f} %",
            "" if precision is None else f"{np.mean(distances):.2g}",
        )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
