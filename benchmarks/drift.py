"""How far a chain of phi residuals in floats drifts from the same chain in exact arithmetic.

    python benchmarks/drift.py    # draws docs/drift.png and fills in the table of its page

Each of 1,000 steps adds a residual over φ, a random number of the lattice with coefficients up to
100, to 64 sums that start at 1. The exact chain has the sums themselves, the floating-point ones
get the residuals in their own type, each rounded once. Runs on the CPU, from one seed.
"""

import math
import sys
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))  # for `python -P`, which leaves it out

import figures

from syntonic_jax import ResonantTensor, phi_residual
from syntonic_jax.lattice import GoldenArray

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).parent.parent / "docs"
STEPS, SIZE, COEFFICIENT = 1000, 64, 100
SHOWN = (1, 10, 100, 1000)
COLOURS = {"bfloat16": "#9a3b3b", "float16": "#b8860b", "float32": "#2f6690", "float64": "#3a6b35"}
# To 200 bits: far beyond what any of the types resolves.
PHI = Fraction((1 << 200) + math.isqrt(5 << 400), 1 << 201)


def chains(dtype: str, residuals: GoldenArray) -> tuple[GoldenArray, jax.Array]:
    """The sums after every step: exact, and in floats."""

    def exact_step(z: ResonantTensor, r):
        z = phi_residual(z, ResonantTensor(r))
        return z, z.lattice

    def float_step(z, r):
        z = phi_residual(z, r)
        return z, z

    _, exact = jax.lax.scan(exact_step, ResonantTensor.ones(SIZE), residuals)
    _, floats = jax.lax.scan(float_step, jnp.ones(SIZE, dtype), residuals.to_float(dtype))
    return exact, floats


def drift(exact: GoldenArray, floats: jax.Array, step: int) -> float:
    """The largest distance after so many steps."""
    a, b, z = (np.asarray(x[step - 1]) for x in (exact.a, exact.b, floats))
    return max(
        float(abs(Fraction(float(f)) - int(i) - int(j) * PHI))
        for f, i, j in zip(z, a, b, strict=True)
    )


def measured(seed: int = 0) -> dict[str, dict[int, float]]:
    rng = np.random.default_rng(seed)
    steps = sorted({*map(int, np.geomspace(1, STEPS, 40)), *SHOWN})
    with jax.enable_x64(True):
        coefficients = rng.integers(-COEFFICIENT, COEFFICIENT + 1, (2, STEPS, SIZE))
        residuals = GoldenArray(*coefficients.astype("int32"))
        results = {}
        for dtype in COLOURS:
            exact, floats = chains(dtype, residuals)
            results[dtype] = {step: drift(exact, floats, step) for step in steps}
    return results


def draw(results: dict[str, dict[int, float]], out: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for dtype, series in results.items():
        steps, values = zip(*series.items(), strict=True)
        axes.plot(steps, values, color=COLOURS[dtype], linewidth=1.6)
        axes.annotate(
            dtype,
            (steps[-1], values[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            color=COLOURS[dtype],
            va="center",
        )
    axes.set(xscale="log", yscale="log", xlabel="steps", xlim=(1, 2 * STEPS))
    axes.set_title(
        "Largest distance from the exact sum, which is the baseline: 0", loc="left", weight="bold"
    )
    axes.grid(color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def table(results: dict[str, dict[int, float]]) -> str:
    rows = ["| type | " + " | ".join(f"{n} steps" for n in SHOWN) + " |"]
    rows.append("| --- |" + " ---: |" * len(SHOWN))
    for dtype, series in results.items():
        rows.append(f"| {dtype} | " + " | ".join(f"{series[n]:.2g}" for n in SHOWN) + " |")
    return "\n".join([*rows, "| exact |" + " 0 |" * len(SHOWN)])


def main() -> int:
    results = measured()
    page = DOCS / "exact-arithmetic.md"
    page.write_text(
        figures.filled(page.read_text(encoding="utf-8"), table(results)), encoding="utf-8"
    )
    draw(results, DOCS / "drift.png")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
