"""The custom calls of every declared primitive against its jnp form: every mask, group and type.

No rule of a transformation reads `implementation`. What binds the same primitives, by the calls and
by jnp, need not run twice: `battery.assert_calls_bind_the_same` compares the programs, and this
module shows that the primitives agree.
"""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from syntonic_jax import PhiResidualMode
from syntonic_jax._operation import Derivative, Operation

pytestmark = pytest.mark.usefixtures("x64", "installed_double")

KEPT = [
    value
    for name, module in list(sys.modules.items())
    if name.partition(".")[0] == "syntonic_jax"
    for value in vars(module).values()
]
OPERATIONS = {o.name: o for o in KEPT if isinstance(o, Operation)}
# Those that are no operation's.
DERIVATIVES = {d.name: d for d in KEPT if isinstance(d, Derivative)}

NORM = {"epsilon": 0.1, "scale_factor": 0.5}
MODES = [{"mode": mode} for mode in PhiResidualMode]
BLOCKS = [{"block": (1, 0)}, {"block": (1, 1)}]
# What is static of each, a few times; `dtype` comes beside it.
PARAMS = {
    "golden_layer_norm": [NORM],
    "golden_rms_norm": [NORM],
    "phi_residual_layernorm": [NORM | mode for mode in MODES],
    "phi_residual_rmsnorm": [NORM | mode for mode in MODES],
    "phi_residual": [
        mode | {"activation": activation}
        for mode in MODES
        for activation in (None, "relu", "gelu", "golden_gelu")
    ],
    "golden_gelu": [{}],
    "residual_component_norm": [{"coefficient": 0.75}],
    "syntonic_softmax": [{"trailing": 0}, {"trailing": 1}],
    "syntonic_log_softmax": [{"trailing": 0}, {"trailing": 1}],
    "syntonic_cross_entropy": [{"trailing": 0, "ignored": ignored} for ignored in (None, -1)],
    "golden_batch_norm_moments": [block | NORM for block in BLOCKS],
    "golden_batch_norm_normalise": [block | {"scale_factor": 0.5} for block in BLOCKS],
    "golden_batch_norm": [block | {"zeros": "where"} for block in BLOCKS],
}
WIDTH, ROWS = 6, 3
GROUPS = {0: (), 1: (2,), 2: (2, 3)}
# Of data and of results.
TYPES = [(dtype, dtype) for dtype in oracles.DTYPES]


def cases():
    """(operation, what is static, groups, types): all groups and types of the first of each."""
    for name, several in PARAMS.items():
        declared = OPERATIONS.get(name) or DERIVATIVES[name]
        more_types = [("bfloat16", "float32"), ("float16", "float64")][: 2 * chooses_type(declared)]
        for i, params in enumerate(several):
            for groups in GROUPS if declared.geometry.grouped else (0,):
                for types in TYPES + more_types:
                    # Of nested groups and of what else is static one type.
                    usual = types == ("float32", "float32")
                    if (groups < 2 or usual) and (i == 0 or (groups == 0 and usual)):
                        label = f"{name}-{i}-{groups}-{'-'.join(types)}"
                        yield pytest.param(name, params, groups, types, id=label)


def chooses_type(declared):
    """Whether a parameter says of what type a result is."""
    return any(o.dtype == "dtype" for o in declared.outputs)


def has_calls(declared, types):
    """Whether its kernel takes data and results of these types."""
    return types[0] == types[1] or not getattr(declared.kernels, "one_type", False)


def subsets(values):
    return [s for k in range(len(values) + 1) for s in itertools.combinations(values, k)]


class Case:
    """Operands of a primitive, and what is static of it."""

    def __init__(self, rng, declared, params, groups, types):
        self.rng, self.lead = rng, GROUPS[groups]
        self.data, result = types
        self.accumulation = oracles.accumulation(self.data)
        self.params = dict(params)
        if chooses_type(declared):
            self.params["dtype"] = jnp.dtype(result)
        if declared.geometry.grouped:
            self.params["groups"] = groups
        behind = (2,) if params.get("trailing") or params.get("block") == (1, 1) else ()
        self.shapes = {
            "row": (*self.lead, ROWS, WIDTH, *behind),
            "vector": (*self.lead, ROWS, *behind),
            "parameter": (*self.lead, WIDTH),
            "scalar": (*self.lead, 1),
        }

    def array(self, value):
        """A random input, or a cotangent of an output."""
        shape = self.shapes[value.kind]
        if value.name in ("mask", "where"):
            return jnp.asarray(self.rng.random(shape) < 0.8).at[..., :1, :].set(True)
        if value.name == "labels":  # −1 is no class
            return jnp.asarray(self.rng.integers(-1, WIDTH, shape), "int32")
        numbers = self.rng.normal(size=shape)
        if value.name == "weights":
            numbers = abs(numbers) + 0.1
        dtype = self.data if value.kind == "row" else self.accumulation
        return jnp.asarray(numbers, dtype)

    def like(self, aval):
        return jnp.asarray(self.rng.normal(size=aval.shape), aval.dtype)


def givens(inputs):
    """Every mask of inputs that there may be: weights have a scale."""
    optional = [i.name for i in inputs if i.optional]
    for absent in subsets(optional):
        if ("weights" in absent) == ("scale" in absent) or "weights" not in optional:
            yield absent


