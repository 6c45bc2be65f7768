"""Trains a deep phi-residual network on scikit-learn's handwritten digits.

    pip install '.[examples]' && python examples/digits.py

The network is a stack of pre-norm blocks in Flax NNX: each adds its branch to the residual stream
and normalises the sum in one call of PhiResidualLayerNorm. It runs on whatever device jax has.

The picture it writes has the loss and accuracy of the training on top, and below what the residual
mode does to activations before any training: without normalisation, a block whose branch has the
norm of its input and no correlation with it multiplies the norm by

    standard        |x + f|         sqrt(2)          = 1.414
    phi             |x + f / phi|   sqrt(1 + 1/phi²) = 1.176
    phi_symmetric   |x + f| / phi   sqrt(2) / phi    = 0.874

and 64 such blocks are measured beside these predictions.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from jax.scipy.ndimage import map_coordinates
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from syntonic_jax import PHI, PHI_INV, PhiResidualMode, golden_gelu
from syntonic_jax.nn.nnx import PhiResidual, PhiResidualLayerNorm

matplotlib.use("Agg")  # draws into files, with or without a display

SIDE, CLASSES = 8, 10
WIDTH, BATCH, LEARNING_RATE, WEIGHT_DECAY = 96, 64, 2e-3, 1e-2
GROWTH = {
    PhiResidualMode.STANDARD: math.sqrt(2),
    PhiResidualMode.PHI: math.sqrt(1 + PHI_INV**2),
    PhiResidualMode.PHI_SYMMETRIC: math.sqrt(2) / PHI,
}
COLOURS = {
    PhiResidualMode.STANDARD: "#9a3b3b",
    PhiResidualMode.PHI: "#b8860b",
    PhiResidualMode.PHI_SYMMETRIC: "#2f6690",
}


# The network.


class Branch(nnx.Module):
    """What a block adds to the residual stream."""

    def __init__(self, rngs: nnx.Rngs):
        self.inner = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.outer = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.outer(golden_gelu(self.inner(x)))


class Block(nnx.Module):
    """Adds the branch of the block before to the stream, and branches off the normalised sum."""

    def __init__(self, mode: PhiResidualMode, rngs: nnx.Rngs):
        self.norm = PhiResidualLayerNorm(WIDTH, mode=mode, return_sum=True, rngs=rngs)
        self.branch = Branch(rngs)

    def __call__(self, stream, branch):
        y, stream = self.norm(stream, branch)
        return stream, self.branch(y)


class Network(nnx.Module):
    """[batch, 64] pixels -> [batch, 10] logits."""

    def __init__(self, depth: int, mode: PhiResidualMode, rngs: nnx.Rngs):
        self.embed = nnx.Linear(SIDE * SIDE, WIDTH, rngs=rngs)
        self.first = Branch(rngs)
        self.blocks = stacked(lambda rngs: Block(mode, rngs), depth - 1, rngs)
        self.norm = PhiResidualLayerNorm(WIDTH, mode=mode, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, images):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def through(block, carry):
            return block(*carry)

        stream = self.embed(images)
        return self.head(self.norm(*through(self.blocks, (stream, self.first(stream)))))


def stacked(make, depth: int, rngs: nnx.Rngs):
    """`depth` blocks as one, their parameters with a leading axis: traced and compiled once."""
    return nnx.split_rngs(splits=depth)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)


# Training.


class Digits(NamedTuple):
    images: np.ndarray  # [n, 64], from -1 to 1
    labels: np.ndarray  # [n]


class History(NamedTuple):
    train_loss: list[float]  # one entry an epoch each
    test_loss: list[float]
    train_accuracy: list[float]
    test_accuracy: list[float]


def load(seed: int) -> tuple[Digits, Digits]:
    """Four fifths to train on, one fifth to test on."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 8 - 1).astype(np.float32)
    split: Any = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=seed)
    return Digits(split[0], split[2]), Digits(split[1], split[3])


def moved(images, key):
    """Each image shifted by up to a pixel, and a little turned, sheared and stretched."""
    turn_key, shift_key = jax.random.split(key)
    turns = jnp.eye(2) + 0.12 * jax.random.normal(turn_key, (len(images), 2, 2))
    shifts = jax.random.uniform(shift_key, (len(images), 2), minval=-1.0, maxval=1.0)
    middle = (SIDE - 1) / 2
    pixels = jnp.stack(jnp.meshgrid(*[jnp.arange(SIDE) - middle] * 2, indexing="ij"))

    def move(image, turn, shift):
        at = jnp.einsum("ij,jhw->ihw", turn, pixels) + middle + shift[:, None, None]
        return map_coordinates(image.reshape(SIDE, SIDE), list(at), order=1, cval=-1.0).ravel()

    return jax.vmap(move)(images, turns, shifts)


