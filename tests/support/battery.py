"""What every operation must pass, written once.

A test module describes its operations and inherits the tests:

    class TestTransformations(battery.Transformations):
        operations = (Operation(...), ...)

Every transformation is compared with the same transformation of the formula in plain jnp, in
float64, where two ways to evaluate one formula agree to some thousand units in the last place and
a mistake is off by something of order one. That the formula itself is right, and right in every
type, is the business of the oracles.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import transformations
from jax.test_util import check_grads

# The longest chain of roundings in a second derivative, about 100, times what dividing by a small
# deviation can make of each: below 4096.
RTOL = 4096 * float(np.finfo(np.float64).eps)


@dataclasses.dataclass(frozen=True)
class Operation:
    """A public function with its options chosen, as the battery sees it."""

    label: str
    name: str  # of the public function, which its messages must name
    call: Callable[..., Any]  # (*operands, implementation=..., dtype=...) -> array or tuple
    reference: Callable[..., Any]  # (*operands) -> the same in plain jnp
    # Of each operand: "rows" [*lead, width], "par" [width], "weights" [*lead, width] that are a
    # parameter, or "scalar" [].
    kinds: tuple[str, ...]
    nan_arises_in: str  # the primitive that jax_debug_nans names
    linear: bool = False  # in all operands together
    takes_dtype: bool = True
    lead: tuple[int, ...] = (3,)  # leading axes of rows, where a test asks for no others
    along: str = "rows"  # what it reduces: "rows", "nothing", the axes that "lead", "everything"
    targets: tuple[str, ...] = ()  # of the custom calls of its values and gradients
    statistics: int = 0  # so many of the results, the last ones, are in the accumulation type
    bad: tuple[float, ...] = (-jnp.inf, jnp.inf)  # numbers in the data from which a NaN arises
    # Moves random operands off points without a derivative.
    adjust: Callable[..., Sequence[jax.Array]] = lambda *operands: operands

    def operands(self, rng, dtype="float64", lead=None, width=4) -> list[jax.Array]:
        rows = (*(self.lead if lead is None else lead), width)
        shapes = {"rows": rows, "weights": rows, "par": (width,), "scalar": ()}
        values = [jnp.asarray(rng.normal(size=shapes[kind]), dtype) for kind in self.kinds]
        return list(self.adjust(*values))

    def using(self, implementation, **options) -> Callable[..., Any]:
        return functools.partial(self.call, implementation=implementation, **options)

    @property
    def data(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.kinds) if kind == "rows")


def assert_same(actual, expected, rtol=RTOL):
    """Equal trees of arrays: types, shapes, and values relative to the largest of an array."""
    actual, treedef = jax.tree.flatten(actual)
    expected, expected_treedef = jax.tree.flatten(expected)
    assert treedef == expected_treedef
    for a, e in zip(actual, expected, strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        scale = max(1.0, float(np.max(np.abs(oracles.real(e)), initial=0.0)))
        np.testing.assert_allclose(oracles.real(a), oracles.real(e), rtol=0, atol=rtol * scale)


@functools.cache
def compiled_reference(operation: Operation, transformation):
    """Compiled once for both lowerings."""
    return jax.jit(transformation(operation.reference, operation))


def all_gradients(f, operation):
    def run(*operands):
        positions = transformations.positions(operation)
        return f(*operands), jax.grad(transformations.loss(f), positions)(*operands)

    return run


def thinned(cases, every: int = 2):
    """Parameters of a test, of which all but each `every`th one are slow tests."""
    return [
        case if i % every == 0 else pytest.param(*_values(case), marks=pytest.mark.slow)
        for i, case in enumerate(cases)
    ]


def _values(case):
    return case if type(case) is tuple else (case,)


def assert_calls_bind_the_same(operation, transformation, operands):
    """With the custom calls a program has the primitives that it has with jnp.

    That each of these computes the same either way is for test_primitive_calls.py to show.
    """
    programs = [
        jax.make_jaxpr(transformation(operation.using(name), operation))(*operands)
        for name in ("cuda", "xla")
    ]
    texts = ["".join(str(program).split()) for program in programs]  # lines break by their length
    assert "implementation=cuda" in texts[0]
    assert texts[0].replace("implementation=cuda", "implementation=xla") == texts[1]


class Battery:
    """Runs each inherited test once for every operation of the class.

    A test that takes `some_operation` runs for those that are no variants.
    """

    operations: ClassVar[Sequence[Operation]]
    variants: ClassVar[Sequence[Operation]] = ()  # the same with other options: slow tests

    def pytest_generate_tests(self, metafunc):
        if "operation" in metafunc.fixturenames:
            slow = [pytest.param(o, marks=pytest.mark.slow) for o in self.variants]
            metafunc.parametrize("operation", [*self.operations, *slow], ids=lambda o: o.label)
        if "some_operation" in metafunc.fixturenames:
            metafunc.parametrize("some_operation", self.operations, ids=lambda o: o.label)


@pytest.mark.usefixtures("x64")
class Transformations(Battery):
    @pytest.mark.parametrize("transformation", transformations.ALL, ids=lambda t: t.__name__)
    def test_equals_that_of_the_formula(self, operation, transformation, rng):
        operands = operation.operands(rng)
        f = transformation(operation.using("xla"), operation)
        got = jax.jit(f)(*operands)
        assert_same(got, compiled_reference(operation, transformation)(*operands))

    @pytest.mark.parametrize("transformation", transformations.ALL, ids=lambda t: t.__name__)
    def test_calls_bind_the_same(self, some_operation, transformation, rng):
        operands = some_operation.operands(rng)
        assert_calls_bind_the_same(some_operation, transformation, operands)

    def test_check_grads(self, operation, rng):
        # Against central differences, which err by step**2 times a third derivative below 1e3.
        operands = operation.operands(rng, lead=(2,), width=3)
        f = jax.jit(operation.using("xla"))
        check_grads(f, operands, order=2, modes=("fwd", "rev"), eps=1e-4, atol=1e-5, rtol=1e-5)

    def test_eager_and_without_jit(self, operation, implementation, rng):
        gradients = all_gradients(operation.using(implementation), operation)
        operands = operation.operands(rng)
        expected = compiled_reference(operation, all_gradients)(*operands)
        assert_same(gradients(*operands), expected)
        with jax.disable_jit():
            assert_same(gradients(*operands), expected)

    # Without rows: empty results, zero gradients of the parameters.
    @pytest.mark.parametrize("lead", [(0,), (2, 0, 3), (), (1,), (2, 1, 3)], ids=str)
    def test_leading_axes(self, operation, implementation, lead, rng):
        operands = operation.operands(rng, lead=lead)
        run = jax.jit(all_gradients(operation.using(implementation), operation))
        if operation.along == "lead" and not (lead and all(lead)):
            with pytest.raises(ValueError, match=rf"{operation.name}: .*axis.*got"):
                run(*operands)
            return
        got = run(*operands)
        assert_same(got, compiled_reference(operation, all_gradients)(*operands))

    @pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
    def test_donation(self, operation, implementation, rng):
        operands = operation.operands(rng)
        f = operation.using(implementation)
        expected = [f(*operands), operands[0] + jax.tree.leaves(f(*operands))[0]]
        expected = jax.tree.map(np.asarray, expected)

        def also_reads_the_donated(*operands):
            results = f(*operands)
            return [results, operands[0] + jax.tree.leaves(results)[0]]

        donating = jax.jit(also_reads_the_donated, donate_argnums=0)
        given = jnp.array(operands[0], copy=True)
        assert_same(donating(given, *operands[1:]), expected)
        assert_same(jax.jit(f, donate_argnums=0)(*operands), expected[0])

    def test_debug_nans(self, operation, implementation, rng):
        f, operands = operation.using(implementation), operation.operands(rng)
        gradients = jax.grad(transformations.loss(f), transformations.positions(operation))
        in_a_program = jax.jit(lambda *xs: jax.tree.map(jnp.cos, f(*xs)))
        # Infinities of opposite sign have no sum, a lone -inf no golden_gelu and no deviation.
        bad, corner = list(operands), (0,) * operands[0].ndim
        for i, value in zip(operation.data, operation.bad, strict=False):
            bad[i] = bad[i].at[corner].set(value)
        with jax.debug_nans(True):
            jax.block_until_ready((f(*operands), gradients(*operands), in_a_program(*operands)))
            for call in (f, in_a_program, gradients):
                with pytest.raises(FloatingPointError, match=operation.nan_arises_in):
                    call(*bad)

    def test_linear_transpose(self, operation, implementation, rng):
        """Of the operation where it is linear, else of its linearisation; and back again."""

        def transposed(f):
            def run(*operands):
                push = f if operation.linear else jax.linearize(f, *operands)[1]
                results = push(*operands)
                pull = jax.linear_transpose(push, *operands)
                cotangents = pull(results)
                again = jax.linear_transpose(pull, results)
                return cotangents, again(cotangents)

            return run

        operands = operation.operands(rng)
        got = jax.jit(transposed(operation.using(implementation)))(*operands)
        assert_same(got, jax.jit(transposed(operation.reference))(*operands))


@pytest.mark.usefixtures("x64")
class Types(Battery):
    """Rules of types, by comparison with a call on operands that were cast beforehand."""

    def test_promotion(self, operation, implementation, rng):
        """Data promotes among itself, parameters never do; a gradient has its operand's type."""
        run = jax.jit(all_gradients(operation.using(implementation), operation))
        for dtypes in itertools.combinations(oracles.DTYPES, len(operation.data)):
            dtypes = rng.permutation(dtypes)
            common = functools.reduce(jnp.promote_types, dtypes)
            operands = operation.operands(rng, "float32")
            for i, dtype in zip(operation.data, dtypes, strict=True):
                operands[i] = operands[i].astype(dtype)
            cast = list(operands)
            for i in operation.data:
                cast[i] = operands[i].astype(common)

            results, gradients = run(*operands)
            expected, expected_gradients = run(*cast)
            acc = oracles.accumulation(common)
            result_type = common if operation.takes_dtype else acc
            found = jax.tree.leaves(results)
            expected_types = [result_type] * (len(found) - operation.statistics)
            expected_types += [acc] * operation.statistics
            assert [r.dtype for r in found] == expected_types
            # XLA may fuse the two differently: some roundings in the accumulation type, which may
            # tip the one to the type itself.
            rounding = 64 * oracles.unit(acc)
            assert_same(results, expected, rounding + 2 * oracles.unit(result_type))
            for g, e, x in zip(gradients, expected_gradients, operands, strict=True):
                assert_same(g, e.astype(x.dtype), rounding + 2 * oracles.unit(x.dtype))
                assert g.dtype == x.dtype

    def test_strict_promotion(self, operation, implementation, rng):
        f = operation.using(implementation)
        operands = operation.operands(rng, "float32")
        for i in operation.data:
            operands[i] = operands[i].astype(jnp.bfloat16)
        with jax.numpy_dtype_promotion("strict"):
            jax.jit(all_gradients(f, operation))(*operands)  # float32 parameters are welcome
            if len(operation.data) > 1:
                operands[0] = operands[0].astype(jnp.float32)
                with pytest.raises(jax.dtypes.TypePromotionError):
                    f(*operands)

    def test_no_implicit_rank_promotion(self, operation, implementation, rng):
        operands = operation.operands(rng)
        f = operation.using(implementation)
        with jax.numpy_rank_promotion("raise"):
            gradients = jax.grad(
                lambda *xs: sum(jnp.sum(y) for y in jax.tree.leaves(f(*xs))),
                transformations.positions(operation),
            )
            jax.jit(gradients)(*operands)
            jax.jvp(jax.jit(gradients), operands, operands)
            axes = (0,) * len(operands)
            jax.vmap(gradients, axes)(*[jnp.stack([x, x]) for x in operands])

    def test_float64_without_x64(self, operation, implementation, rng):
        operands = [np.asarray(x) for x in operation.operands(rng)]
        with jax.enable_x64(False):
            f = operation.using(implementation)
            got = f(*operands)
            expected = f(*[x.astype(np.float32) for x in operands])
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        assert {r.dtype for r in jax.tree.leaves(got)} == {jnp.dtype("float32")}


@pytest.mark.usefixtures("x64")
class BadInput(Battery):
    """Messages name the function, the argument, what was expected and what was got."""

    @pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64"])
    def test_data_that_is_not_floating(self, operation, dtype):
        operands = operation.operands(np.random.default_rng(0))
        for i in operation.data:
            wrong = list(operands)
            wrong[i] = jnp.ones(wrong[i].shape, dtype)
            with pytest.raises(TypeError, match=rf"{operation.name}.*float16.*got {dtype}"):
                operation.call(*wrong)

    def test_unknown_implementation(self, operation):
        operands = operation.operands(np.random.default_rng(0))
        pattern = rf"{operation.name}.*implementation.*'cuda'.*'xla'.*'triton'"
        with pytest.raises(ValueError, match=pattern):
            operation.call(*operands, implementation="triton")

    @pytest.mark.parametrize("dtype", ["int32", "complex64", "nonsense"])
    def test_unknown_output_type(self, operation, dtype):
        operands = operation.operands(np.random.default_rng(0))
        with pytest.raises(TypeError, match=rf"{operation.name}.*dtype.*{re.escape(dtype)}"):
            operation.call(*operands, dtype=dtype)
