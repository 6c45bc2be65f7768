"""Every operation in the rest of jax's transformations and interpreters (README's table)."""

import functools

import battery
import exported as exports
import interpreters
import jax
import jax.numpy as jnp
import numpy as np
import operations
import pytest
import transformations
from jax import export
from jax.experimental import multihost_utils, serialize_executable, sparse
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec as P

pytestmark = pytest.mark.usefixtures("x64")

OPERATIONS = operations.OPERATIONS
# Loops and solvers repeat an operation some 40 times, and shrink what they err by.
RTOL = 4 * battery.RTOL
LABELLED = {o.label: o for o in OPERATIONS}
PAIRS = [(label, group) for label in LABELLED for group in interpreters.GROUPS]
# One function has no `implementation` to choose.
CALLED = [pair for pair in PAIRS if pair[0] != "output_statistics"]


@pytest.mark.parametrize(("label", "group"), battery.thinned(PAIRS, 11))
def test_equals_that_of_the_formula(label, group, rng):
    operation = LABELLED[label]
    transformation = interpreters.GROUPS[group]
    operands = operation.operands(rng)
    got = jax.jit(transformation(operation.using("xla"), operation))(*operands)
    expected = battery.compiled_reference(operation, transformation)(*operands)
    assert got.keys() == expected.keys()
    for name in got:
        # Which steps the solver of differential equations takes may hang on a rounding where the
        # right-hand side jumps: it promises this much of each.
        rtol = 1.4e-8 if name == "differential_equation" else RTOL
        battery.assert_same(got[name], expected[name], rtol)


@pytest.mark.parametrize(("label", "group"), battery.thinned(CALLED, 11))
def test_calls_bind_the_same(label, group, rng):
    operation = LABELLED[label]
    operands = operation.operands(rng)
    battery.assert_calls_bind_the_same(operation, interpreters.GROUPS[group], operands)


# --- programs that outlive the process ------------------------------------------------------------


def total(f):
    return lambda *operands: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(f(*operands)))


@pytest.mark.parametrize("label", battery.thinned(list(LABELLED), 5))
def test_export_with_symbolic_rows_and_width(label, implementation, rng):
    """The width is the axis that a norm or a softmax runs along; the gradients go too."""
    operation = LABELLED[label]
    rows, width = export.symbolic_shape("b, w")
    shapes = {"rows": (rows, width), "weights": (rows, width), "par": (width,), "scalar": ()}
    specs = [jax.ShapeDtypeStruct(shapes[kind], "float64") for kind in operation.kinds]
    f = operation.using(implementation)

    def program(f):
        gradients = jax.grad(total(f), transformations.positions(operation))
        return jax.jit(lambda *operands: (f(*operands), gradients(*operands)))

    exported = export.export(program(f), disabled_checks=exports.OURS)(*specs)
    call = jax.jit(export.deserialize(exported.serialize()).call)
    for lead, width in ((3, 4), (5, 7)):
        operands = operation.operands(rng, lead=(lead,), width=width)
        expected = program(operation.reference)(*operands)
        battery.assert_same(call(*operands), expected)


@pytest.fixture
def no_cache():
    """What was read from the cache of compiled programs is not stored again."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.mark.parametrize("label", battery.thinned(list(LABELLED), 5))
def test_a_compiled_program_is_stored(label, implementation, rng, no_cache):
    operation = LABELLED[label]
    operands = operation.operands(rng)
    lowered = jax.jit(operation.using(implementation)).lower(*operands)
    stored = serialize_executable.serialize(lowered.compile())
    # Of the devices of this process it takes all if it is not told that it runs on one.
    one = jax.devices()[:1]
    loaded = serialize_executable.deserialize_and_load(*stored, execution_devices=one)
    got = loaded(*operands)
    battery.assert_same(got, jax.jit(operation.reference)(*operands))


# --- without running ------------------------------------------------------------------------------


@pytest.mark.parametrize("label", LABELLED)
def test_shapes_without_values_and_values_at_trace_time(label, rng):
    operation = LABELLED[label]
    operands = operation.operands(rng)
    f = operation.using(None)
    shapes = jax.eval_shape(f, *operands)
    expected = jax.eval_shape(operation.reference, *operands)
    assert jax.tree.map(str, shapes) == jax.tree.map(str, expected)

    @jax.jit
    def traced():
        with jax.ensure_compile_time_eval():
            values = f(*operands)
        assert all(isinstance(np.asarray(v), np.ndarray) for v in jax.tree.leaves(values))
        return values

    battery.assert_same(traced(), jax.jit(operation.reference)(*operands))


@pytest.mark.parametrize("label", battery.thinned(list(LABELLED), 4))
def test_nothing_leaks(label, implementation, rng):
    operation = LABELLED[label]
    operands = operation.operands(rng)
    f = operation.using(implementation)
    with jax.checking_leaks():
        jax.jit(jax.grad(transformations.loss(f), transformations.positions(operation)))(*operands)


# --- arrays of other kinds ------------------------------------------------------------------------


# The sparsify of jax 0.10 takes no `custom_jvp` function, jax.nn.relu neither: no batch norm.
PLAIN = [o.label for o in OPERATIONS if "batch" not in o.label and o.name != "output_statistics"]


@pytest.mark.parametrize("label", battery.thinned(PLAIN, 4))
def test_sparsify_takes_dense_arrays_and_refuses_sparse_ones(label, implementation, rng):
    """As it refuses jnp.exp: only what is linear, or keeps zeros, has a sparse form."""
    operation = LABELLED[label]
    operands = operation.operands(rng)
    f = sparse.sparsify(operation.using(implementation))
    battery.assert_same(f(*operands), jax.jit(operation.reference)(*operands))
    with pytest.raises(NotImplementedError, match=r"sparse rule for .* is not implemented"):
        f(sparse.BCOO.fromdense(operands[0]), *operands[1:])


@pytest.mark.parametrize("name", ["golden_layer_norm", "syntonic_softmax", "golden_batch_norm"])
def test_global_arrays_of_multihost_utils(name, implementation, rng):
    """Of the one process there is here: made of local parts, put through, and taken apart."""
    operation = next(o for o in OPERATIONS if o.name == name)
    operands = operation.operands(rng, lead=(8,))
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = [P("d") if kind == "rows" else P() for kind in operation.kinds]
    given = multihost_utils.host_local_array_to_global_array(tuple(operands), mesh, tuple(specs))
    first = jax.jit(lambda *xs: jax.tree.leaves(operation.using(implementation)(*xs))[0])
    y = first(*given)
    local = multihost_utils.global_array_to_host_local_array(y, mesh, P("d"))
    expected = jax.tree.leaves(jax.jit(operation.reference)(*operands))[0]
    battery.assert_same(local, expected)
    battery.assert_same(multihost_utils.process_allgather(y, tiled=True), expected)
    multihost_utils.assert_equal(y, "the same on every process")


def test_forward_and_backward_apart(implementation, rng):
    """jax.fwd_and_bwd keeps what the backward pass needs, in a program of its own."""
    operation = LABELLED["golden_layer_norm"]
    operands = operation.operands(rng)
    f = functools.partial(operation.call, implementation=implementation)
    forward, backward = jax.fwd_and_bwd(f, argnums=(0, 1, 2))
    y, residuals = jax.jit(forward)(*operands)
    expected, pull = jax.vjp(operation.reference, *operands)
    battery.assert_same(y, expected)
    battery.assert_same(jax.jit(backward)(residuals, y), pull(expected))
