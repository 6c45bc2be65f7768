"""Measures every operation on the GPU of this machine, beside what XLA makes of plain jnp.

    python benchmarks/run.py            # everything, under five minutes on an H100
    python benchmarks/run.py --quick    # a few widths in bfloat16

Prints a table, stores benchmarks/results/<device>.json, draws <device>.png beside it and puts the
figures into README.md and docs/implementation.md. What a record means:

ms           median time of a call on the device: calls enqueued back to back, so that the time to
             enqueue one hides behind the one before; ms_spread is the distance of the quartiles
us           of a small call, where only that time is felt; us_over_xla is the median difference
             from jitted jnp in the same turn
ideal_bytes  each array read once, each result written once
tbs, share   ideal bytes over time, in TB/s, and over that of a device-to-device copy in this run,
             the faster of two: before all else and after
launches     operations of the compiled program that run on the device; a custom call counts once
peak_bytes   arguments, results and temporaries of the compiled program

The implementation is `cuda` (kernels), `xla` (plain jnp) or, where None is neither, `default`.
"""

import argparse
import hashlib
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))  # for `python -P`, which leaves it out

import cases
import figures
from cases import Case

ROOT = Path(__file__).parent.parent
SOURCES = ("cuda", "src/ffi", "syntonic_jax/ops", "syntonic_jax/lattice")
ARRAY_BYTES = 1 << 28  # 2^27 elements of bfloat16: far beyond any cache, and no launch is felt
SMALL = (32, 1024)  # where only the launch is felt
# Operations of a compiled program that stand for nothing the device does.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "call"}


def series(call: Callable[..., Any], sets: list[tuple], n: int) -> float:
    """Seconds a call, of n calls on rotating arguments."""
    start = time.perf_counter()
    for i in range(n):
        result = call(*sets[i % len(sets)])
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / n


def seconds_a_call(call: Callable[..., Any], sets: list[tuple], minimum: float) -> list[float]:
    """Of several series of calls, each at least `minimum` seconds long."""
    series(call, sets, len(sets))  # loads kernels
    n = 2 * len(sets)
    n = max(n, int(minimum / series(call, sets, n)) + 1)
    return [series(call, sets, n) for _ in range(7)]


def launches(program: str) -> int:
    """Counts in the text of a compiled program what runs on the device.

    Computations that XLA captures into a CUDA graph are called from the entry computation and
    count by their contents.
    """
    bodies = dict(
        re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL)
    )
    entry = re.search(r"^ENTRY %?([\w.\-]+) ", program, re.MULTILINE)
    assert entry

    def count(name: str) -> int:
        total = 0
        for line in bodies[name].splitlines():
            opcode = re.search(r" = .*?[\])}] ([\w\-]+)\(", line)
            total += bool(opcode and opcode[1] not in FREE)
            if opcode and opcode[1] == "call":
                total += count(re.search(r"to_apply=%?([\w.\-]+)", line)[1])  # type: ignore[index]
        return total

    return count(entry[1])


def measure(case: Case, minimum: float) -> dict[str, Any]:
    function, first = case.call(seed=0)
    compiled = jax.jit(function).lower(*first).compile()
    sets = [first, case.call(seed=1)[1]]
    # The second set of a backward pass holds another closure over the same program.
    sets[1] = jax.tree.unflatten(jax.tree.structure(first), jax.tree.leaves(sets[1]))
    times = seconds_a_call(compiled, sets, minimum)
    seconds = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4)
    memory: Any = compiled.memory_analysis()
    tbs = case.ideal_bytes / seconds / 1e12
    return {
        "op": case.op,
        "direction": case.direction,
        "dtype": case.dtype,
        "shape": list(case.shape),
        "implementation": case.implementation,
        "ms": round(1e3 * seconds, 5),
        "ms_spread": round(1e3 * (high - low), 5),
        "ideal_bytes": case.ideal_bytes,
        "tbs": round(tbs, 4),
        "launches": launches(str(compiled.as_text())),
        "peak_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
    }


def copy_bandwidth(dtype: str, array_bytes: int, minimum: float) -> float:
    """TB/s of a device-to-device copy, bytes read and bytes written."""
    count = array_bytes // jnp.dtype(dtype).itemsize
    sets = [(jax.random.normal(jax.random.key(seed), (count,), dtype),) for seed in range(2)]
    copy = jax.jit(jnp.copy).lower(*sets[0]).compile()
    return 2 * array_bytes / statistics.median(seconds_a_call(copy, sets, minimum)) / 1e12


