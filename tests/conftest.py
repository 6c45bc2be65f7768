"""What all tests share: eight simulated devices, seeds, the two lowerings.

The environment is set before anything imports jax.
"""

import gc
import os
import random
import shutil
import tempfile
import zlib

DEVICES = "--xla_force_host_platform_device_count=8"
if DEVICES not in os.environ.setdefault("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] += " " + DEVICES
# The same numbers on every run, unless SYNTONIC_TEST_SEED is another number or `fresh`. The workers
# of pytest-xdist inherit the variable, so all share it.
if os.environ.setdefault("SYNTONIC_TEST_SEED", "0") == "fresh":
    os.environ["SYNTONIC_TEST_SEED"] = str(random.SystemRandom().randrange(2**32))
SEED = int(os.environ["SYNTONIC_TEST_SEED"])
# jax filters the traceback of every exception, also of those that a test waits for.
os.environ.setdefault("JAX_TRACEBACK_FILTERING", "off")
# A program that two tests share is compiled once in a run, not once a test and worker.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="syntonic-jax-tests-")
    MADE_CACHE = os.environ["JAX_COMPILATION_CACHE_DIR"]
else:
    MADE_CACHE = None
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Tracing makes objects by the thousand: looking for cycles among them takes a tenth of its time.
gc.set_threshold(20_000, 10, 10)

import pytest  # noqa: E402

pytest.register_assert_rewrite("batch_norm_check", "battery", "lattice_check", "softmax_cases")
pytest.register_assert_rewrite("oracles", "oracles_norm", "oracles_lattice")
pytest.register_assert_rewrite("norm_range_check", "elementwise_range_check", "rms_check")


def pytest_report_header(config):
    return f"random numbers: SYNTONIC_TEST_SEED={SEED} repeats them"


def pytest_unconfigure():
    if MADE_CACHE:
        shutil.rmtree(MADE_CACHE, ignore_errors=True)


def pytest_terminal_summary(terminalreporter):
    if terminalreporter.stats.get("failed"):
        terminalreporter.write_line(f"SYNTONIC_TEST_SEED={SEED} repeats these random numbers")


def pytest_addoption(parser):
    parser.addoption(
        "--share",
        metavar="K/N",
        help="of the variants of every test the K-th of N shares, drawn by their names; what has "
        "no variants is in every share, what is marked `once` in the last, and of the custom calls "
        "of operations and layers there is one variant a test and operation in each",
    )


def of_share(items, share: str) -> list:
    k, n = map(int, share.split("/"))
    kept, variants, calls = set(), {}, {}
    for item in items:
        name = item.nodeid.split("[")[0]
        if item.get_closest_marker("once"):
            kept |= {item} if k == n else set()
        elif runs_calls(item):
            calls.setdefault((name, operation_of(item)), []).append(item)
        else:
            variants.setdefault(name, []).append(item)
    for of_test in variants.values():
        drawn = by_name(of_test)
        kept |= set(drawn if len(drawn) < n else drawn[k - 1 :: n])
    for of_test in calls.values():
        kept.add(by_name(of_test)[(k - 1) % len(of_test)])
    return [item for item in items if item in kept]


def by_name(items) -> list:
    """In an order that has nothing to do with what they test."""
    return sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode()))


def parameter(item, name: str):
    return item.callspec.params.get(name) if hasattr(item, "callspec") else None


def operation_of(item) -> str:
    operation = parameter(item, "operation") or parameter(item, "label") or ""
    return getattr(operation, "label", operation)


def runs_calls(item) -> bool:
    """Whether a test has the double serve the custom calls of an operation or layer.

    test_primitive_calls.py shows that these compute what jnp does.
    """
    folders = ("ops", "nn", "lattice", "transformations")
    return parameter(item, "implementation") == "double" and item.path.parent.name in folders


def pytest_collection_modifyitems(config, items):
    """Without a GPU the tests marked `gpu` are deselected, not skipped: they cannot run here.

    Of operations and layers the custom calls are slow tests: which version of jax emits them is the
    business of the tests of handlers, lowering, sharding, export and interpreters.
    """
    if share := config.getoption("share"):
        kept = of_share(items, share)
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
    for item in items:
        if runs_calls(item) and item.path.parent.name in ("ops", "nn"):
            item.add_marker(pytest.mark.slow)
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing or has_gpu():
        return
    config.hook.pytest_deselected(items=needing)
    items[:] = [item for item in items if item not in needing]


def has_gpu() -> bool:
    import jax

    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


@pytest.fixture
def rng(request):
    """Random numbers that depend on the seed of the run and on the test, not on the order."""
    import numpy as np

    return np.random.default_rng([SEED, zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture
def x64():
    """64-bit types on, as the float64 comparisons need; jax itself starts without."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def installed_double():
    """The FFI handlers, compiled against plain C++ launchers and registered for the CPU."""
    import double

    double.install()


@pytest.fixture(params=["xla", "double"])
def implementation(request):
    """Both lowerings: jnp, and the custom calls, which the test double serves on the CPU."""
    if request.param == "xla":
        return "xla"
    request.getfixturevalue("installed_double")
    return "cuda"


@pytest.fixture
def gspmd():
    """The older partitioner."""
    import jax

    jax.config.update("jax_use_shardy_partitioner", False)
    yield
    jax.config.update("jax_use_shardy_partitioner", True)
