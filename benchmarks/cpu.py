"""Every operation on a CPU beside the jnp that a user would write instead: ratios of times.

    python benchmarks/cpu.py                                # prints the table
    python benchmarks/cpu.py --out docs/performance.md      # and puts it between its marks there
    python benchmarks/cpu.py --ops syntonic_softmax --out found.json

Both are compiled, and take turns in one process, so that what slows the machine slows both. A ratio
is the median over the turns of our time over that of plain jnp in the same turn, forward, and for
the gradient: a program of the forward pass and the cotangents of all arrays and parameters. Below 1
ours is faster. It compares lowerings to jnp (`implementation='xla'`), not kernels.
"""

import argparse
import functools
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))  # for `python -P`, which leaves it out

import cases

import syntonic_jax
from syntonic_jax import PHI_INV

DTYPES = ("float32", "bfloat16")
ROWS = ((4096, 1024), (64, 128, 1000))
CLASSES = (*ROWS, (1024, 50257))
CHANNELS_LAST = ((32, 28, 28, 128), (8192, 512))
CHANNELS_FIRST = ((32, 128, 28, 28),)
IGNORED = -100
MARKED = re.compile(r"(<!-- cpu:begin -->\n).*?(<!-- cpu:end -->)", re.DOTALL)


class Pair(NamedTuple):
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    operands: str = "x"  # x, an array; p, a parameter; v, a positive one; m, a mask; l, labels
    shapes: tuple[tuple[int, ...], ...] = ROWS
    axis: int = -1  # of the parameters
    gradient: bool = True


def ours(name: str, *names: str, first: bool = False, **options: Any) -> Callable[..., Any]:
    """An operation of data, and then of operands by `names`; the first result alone if so."""
    function = getattr(syntonic_jax, name)

    def call(*given):
        data = given[: len(given) - len(names)]
        rest = dict(zip(names, given[len(data) :], strict=True))
        results = function(*data, **rest, **options, implementation="xla")
        return results[0] if first else results

    return call


def wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def plain_batch_norm_inference(x, mean, var, scale, bias):
    slope = jax.lax.rsqrt(var + 1e-5) * PHI_INV**0.5 * scale
    return ((wide(x) - mean) * slope + bias).astype(x.dtype)


def plain_statistics(x):
    axes = tuple(range(x.ndim - 1))
    return wide(x).mean(axes), wide(x).var(axes)


def plain_of_shared(x, syntony):
    return jax.nn.softmax(wide(x) + jnp.log(syntony)).astype(x.dtype)


def plain_learned_loss(x, norms, labels):
    return optax.softmax_cross_entropy_with_integer_labels(wide(x) - PHI_INV * norms, labels)


def plain_ignoring_loss(x, labels):
    kept = labels != IGNORED
    loss = optax.softmax_cross_entropy_with_integer_labels(x, jnp.where(kept, labels, 0))
    return jnp.where(kept, loss, 0)


def learned_loss(x, norms, labels):
    return syntonic_jax.syntonic_cross_entropy(x, labels, mode_norms=norms, implementation="xla")


def plain_masked(x, where):
    return jax.nn.softmax(x, where=where)


def of_case(operation: cases.Operation) -> Pair:
    """What is measured on a GPU, here."""
    ours = functools.partial(operation.ours, implementation="xla")
    kinds = "x" * operation.arrays + "p" * operation.parameters
    return Pair(ours, operation.plain, kinds)