def latencies(ops: list[str], implementations: list[str], minimum: float) -> list[dict[str, Any]]:
    """Microseconds a call at a size where the device has nearly nothing to do.

    Short series of all ways to call all operations take turns: a host that is slow for a while is
    slow for all of them, and for none of them throughout.
    """
    ways: dict[tuple[str, str, str], Callable[..., Any]] = {}
    operands = {}
    for op in ops:
        any_case = Case(op, "forward", "bfloat16", SMALL, "xla")
        operands[op] = [any_case.operands(0), any_case.operands(1)]
        for implementation in implementations:
            case = Case(op, "forward", "bfloat16", SMALL, implementation)
            ways[op, implementation, "jit"] = jax.jit(case.function())
            if implementation != "xla":
                ways[op, implementation, "eager"] = case.function()
    for (op, *_), call in ways.items():
        series(call, operands[op], len(operands[op]))  # loads kernels
    turns, end = [], time.perf_counter() + 20 * minimum * len(ways)
    while len(turns) < 5 or time.perf_counter() < end:
        turns.append({way: 1e6 * series(call, operands[way[0]], 60) for way, call in ways.items()})
    found = []
    for way in ways:
        op, implementation, called = way
        record = {
            "op": op,
            "dtype": "bfloat16",
            "shape": list(SMALL),
            "implementation": implementation,
            "called": called,
            "us": round(statistics.median(turn[way] for turn in turns), 2),
        }
        jnp_way = (op, "xla", "jit")
        if jnp_way in ways and way != jnp_way:
            more = statistics.median(turn[way] - turn[jnp_way] for turn in turns)
            record["us_over_xla"] = round(more, 2)
        found.append(record)
    return found


def said_by(*command: str) -> str | None:
    """The first line a program prints; None where there is no such program, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.partition("\n")[0].strip()


def sources_sha256() -> str:
    """Of what the figures are figures of."""
    digest = hashlib.sha256()
    for path in sorted(p for folder in SOURCES for p in (ROOT / folder).rglob("*.*")):
        if path.suffix in (".py", ".cc", ".cu", ".cuh", ".h"):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def description(device: Any, commit: str | None) -> dict[str, Any]:
    names = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "syntonic-jax")
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    versions = {name: installed[name] for name in names if name in installed}
    return {
        "device": device.device_kind,
        "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": {"python": platform.python_version(), **versions},
        "commit": commit or said_by("git", "rev-parse", "HEAD"),
        "sources_sha256": sources_sha256(),
    }


def stem(device: Any) -> str:
    """What the files of results of such a device are called."""
    return re.sub(r"[^a-z0-9]+", "-", device.device_kind.lower()).strip("-")


def table_of(results: dict[str, Any]) -> Table:
    table = Table(title=f"{results['device']}: share of the bandwidth of a copy")
    for column in ("operation", "direction", "type", "shape", "", "ms", "TB/s", "share"):
        right = column in ("ms", "TB/s", "share", "shape")
        table.add_column(column, justify="right" if right else "left")
    table.add_column("launches", justify="right")
    previous = None
    for r in results["records"]:
        place = (r["op"], r["direction"], r["dtype"], " x ".join(map(str, r["shape"])))
        shown = place if place != previous else ("",) * 4
        figures_of = (f"{r['ms']:.4f}", f"{r['tbs']:.3f}", f"{r['share']:.3f}", str(r["launches"]))
        table.add_row(*shown, r["implementation"], *figures_of)
        previous = place
    return table


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = list(cases.OPERATIONS)
    parser.add_argument("--quick", action="store_true", help="bfloat16 and few widths only")
    parser.add_argument("--ops", nargs="+", choices=names, default=names, metavar="OP")
    parser.add_argument("--widths", nargs="+", type=int, help="row widths instead of the usual")
    parser.add_argument("--implementations", nargs="+", choices=["cuda", "xla"])
    parser.add_argument("--array-bytes", type=int, default=ARRAY_BYTES, help="of one array")
    parser.add_argument("--seconds", type=float, default=0.03, help="of a series of calls")
    parser.add_argument("--out", type=Path, help="folder instead of benchmarks/results")
    parser.add_argument("--commit", help="of the sources, where git cannot tell it")
    options = parser.parse_args(argv)
    options.implementations = options.implementations or ["cuda", "xla"]
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    console = Console(width=max(Console().width, 120))  # the table, also where it goes into a file
    device = jax.devices()[0]
    widths = cases.QUICK if options.quick else cases.FULL
    if options.widths:
        widths = dict.fromkeys(widths, tuple(options.widths))

    results = description(device, options.commit)

    def copies() -> dict[str, float]:
        return {d: copy_bandwidth(d, options.array_bytes, options.seconds) for d in widths}

    before = copies()
    todo = list(cases.cases(options.ops, widths, options.implementations, options.array_bytes))
    results["records"] = [
        measure(case, options.seconds)
        for case in track(todo, "measuring", console=console, transient=True)
    ]
    after = copies()
    # A slow while of the device must not make the shares look better than they are.
    copy_tbs = {dtype: max(before[dtype], after[dtype]) for dtype in widths}
    results["copy_tbs"] = {dtype: round(tbs, 4) for dtype, tbs in copy_tbs.items()}
    for record in results["records"]:
        record["share"] = round(record["tbs"] / copy_tbs[record["dtype"]], 4)
    results["latencies"] = latencies(options.ops, options.implementations, options.seconds)

    folder = options.out or figures.RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    name = stem(device)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    figures.draw(results, folder / f"{name}.png")
    if folder == figures.RESULTS:
        figures.fill()

    console.print(table_of(results))
    for r in results["latencies"]:
        console.print(f"{r['op']:24} {r['called']:5} {r['implementation']:4} {r['us']:8.1f} µs")
    console.print(f"copy, TB/s: {results['copy_tbs']}    stored: {folder / name}.json, .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