def compare(calls, references, dtype):
    """By roundings of the accumulation type, which may tip the one to the type itself."""
    for call, reference in zip(calls, references, strict=True):
        for a, e in zip(call, reference, strict=True):
            assert (a.dtype, a.shape) == (e.dtype, e.shape)
            rounding = 64 * oracles.unit(oracles.accumulation(dtype)) + 2 * oracles.unit(e.dtype)
            a, e = oracles.real(a), oracles.real(e)
            scale = np.max(np.abs(e), where=np.isfinite(e), initial=1.0)
            np.testing.assert_allclose(a, e, rtol=0, atol=rounding * scale)


def test_every_declaration_is_among_the_cases():
    own = {o.derivative.name for o in OPERATIONS.values() if o.derivative}
    assert set(PARAMS) == set(OPERATIONS) | (set(DERIVATIVES) - own)


@pytest.mark.parametrize(
    ("name", "params", "groups", "types"), [c for c in cases() if c.values[0] in OPERATIONS]
)
def test_values(name, params, groups, types, rng):
    """Every mask of inputs and outputs: the results of a call are some of those of the formula."""
    operation = OPERATIONS[name]
    case = Case(rng, operation, params, groups, types)
    inputs = {i.name: case.array(i) for i in operation.inputs}
    names = [o.name for o in operation.outputs]
    saved = tuple(o.name for o in operation.outputs[1:] if o.inner or o.constant)
    free = tuple(n for n in names[1:] if n not in saved and n != "count")

    def meaningful(results):
        """Of a row whose label does not count nothing is read but the loss."""
        loss, *rest = results
        return [
            loss,
            *(jnp.where(jnp.isfinite(loss), r, 0) if names[0] == "loss" else r for r in rest),
        ]

    @jax.jit
    def program(inputs):
        calls, references = [], []
        for absent in givens(operation.inputs):
            values = [None if i.name in absent else inputs[i.name] for i in operation.inputs]
            bind = functools.partial(operation, *values, **case.params)
            counted = ("count",) if "where" in inputs and "where" not in absent else ()
            full = bind(outputs=[n for n in names if n != "count" or counted], implementation="xla")
            full = dict(zip(names, full))
            # Either all or none of what the derivative takes is asked for.
            for chosen in subsets(free) if len(free) < 3 else [(), free]:
                for more in ((), saved) if saved else ((),):
                    asked = [n for n in names[1:] if n in (*chosen, *more, *counted)]
                    calls.append(meaningful(bind(outputs=asked, implementation="cuda")))
                    references.append(meaningful([full[n] for n in (names[0], *asked)]))
        return calls, references

    text = program.lower(inputs).as_text()
    assert ("syntonic_" in text) == has_calls(operation, types)
    compare(*program(inputs), types[0])


@pytest.mark.parametrize(
    ("name", "params", "groups", "types"),
    [c for c in cases() if c.values[0] not in OPERATIONS or OPERATIONS[c.values[0]].derivative],
)
def test_cotangents(name, params, groups, types, rng):
    """Every mask of what was saved, of cotangents, and of the gradients asked for."""
    operation = OPERATIONS.get(name)
    derivative = operation.derivative if operation else DERIVATIVES[name]
    case = Case(rng, operation or derivative, params, groups, types)
    given = operation.inputs if operation else derivative.saved(**case.params)
    inputs = {i.name: case.array(i) for i in given}
    params = dict(case.params)
    if operation:
        params = {k: v for k, v in params.items() if k not in operation.forward_only}
        params |= {"data_dtype": jnp.dtype(types[0])}

    def saved_of(absent, inputs):
        values = {i.name: None if i.name in absent else inputs[i.name] for i in given}
        if operation:
            names = [o.name for o in operation.outputs]
            results = operation(
                *values.values(), outputs=names, implementation="xla", **case.params
            )
            values |= dict(zip(names, results))
        return values, [values[x.name] for x in derivative.saved(**params)]

    results = jax.eval_shape(lambda inputs: saved_of((), inputs)[0], inputs)
    cts = {
        o.name: case.like(results[o.name]) if operation else case.array(o)
        for o in derivative.outputs
        if not o.inner
    }
    first = derivative.outputs[0].name

    @jax.jit
    def program(inputs, cts):
        calls, references = [], []
        for absent in givens(given):
            _, saved = saved_of(absent, inputs)
            # Without a slope there is no gradient that takes it; of what is not there is none.
            missing = {"dx"} if "slope" in absent else set(absent)
            there = [i.name for i in derivative.inputs if i.name not in missing]
            for also in subsets([n for n in cts if n != first]):
                present = [
                    cts.get(o.name) if o.name in (first, *also) else None
                    for o in derivative.outputs
                ]

                def pull(wanted, implementation, saved=saved, present=present):
                    mask = [i.name in wanted for i in derivative.inputs]
                    return derivative.pull(
                        saved, present, mask, implementation=implementation, **params
                    )

                full = dict(zip(there, pull(there, "xla")))
                for wanted in subsets(there)[1:]:
                    calls.append(pull(wanted, "cuda"))
                    references.append([full[n] for n in there if n in wanted])
        return calls, references

    # The gradients of a plain sum of two branches as they are need none.
    plain = params.get("mode") is PhiResidualMode.STANDARD and params.get("activation", 0) is None
    text = program.lower(inputs, cts).as_text()
    assert ("syntonic_" in text) == (has_calls(derivative, types) and not plain)
    compare(*program(inputs, cts), types[0])