# Rows, and numbers by themselves, are those of the GPU.
OPERATIONS = {
    name: of_case(operation)
    for name, operation in cases.OPERATIONS.items()
    if not operation.shapes and operation.backward_passes is not None
} | {
    "golden_batch_norm": Pair(
        ours("golden_batch_norm", first=True), cases.plain_batch_norm, "xpp", CHANNELS_LAST
    ),
    "golden_batch_norm, channels first": Pair(
        ours("golden_batch_norm", first=True, axis=1),
        functools.partial(cases.plain_batch_norm, axis=1),
        "xpp",
        CHANNELS_FIRST,
        axis=1,
    ),
    "golden_batch_norm_inference": Pair(
        ours("golden_batch_norm_inference"), plain_batch_norm_inference, "xpvpp", CHANNELS_LAST
    ),
    "output_statistics": Pair(syntonic_jax.output_statistics, plain_statistics, "x", CHANNELS_LAST),
    "syntonic_softmax": Pair(ours("syntonic_softmax"), jax.nn.softmax, "x", CLASSES),
    "syntonic_softmax, inner axis": Pair(
        ours("syntonic_softmax", axis=1), functools.partial(jax.nn.softmax, axis=1), "x", ROWS[1:]
    ),
    "syntonic_softmax, one syntony": Pair(
        ours("syntonic_softmax", "syntony"), plain_of_shared, "xv"
    ),
    "syntonic_softmax, masked": Pair(ours("syntonic_softmax", "where"), plain_masked, "xm"),
    "syntonic_log_softmax": Pair(ours("syntonic_log_softmax"), jax.nn.log_softmax, "x", CLASSES),
    "syntonic_cross_entropy": Pair(
        ours("syntonic_cross_entropy"),
        optax.softmax_cross_entropy_with_integer_labels,
        "xl",
        CLASSES,
    ),
    "syntonic_cross_entropy, learned": Pair(learned_loss, plain_learned_loss, "xpl"),
    "syntonic_cross_entropy, ignore_index": Pair(
        ours("syntonic_cross_entropy", ignore_index=IGNORED), plain_ignoring_loss, "xl"
    ),
    # its gradient is the cotangent itself; the composition has 201 candidates for every number
    "crystallize": Pair(
        ours("crystallize"), cases.plain_crystallize, "x", ((256, 256),), gradient=False
    ),
}


def drawn(pair: Pair, shape: tuple[int, ...], dtype: str) -> tuple[jax.Array, ...]:
    def one(kind: str, key: Any) -> jax.Array:
        if kind == "l":
            labels = jax.random.randint(key, shape[:-1], 0, shape[-1])
            return labels.at[..., ::7].set(IGNORED) if pair.plain is plain_ignoring_loss else labels
        if kind == "m":
            return jax.random.bernoulli(key, 0.9, shape)
        if kind == "x":
            return jax.random.normal(key, shape, dtype)
        values = jax.random.normal(key, (shape[pair.axis],), jnp.float32)
        return jnp.exp(values) if kind == "v" else values

    keys = jax.random.split(jax.random.key(0), len(pair.operands))
    return tuple(map(one, pair.operands, keys))


def cotangents_of(function: Callable[..., Any], kinds: str) -> Callable[..., Any]:
    """The gradient of all arrays and parameters, with the forward pass in the same program.

    A function of the operands and, behind them, of a tree of the cotangents of the results.
    """
    moved = [i for i, kind in enumerate(kinds) if kind in "xpv"]

    def gradient(*operands):
        *operands, cotangents = operands

        def of_moved(*values):
            full = list(operands)
            for i, value in zip(moved, values, strict=True):
                full[i] = value
            return function(*full)

        results, pull = jax.vjp(of_moved, *(operands[i] for i in moved))
        # Two ways to the same may have results of two types: a loss in that of the logits, say.
        given = jax.tree.map(lambda ct, y: ct.astype(y.dtype), cotangents, results)
        return pull(given)

    return gradient


def drawn_cotangents(function: Callable[..., Any], operands: tuple[jax.Array, ...]) -> Any:
    results, tree = jax.tree.flatten(jax.eval_shape(function, *operands))
    keys = jax.random.split(jax.random.key(1), len(results))
    return tree.unflatten(
        [jax.random.normal(k, y.shape, y.dtype) for k, y in zip(keys, results, strict=True)]
    )


