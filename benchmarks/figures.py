"""Puts stored measurements into README.md and docs/implementation.md, and draws them.

    python benchmarks/figures.py        # after benchmarks/results has changed

Only what stands between `<!-- figures:begin -->` and `<!-- figures:end -->` is written.
"""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into files, with or without a display
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
MARKED = re.compile(r"(<!-- figures:begin -->\n).*?(<!-- figures:end -->)", re.DOTALL)
NONE_YET = (
    "No measurements are stored yet: `python benchmarks/run.py` on a machine with a GPU makes "
    "them.\n"
)
MAIN_OP, MAIN_DTYPE = "phi_residual_layernorm", "bfloat16"
COLOURS = {"cuda": "#b8860b", "xla": "#2f6690"}
NAMES = {"cuda": "kernel", "xla": "XLA"}


def stored(folder: Path = RESULTS) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def main_records(results: dict[str, Any], direction: str) -> dict[str, dict[int, dict[str, Any]]]:
    """The main operation's records: implementation -> row width -> record."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for r in results["records"]:
        if (r["op"], r["dtype"], r["direction"]) == (MAIN_OP, MAIN_DTYPE, direction):
            found.setdefault(r["implementation"], {})[r["shape"][-1]] = r
    return found


# Text.


def markdown(rows: list[list[str]]) -> str:
    """A table: the first row is its head, all columns but the first are aligned right."""
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], rule, *rows[1:]])


def rate(record: dict[str, Any] | None) -> str:
    return f"{record['tbs']:.2f} ({record['share']:.2f})" if record else ""


def source(results: dict[str, Any]) -> str:
    jax_version = results["versions"]["jax"]
    return (
        f"jax {jax_version}, driver {results['driver']}, sources {results['sources_sha256'][:12]}"
    )


def for_readme(results: dict[str, Any]) -> str:
    forward, backward = (main_records(results, d) for d in ("forward", "backward"))
    rows = [["row width", "forward, kernel", "forward, XLA", "backward, kernel", "backward, XLA"]]
    for width in sorted(forward.get("cuda", {})):
        pairs = [(side, name) for side in (forward, backward) for name in ("cuda", "xla")]
        rows.append([str(width)] + [rate(side.get(name, {}).get(width)) for side, name in pairs])
    copy = results["copy_tbs"][MAIN_DTYPE]
    name = re.sub(r"[^a-z0-9]+", "-", results["device"].lower()).strip("-")
    return (
        f"`{MAIN_OP}` on one {results['device']} in {MAIN_DTYPE}: TB/s of ideal bytes, each array "
        "read and written once, and in brackets the share of the "
        f"{copy:.2f} TB/s that a copy reaches in the same run. XLA compiles the same formula "
        f"written in jnp. ({source(results)})\n\n{markdown(rows)}\n"
        f"![Share of the copy bandwidth against row width](benchmarks/results/{name}.png)\n"
    )


def for_implementation(results: dict[str, Any]) -> str:
    by_case: dict[tuple, dict[str, dict[str, Any]]] = {}
    for r in results["records"]:
        key = (r["op"], r["direction"], r["dtype"], tuple(r["shape"]))
        by_case.setdefault(key, {})[r["implementation"]] = r
    rows = [["operation", "direction", "type", "shape", "kernel, ms", "XLA, ms", "XLA / kernel"]]
    for (op, direction, dtype, shape), both in by_case.items():
        if {"cuda", "xla"} <= set(both):
            ours, theirs = both["cuda"]["ms"], both["xla"]["ms"]
            size = " × ".join(map(str, shape))
            times = [f"{ours:.3f}", f"{theirs:.3f}", f"{theirs / ours:.2f}"]
            rows.append([f"`{op}`", direction, dtype, size, *times])
    mixed = [["operation", "type", "shape", "`'cuda'`, ms", "`None`, ms", "jnp, ms"]]
    for (op, _, dtype, shape), ways in by_case.items():
        if {"cuda", "default", "xla"} <= set(ways):
            times = [f"{ways[i]['ms']:.3f}" for i in ("cuda", "default", "xla")]
            mixed.append([f"`{op}`", dtype, " × ".join(map(str, shape)), *times])
    forward = (
        "Forward, where `None` leaves y to XLA's fusions and takes kernels for what is summed:\n\n"
        f"{markdown(mixed)}\n"
    ) * (len(mixed) > 1)
    small_calls = results.get("latencies", [])
    compared = any("us_over_xla" in r for r in small_calls)
    calls = [["operation", "called", "implementation", "µs a call"]]
    calls[0] += ["more than jitted jnp"] * compared
    for r in small_calls:
        way = [r["called"], NAMES[r["implementation"]], f"{r['us']:.1f}"]
        more = [f"{r['us_over_xla']:+.1f}" if "us_over_xla" in r else ""] * compared
        calls.append([f"`{r['op']}`", *way, *more])
    small = " × ".join(map(str, results["latencies"][0]["shape"]))
    return (
        f"On one {results['device']} ({source(results)}):\n\n{markdown(rows)}\n"
        f"{forward}"
        f"Small calls, {small} in {MAIN_DTYPE}, forward:\n\n{markdown(calls)}"
    )


def filled(text: str, figures: str) -> str:
    """`text` with `figures` between its markers."""
    if len(MARKED.findall(text)) != 1:
        raise ValueError("there must be exactly one pair of figures:begin and figures:end")
    return MARKED.sub(lambda match: match[1] + figures + match[2], text)


def expected(root: Path = ROOT) -> dict[Path, str]:
    """What the documents must read, given benchmarks/results."""
    all_results = stored(root / "benchmarks" / "results")
    documents = {"README.md": for_readme, "docs/implementation.md": for_implementation}
    return {
        root / name: filled(
            (root / name).read_text(encoding="utf-8"),
            "\n".join(write(r) for r in all_results) or NONE_YET,
        )
        for name, write in documents.items()
    }


def fill() -> None:
    for path, text in expected().items():
        path.write_text(text, encoding="utf-8")


# Pictures.


def draw(results: dict[str, Any], out: Path) -> None:
    style: dict[Any, Any] = {
        "font.size": 11,
        "axes.titlesize": 13,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": "#e6e6e6",
        "legend.frameon": False,
    }
    with plt.rc_context(style):
        others = sum(
            (r["op"] != MAIN_OP, r["dtype"], r["implementation"]) == (True, MAIN_DTYPE, "xla")
            for r in results["records"]
        )
        heights = [4.5, max(4.5, 0.4 * others)]
        figure: Any = plt.figure(figsize=(12, sum(heights)), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.12)
        top, bottom = figure.subfigures(2, 1, height_ratios=heights)
        copy = results["copy_tbs"][MAIN_DTYPE]
        figure.suptitle(
            f"Share of the bandwidth of a copy ({copy:.2f} TB/s) on {results['device']}",
            fontsize=16,
            fontweight="bold",
        )
        for axes, direction in zip(top.subplots(1, 2, sharey=True), ("forward", "backward")):
            draw_by_width(axes, main_records(results, direction), direction)
        draw_elementwise(bottom.subplots(), results)
        figure.savefig(out, dpi=150, bbox_inches="tight", pad_inches=0.3)
        plt.close(figure)


def draw_by_width(axes, records: dict[str, dict[int, dict[str, Any]]], direction: str) -> None:
    for implementation, by_width in records.items():
        widths = sorted(by_width)
        shares = [by_width[width]["share"] for width in widths]
        colour = COLOURS[implementation]
        axes.plot(widths, shares, "o-", color=colour, label=NAMES[implementation])
    axes.axhline(1, color="#999999", linewidth=1, linestyle=(0, (5, 3)))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(title=f"{MAIN_OP}, {direction}", xlabel=f"row width, {MAIN_DTYPE}", ylim=(0, 1.1))
    axes.grid(visible=True)
    if records:
        axes.legend(loc="lower left")


def draw_elementwise(axes, results: dict[str, Any]) -> None:
    chosen = [
        r
        for r in results["records"]
        if r["dtype"] == MAIN_DTYPE and r["op"] != MAIN_OP and r["implementation"] in COLOURS
    ]

    def label(r: dict[str, Any]) -> str:
        several = len({tuple(c["shape"]) for c in chosen if c["op"] == r["op"]}) > 1
        size = " " + "×".join(map(str, r["shape"])) if several else ""
        return f"{r['op']}{size}, {r['direction']}"

    labels = list(dict.fromkeys(map(label, chosen)))
    for r in chosen:
        place = labels.index(label(r))
        ours = r["implementation"] == "cuda"
        at, colour = place + (-0.2 if ours else 0.2), COLOURS[r["implementation"]]
        bar = axes.barh(at, r["share"], height=0.36, color=colour)
        axes.bar_label(bar, [f"{r['share']:.2f}"], padding=-30, fontsize=9, color="white")
    axes.axvline(1, color="#999999", linewidth=1, linestyle=(0, (5, 3)))
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)  # from the top down
    furthest = max([1.0, *(r["share"] for r in chosen)])
    axes.set(title=f"The other operations, {MAIN_DTYPE}", xlim=(0, 1.05 * furthest))
    axes.grid(visible=True, axis="x")


if __name__ == "__main__":
    fill()
