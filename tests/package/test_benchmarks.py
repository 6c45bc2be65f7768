"""The benchmark on arrays too small to mean anything: its whole path, with the test double."""

import copy
import importlib.util
import json
import math
from pathlib import Path

import pytest

from syntonic_jax import _dispatch

pytestmark = [pytest.mark.slow, pytest.mark.once]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ("--quick", "--widths", "32", "--array-bytes", "8192", "--seconds", "0.0001")


@pytest.fixture(scope="module")
def run():
    """benchmarks/run.py as a module."""
    spec = importlib.util.spec_from_file_location("run", BENCHMARKS / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(run, tmp_path_factory, installed_double):
    folder = tmp_path_factory.mktemp("results")
    assert run.main([*TINY, "--out", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {"cpu.json", "cpu.png"}
    assert (folder / "cpu.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return json.loads((folder / "cpu.json").read_text())


def test_every_operation_is_measured_in_every_way(results):
    measured = {(r["op"], r["direction"], r["implementation"]) for r in results["records"]}
    others = {"golden_batch_norm_inference", "output_statistics", "syntonic_log_softmax"}
    functions = set(_dispatch.OPERATIONS) - others  # whose kernels are those of another
    batch_norms = {"golden_batch_norm, channels first", "golden_batch_norm, then relu"}
    functions |= batch_norms
    functions |= {"syntonic_softmax, inner axis", "syntonic_softmax, learned"}
    with_backward = functions - {"crystallize", "golden_batch_norm, then relu"}
    expected = {(op, "forward", i) for op in functions for i in ("cuda", "xla")}
    expected |= {(op, "backward", i) for op in with_backward for i in ("cuda", "xla")}
    expected |= {(op, "forward", "default") for op in ("golden_batch_norm", *batch_norms)}
    assert measured == expected


def test_records_are_whole_and_consistent(results):
    assert set(results) == {
        "device",
        "driver",
        "versions",
        "commit",
        "sources_sha256",
        "copy_tbs",
        "records",
        "latencies",
    }
    passes = {("phi_residual_layernorm", "forward"): 4, ("phi_residual_layernorm", "backward"): 5}
    passes |= {("golden_layer_norm", "forward"): 2, ("golden_layer_norm", "backward"): 3}
    passes |= {("crystallize", "forward"): 2}
    passes |= {("phi_residual", "forward"): 3, ("phi_residual", "backward"): 3}
    passes |= {("residual_component_norm", "forward"): 1}
    passes |= {("residual_component_norm", "backward"): 2}
    passes |= {("golden_batch_norm", "forward"): 3, ("golden_batch_norm", "backward"): 5}
    passes |= {("syntonic_softmax", "forward"): 2, ("syntonic_softmax", "backward"): 3}
    passes |= {("syntonic_cross_entropy", "forward"): 1, ("syntonic_cross_entropy", "backward"): 2}
    for r in results["records"]:
        elements = math.prod(r["shape"])
        assert elements * 2 <= 8192 or r["shape"][0] == 1  # a row is measured whole
        if (r["op"], r["direction"]) in passes:
            assert r["ideal_bytes"] == passes[r["op"], r["direction"]] * elements * 2
        assert r["ms"] > 0
        assert r["launches"] >= 1
        # What is read and written once has to be somewhere. (XLA may keep less: a mask for relu.)
        # A batch norm reads its operands twice.
        once = r["implementation"] == "cuda" and "batch_norm" not in r["op"]
        assert r["peak_bytes"] >= r["ideal_bytes"] or not once
        assert r["tbs"] == pytest.approx(r["ideal_bytes"] / r["ms"] / 1e9, rel=0.02, abs=1e-4)
    ways = {(r["implementation"], r["called"]) for r in results["latencies"]}
    assert ways == {("cuda", "jit"), ("cuda", "eager"), ("xla", "jit")}
    compared = [r for r in results["latencies"] if "us_over_xla" in r]
    assert {r["implementation"] for r in compared} == {"cuda"}
    assert len(compared) == 2 * len({r["op"] for r in results["latencies"]})


@pytest.mark.parametrize("copies", [(2e-4, 8e-4), (8e-4, 2e-4)])
def test_shares_are_of_the_faster_copy(run, installed_double, monkeypatch, tmp_path, copies):
    measured = iter(copies)
    monkeypatch.setattr(run, "copy_bandwidth", lambda *_: next(measured))
    assert run.main([*TINY, "--ops", "golden_gelu", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "cpu.json").read_text())
    assert results["copy_tbs"] == {"bfloat16": 8e-4}
    for r in results["records"]:
        assert r["share"] == pytest.approx(r["tbs"] / 8e-4, abs=1e-4)


def test_spread_is_that_of_the_quartiles(run, monkeypatch):
    monkeypatch.setattr(run, "seconds_a_call", lambda *_: [4e-3, 1e-3, 2e-3, 3e-3])
    found = run.measure(run.Case("golden_gelu", "forward", "float32", (6, 16), "xla"), 0)
    assert (found["ms"], found["ms_spread"]) == (2.5, 2.5)


def test_small_calls_are_compared_in_the_same_turn(run, installed_double, monkeypatch):
    """With a host that is slower from call to call, and an operation that takes its time."""
    seen = []

    def series(call, sets, n):
        seen.append(call)
        first = seen.index(call)
        return 1e-6 * (100 * first + 7 * seen.count(call))

    monkeypatch.setattr(run, "series", series)
    ops = ["phi_residual", "golden_gelu"]
    found = run.latencies(ops, ["cuda", "xla"], minimum=0)
    assert [(r["op"], r["implementation"], r["called"]) for r in found] == [
        (op, *way) for op in ops for way in (("cuda", "jit"), ("cuda", "eager"), ("xla", "jit"))
    ]
    # The third way of each is jnp: 200 behind the first, 100 behind the second, in every turn.
    assert [r.get("us_over_xla") for r in found] == [-200, -100, None] * 2
    # Of five turns after the first call, which loads the kernel, the third.
    assert [r["us"] for r in found] == [100 * i + 7 * 4 for i in range(6)]
    assert seen == seen[:6] * 6


@pytest.mark.parametrize(
    "op",
    [
        "phi_residual_layernorm",
        "golden_layer_norm",
        "golden_batch_norm",
        "golden_batch_norm, then relu",
        "golden_gelu",
        "syntonic_softmax",
        "syntonic_softmax, learned",
        "syntonic_cross_entropy",
    ],
)
def test_both_implementations_compute_the_same(run, installed_double, op):
    """What is timed beside a kernel is the same function of the same operands."""
    import jax
    import numpy as np

    both = []
    for implementation in ("cuda", "xla"):
        call, given = run.Case(op, "backward", "float32", (6, 16), implementation).call(seed=0)
        case = run.Case(op, "forward", "float32", (6, 16), implementation)
        both.append((case.function()(*case.operands(0)), call(*given)))
    ours, plain = (jax.tree.leaves(results) for results in both)
    assert len(ours) == len(plain)
    for a, b in zip(ours, plain, strict=True):
        # Sums of up to 16 numbers of the size of 10, in another order.
        np.testing.assert_allclose(a, b, rtol=0, atol=16 * 10 * 2.0**-22)


def test_launches_are_counted_through_graphs(run):
    program = """HloModule f, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %n = f32[4]{0} negate(%p)
}

%command_buffer (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  %one = f32[4]{0} fusion(%q), kind=kLoop, calls=%fused
  %both = (f32[4]{0}, f32[]) custom-call(%one), custom_call_target="t"
  ROOT %two = f32[4]{0} get-tuple-element(%both), index=0
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %c = f32[4]{0} copy(%x)
  ROOT %r = f32[4]{0} call(%c), to_apply=%command_buffer
}
"""
    assert run.launches(program) == 3


def test_sources_are_identified(run, monkeypatch, tmp_path):
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "a.cu").write_text("1")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    first = run.sources_sha256()
    assert run.sources_sha256() == first
    (tmp_path / "cuda" / "a.cu").write_text("2")
    assert run.sources_sha256() != first


def test_figures_are_filled_in_between_their_markers(run, results):
    results = copy.deepcopy(results)
    record = next(
        r
        for r in results["records"]
        if (r["op"], r["direction"], r["implementation"])
        == ("phi_residual_layernorm", "backward", "xla")
    )
    record |= {"tbs": 1234.5, "share": 0.125}  # which no other has
    text = "a\n<!-- figures:begin -->\nold\n<!-- figures:end -->\nb\n"
    filled = run.figures.filled(text, run.figures.for_readme(results))
    assert filled.startswith("a\n<!-- figures:begin -->\n`phi_residual_layernorm` on one cpu")
    assert filled.endswith("\n<!-- figures:end -->\nb\n")
    assert f"{run.figures.rate(record)} |\n" in filled
    with pytest.raises(ValueError, match="exactly one pair"):
        run.figures.filled("none", "")
    assert "Small calls, 32 × 1024" in run.figures.for_implementation(results)


@pytest.fixture(scope="module")
def cpu():
    """benchmarks/cpu.py as a module."""
    spec = importlib.util.spec_from_file_location("cpu", BENCHMARKS / "cpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_operation_is_timed_beside_plain_jnp_on_a_cpu(cpu, tmp_path):
    import syntonic_jax

    page, found = tmp_path / "page.md", tmp_path / "found.json"
    page.write_text("a\n<!-- cpu:begin -->\nold\n<!-- cpu:end -->\nb\n")
    tiny = ("--elements", "64", "--turns", "1", "--seconds", "0", "--dtypes", "float32")
    assert cpu.main([*tiny, "--out", str(page), str(found)]) == 0
    results = json.loads(found.read_text())
    assert {"jax", "jaxlib", "python"} <= set(results["versions"])
    functions = {f for f in syntonic_jax.__all__ if f.islower()}
    assert {r["op"].partition(",")[0] for r in results["records"]} == functions
    for record in results["records"]:
        assert {"forward"} <= set(record) - {"op", "dtype", "shape"} <= {"forward", "gradient"}
        assert ("gradient" in record) == (record["op"] != "crystallize")
        assert all(record[d]["ratio"] > 0 for d in ("forward", "gradient") if d in record)
    text = page.read_text()
    assert text.startswith("a\n<!-- cpu:begin -->\nOn ")
    assert text.endswith("|\n<!-- cpu:end -->\nb\n")
    assert text.count("\n| `") == len(results["records"])
    with pytest.raises(ValueError, match="exactly one pair"):
        cpu.filled("none", "")


def test_what_is_timed_on_a_cpu_computes_the_same(cpu):
    import jax
    import numpy as np

    for name, pair in cpu.OPERATIONS.items():
        operands = cpu.drawn(pair, tuple(min(n, 7) for n in pair.shapes[0]), "float32")
        cotangents = cpu.drawn_cotangents(pair.plain, operands)
        both = []
        for function in (pair.ours, pair.plain):
            results = [jax.jit(function)(*operands)]
            if pair.gradient:
                gradient = cpu.cotangents_of(function, pair.operands)
                results.append(jax.jit(gradient)(*operands, cotangents))
            both.append(jax.tree.leaves(results))
        for a, b in zip(*both, strict=True):
            # Sums of at most 343 numbers of the size of 10, in another order.
            np.testing.assert_allclose(a, b, rtol=0, atol=343 * 10 * 2.0**-22, err_msg=name)


def test_drift_of_floats(tmp_path):
    """The documented table is as this machine finds it, up to the rounding of XLA's fusions."""
    spec = importlib.util.spec_from_file_location("drift", BENCHMARKS / "drift.py")
    assert spec is not None
    assert spec.loader is not None
    drift = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drift)
    text = (drift.DOCS / "exact-arithmetic.md").read_text(encoding="utf-8")
    results = drift.measured()
    for dtype, series in results.items():
        cells = next(line for line in text.splitlines() if line.startswith(f"| {dtype} |"))
        documented = [float(cell) for cell in cells.split("|")[2:-1]]
        found = [series[n] for n in drift.SHOWN]
        # A fused multiply-add changes single roundings of float32 and float64, not their number.
        assert documented == pytest.approx(found, rel=1.0)
    drift.draw(results, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert drift.table(results).count("\n") == 6