def seconds(call: Callable[..., Any], operands: tuple[jax.Array, ...], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = call(*operands)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def compared(functions: list[Callable[..., Any]], operands, turns: int, minimum: float):
    """Milliseconds of the first of two functions, and the median of the ratio of their times."""
    both = [jax.jit(f).lower(*operands).compile() for f in functions]
    for call in both:
        seconds(call, operands, 1)
    calls = max(1, int(minimum / seconds(both[0], operands, 1)))
    times: list[list[float]] = [[], []]
    for turn in range(turns):
        for which in (0, 1) if turn % 2 else (1, 0):
            times[which].append(seconds(both[which], operands, calls))
    ratios = [a / b for a, b in zip(*times, strict=True)]
    return 1e3 * statistics.median(times[0]), statistics.median(ratios)


def measure(name: str, dtype: str, shape: tuple[int, ...], options) -> dict[str, Any]:
    pair = OPERATIONS[name]
    operands = drawn(pair, shape, dtype)
    record: dict[str, Any] = {"op": name, "dtype": dtype, "shape": list(shape)}
    for direction in ["forward"] + ["gradient"] * pair.gradient:
        functions = [pair.ours, pair.plain]
        if direction == "gradient":
            operands = (*operands, drawn_cotangents(pair.plain, operands))
            functions = [cotangents_of(f, pair.operands) for f in functions]
        ms, ratio = compared(functions, operands, options.turns, options.seconds)
        record[direction] = {"ms": round(ms, 4), "ratio": round(ratio, 3)}
    return record


def processor() -> str:
    """What the machine calls its processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def description() -> dict[str, Any]:
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "optax")}
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "versions": {"python": platform.python_version(), **versions},
    }


HEAD = ("operation", "type", "shape", "forward, ms", "ratio", "gradient, ms", "ratio")


def cells(record: dict[str, Any]) -> list[str]:
    def of(direction: str) -> list[str]:
        found = record.get(direction)
        return ["", ""] if found is None else [f"{found['ms']:.3g}", f"{found['ratio']:.2f}"]

    size = " × ".join(map(str, record["shape"]))
    return [record["op"], record["dtype"], size, *of("forward"), *of("gradient")]


def markdown(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        f"On {results['cores']} cores of one {results['processor']}, {versions}:\n",
        "| " + " | ".join(HEAD) + " |",
        "|---|---|---" + "|---:" * (len(HEAD) - 3) + "|",
    ]
    for record in results["records"]:
        name, *rest = cells(record)
        lines.append("| " + " | ".join([f"`{name}`", *rest]) + " |")
    return "\n".join(lines) + "\n"


def filled(text: str, table: str) -> str:
    """`text` with `table` between its marks."""
    if len(MARKED.findall(text)) != 1:
        raise ValueError("there must be exactly one pair of cpu:begin and cpu:end")
    return MARKED.sub(lambda match: match[1] + table + match[2], text)


def write(results: dict[str, Any], path: Path) -> None:
    """As JSON, or between the marks of a page."""
    if path.suffix == ".json":
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    else:
        path.write_text(filled(path.read_text(encoding="utf-8"), markdown(results)), "utf-8")


def table_of(results: dict[str, Any]) -> Table:
    table = Table(title=f"{results['processor']}: times of ours over those of plain jnp")
    for i, column in enumerate(HEAD):
        table.add_column(column, justify="left" if i < 3 else "right")
    for record in results["records"]:
        table.add_row(*cells(record))
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = list(OPERATIONS)
    parser.add_argument("--ops", nargs="+", choices=names, default=names, metavar="OP")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--turns", type=int, default=15, help="of each of the two")
    parser.add_argument("--seconds", type=float, default=0.02, help="of a turn, at least")
    parser.add_argument("--elements", type=int, help="of an array, at most")
    parser.add_argument("--out", type=Path, nargs="+", default=[], help="JSON, or a marked page")
    options = parser.parse_args(argv)
    console = Console(width=max(Console().width, 120))  # the table, also where it goes into a file

    def size(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if options.elements is None:
            return shape
        return cases.fitted(shape, options.elements, OPERATIONS[name].axis)

    todo = [
        (name, dtype, size(name, shape))
        for name in options.ops
        for shape in OPERATIONS[name].shapes
        for dtype in options.dtypes
    ]
    results = description()
    with jax.default_device(jax.devices("cpu")[0]):
        results["records"] = [
            measure(*case, options)
            for case in track(todo, "measuring", console=console, transient=True)
        ]
    for path in options.out:
        write(results, path)
    console.print(table_of(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