def scores(logits, labels):
    """Mean cross-entropy, and the part that is right."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, (logits.argmax(-1) == labels).mean()


@nnx.jit
def evaluate(network, images, labels):
    return scores(network(images), labels)


@nnx.jit
def train_step(network, optimizer, images, labels, key):
    targets = optax.smooth_labels(jax.nn.one_hot(labels, CLASSES), 0.1)

    def objective(network):
        logits = network(moved(images, key))
        return optax.softmax_cross_entropy(logits, targets).mean(), scores(logits, labels)

    gradients, measured = nnx.grad(objective, has_aux=True)(network)
    optimizer.update(network, gradients)
    return measured


def train(depth: int, mode: PhiResidualMode, epochs: int, seed: int, console: Console) -> History:
    training, test = load(seed)
    steps = len(training.labels) // BATCH
    network = Network(depth, mode, nnx.Rngs(seed))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, LEARNING_RATE, max(1, epochs * steps // 10), epochs * steps
    )
    rule = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
    )
    optimizer = nnx.Optimizer(network, rule, wrt=nnx.Param)
    order, key = np.random.default_rng(seed), jax.random.key(seed)
    history = History([], [], [], [])

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=epochs * steps, figures="compiling")
        for epoch in range(epochs):
            shuffled = order.permutation(len(training.labels))
            figures = []
            for batch in shuffled[: steps * BATCH].reshape(steps, BATCH):
                key, step_key = jax.random.split(key)
                images, labels = training.images[batch], training.labels[batch]
                figures.append(train_step(network, optimizer, images, labels, step_key))
                progress.advance(task)
            loss, accuracy = np.mean(jax.device_get(figures), axis=0)
            test_loss, right = jax.device_get(evaluate(network, *test))
            for series, value in zip(history, (loss, test_loss, accuracy, right), strict=True):
                series.append(float(value))
            shown = f"epoch {epoch + 1}  loss {loss:.3f}  test accuracy {right:.2%}"
            progress.update(task, figures=shown)
    return history


# Activations before training.


def norms_by_depth(
    *, depth: int = 64, networks: int = 8, seed: int = 0
) -> dict[PhiResidualMode, np.ndarray]:
    """Root mean square activation after 0, 1, ..., depth blocks, relative to the input.

    The branches are two linear layers around a ReLU, at the initialisation that keeps the mean
    square of their input on average; there is no normalisation. Every mode gets the same branches
    and the same input, and an array [networks, depth + 1].
    """
    width, batch = 256, 32

    def make(rngs):
        he = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
        return nnx.Sequential(
            nnx.Linear(width, width, rngs=rngs),
            nnx.relu,
            nnx.Linear(width, width, kernel_init=he, rngs=rngs),
        )

    @jax.jit
    @jax.vmap
    def measure(key):
        branches = stacked(make, depth, nnx.Rngs(key))
        start = jax.random.normal(key, (batch, width))

        def norms(mode):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=(nnx.Carry, 0))
            def through(branch, x):
                x = PhiResidual(branch, mode)(x)
                return x, jnp.mean(x * x)

            return jnp.sqrt(through(branches, start)[1] / jnp.mean(start * start))

        return [norms(mode) for mode in GROWTH]

    measured = measure(jax.random.split(jax.random.key(seed), networks))
    return {
        mode: np.insert(np.asarray(norms), 0, 1.0, axis=1)
        for mode, norms in zip(GROWTH, measured, strict=True)
    }


def overall(norms: np.ndarray) -> np.ndarray:
    """One norm of all networks: the root of the mean square, whose expectation is predicted."""
    return np.sqrt(np.mean(norms**2, axis=0))


def growth(norms: np.ndarray) -> float:
    """Factor a block."""
    return float(overall(norms)[-1] ** (1 / (norms.shape[1] - 1)))


# The picture.


def draw(history: History, norms: dict[PhiResidualMode, np.ndarray], title: str, out: Path):
    style: dict[Any, Any] = {
        "font.size": 11,
        "axes.titlesize": 13,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "legend.frameon": False,
    }
    with plt.rc_context(style):
        figure: Any = plt.figure(figsize=(12, 10), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.12)
        top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.3])
        figure.suptitle(title, fontsize=16, fontweight="bold")
        loss, accuracy = top.subplots(1, 2)
        draw_training(loss, accuracy, history)
        draw_norms(bottom.subplots(), norms)
        figure.savefig(out, dpi=150, bbox_inches="tight", pad_inches=0.3)
        plt.close(figure)


def draw_training(loss, accuracy, history: History):
    epochs = np.arange(1, len(history.train_loss) + 1)
    gold, blue = COLOURS[PhiResidualMode.PHI], COLOURS[PhiResidualMode.PHI_SYMMETRIC]
    loss.plot(epochs, history.train_loss, color=blue, label="training, moved images")
    loss.plot(epochs, history.test_loss, color=gold, label="test")
    loss.set(title="Cross-entropy", xlabel="epoch", yscale="log")
    loss.legend()

    accuracy.plot(epochs, 100 * np.array(history.train_accuracy), color=blue)
    accuracy.plot(epochs, 100 * np.array(history.test_accuracy), color=gold)
    accuracy.set(title="Accuracy", xlabel="epoch", ylim=(70, 101))
    accuracy.yaxis.set_major_formatter("{x:.0f} %")
    final = 100 * history.test_accuracy[-1]
    accuracy.plot(epochs[-1:], [final], "o", color=gold, clip_on=False)
    accuracy.annotate(
        f"{final:.2f} % on the test set",
        (1, 0.06),
        xycoords="axes fraction",
        ha="right",
        color=gold,
        fontsize=13,
        fontweight="bold",
    )


def draw_norms(axes, norms: dict[PhiResidualMode, np.ndarray]):
    dashes = (0, (5, 3))
    for mode, measured in norms.items():
        depth, mean, colour = np.arange(measured.shape[1]), overall(measured), COLOURS[mode]
        axes.fill_between(depth, measured.min(0), measured.max(0), color=colour, alpha=0.18, lw=0)
        axes.plot(depth, GROWTH[mode] ** depth, color=colour, linestyle=dashes, linewidth=1.3)
        axes.plot(depth[::2], mean[::2], "o", color=colour, markersize=4.5)
        axes.annotate(
            f"{mode.value}\npredicted × {GROWTH[mode]:.3f} a block\n"
            f"measured × {growth(measured):.3f}",
            (depth[-1], GROWTH[mode] ** depth[-1]),
            xytext=(14, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
        )
    some = next(iter(norms.values()))
    networks, depth = some.shape[0], some.shape[1] - 1
    grey = "#555555"
    axes.plot([], [], "o", color=grey, markersize=4.5, label=f"mean of {networks} networks")
    axes.fill_between([], [], color=grey, alpha=0.25, lw=0, label="lowest to highest")
    axes.plot([], [], color=grey, linestyle=dashes, linewidth=1.3, label="predicted")
    axes.legend(loc="upper left")
    axes.set(
        title="Norm of the activations at initialisation, relative to the input",
        xlabel="blocks",
        yscale="log",
        xlim=(0, depth + 0.5),
    )


# The program.


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    # Here the stream, and with it the gradient, shrinks by 1/phi a block: to nothing in 32.
    symmetric = "phi_symmetric learns at depths up to 12"
    parser.add_argument("--mode", choices=list(map(str, GROWTH)), default="phi", help=symmetric)
    parser.add_argument("--depth", type=int, default=32, help="blocks, at least 2 (default 32)")
    parser.add_argument("--epochs", type=int, default=60, help="at least 1 (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    parser.add_argument("--out", type=Path, default=Path("digits.png"), help="the picture")
    parser.add_argument("--require", type=float, help="fail below this test accuracy, in percent")
    options = parser.parse_args(argv)
    if options.depth < 2 or options.epochs < 1:
        parser.error("--depth must be at least 2, --epochs at least 1")
    return options


def main(argv: list[str] | None = None) -> int:
    options, console, start = arguments(argv), Console(), time.monotonic()
    mode = PhiResidualMode(options.mode)
    device = jax.devices()[0]
    console.print(
        f"[bold]{options.depth} {mode.value} residual blocks[/bold] of width {WIDTH} "
        f"on {device.device_kind} ({device.platform})"
    )
    history = train(options.depth, mode, options.epochs, options.seed, console)
    norms = norms_by_depth(seed=options.seed)

    table = Table("mode", "predicted", "measured", title="Growth of the norm a block, 64 blocks")
    for each, measured in norms.items():
        table.add_row(each.value, f"{GROWTH[each]:.4f}", f"{growth(measured):.4f}")
    console.print(table)

    title = f"{options.depth} {mode.value} residual blocks on the digits data set"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(history, norms, title, options.out)

    accuracy = 100 * history.test_accuracy[-1]
    console.print(f"picture: {options.out}    time: {time.monotonic() - start:.0f} s")
    console.print(f"[bold]test accuracy: {accuracy:.2f} %[/bold]")
    if options.require is not None and accuracy < options.require:
        console.print(f"[bold red]below the required {options.require:.2f} %[/bold red]")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
