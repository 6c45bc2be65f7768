"""No primitive without its rules, and none that the tests over every operation leave out."""

import sys

import jax
import numpy as np
import operations
import pytest
import softmax_cases
import transformations
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from syntonic_jax import _compat, _dispatch
from syntonic_jax._operation import Derivative, Operation
from syntonic_jax.lattice import snap_distance

# Looked for where they are kept, not where they are made: one made by hand is found too.
KEPT = [
    value
    for name, module in list(sys.modules.items())
    if name.partition(".")[0] == "syntonic_jax"
    for value in vars(module).values()
]
KEPT += [value.derivative for value in KEPT if isinstance(value, Operation)]
KEPT += [value.primitive for value in KEPT if isinstance(value, Operation)]
KEPT += [p for value in KEPT if isinstance(value, Derivative) for p in value.primitives]
PRIMITIVES = {
    value.name: value
    for value in KEPT
    if isinstance(value, Primitive) and value.name != "custom_call"  # of lowerings: none sees it
}
# What lies within one `custom_jvp`: batch norms are differentiated as a whole.
WHOLE = {"golden_batch_norm_moments", "golden_batch_norm_normalise"}
LINEAR = {name for name in PRIMITIVES if name.endswith(("_tangent", "_cotangent"))}
TABLES = {
    "vmap": (batching.fancy_primitive_batchers, set(PRIMITIVES)),
    "jvp": (ad.primitive_jvps, set(PRIMITIVES) - WHOLE),
    "transpose": (ad.primitive_transposes, LINEAR | {"phi_residual", "contained"}),
    "checkify": (_compat._checkify.error_checks, set(PRIMITIVES)),
    "jet": (_compat._jet.jet_rules, set(PRIMITIVES)),
}


@pytest.mark.parametrize("table", TABLES)
def test_every_primitive_has_a_rule(table):
    rules, expected = TABLES[table]
    assert len(PRIMITIVES) >= 31
    assert {name for name, primitive in PRIMITIVES.items() if primitive in rules} == expected


def test_every_operation_is_among_the_cases():
    assert {o.name for o in operations.OPERATIONS} == set(_dispatch.OPERATIONS)


def test_every_primitive_is_met_by_the_cases():
    """By values and both derivatives of them, which is what the tests over all of them call."""

    def names(f, *operands):
        found = softmax_cases.equations(jax.make_jaxpr(f)(*operands).jaxpr)
        return {equation.primitive.name for equation in found}

    met = set()
    for operation in operations.OPERATIONS:
        operands = operation.operands(np.random.default_rng(0), "float32")
        f, positions = operation.using(None), transformations.positions(operation)
        met |= names(f, *operands)
        met |= names(jax.grad(transformations.loss(f), positions), *operands)
        met |= names(lambda *x, f=f: jax.jvp(f, x, x), *operands)
    met |= names(snap_distance, np.ones(1, "float32"))
    assert set(PRIMITIVES) <= met
