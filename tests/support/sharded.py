"""Operations with sharded operands: what they should give, and the collectives of a program."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from operations import OPERATIONS

from syntonic_jax import golden_batch_norm

SHAPE, WIDTH = (16, 4, 32), 32

# Of cases that have the same primitives one is enough; batch norms have tests of their own.
ANOTHER = {"phi_residual-golden_gelu", "phi_residual_relu", "log_softmax-shared"}
ANOTHER |= {"cross_entropy-provided-masked", "golden_batch_norm_inference"}
CASES = {o.label: o for o in OPERATIONS if o.along != "lead" and o.label not in ANOTHER}
ROWWISE = [label for label, o in CASES.items() if o.along == "rows"]
ELEMENTWISE = [label for label, o in CASES.items() if o.along == "nothing"]
NORM, LAYER_NORM = "residual_component_norm", "phi_residual_layernorm"
IS_ROWS = {"rows": True, "weights": True, "par": False, "scalar": False}
REPLICATED = P()
BATCH = [P("d"), P(("d", "m")), P("d", "m"), P(None, "m")]
FEATURE = [P("d", None, "m"), P(None, None, "m")]


def summed(f):
    """A loss without weights of its own, whose sharding would be one more thing to decide."""

    def total(*operands):
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(f(*operands)))

    return total


class Case:
    """An operation, operands of it, and what it should give: itself on one device."""

    def __init__(self, label, implementation, rng, shape=SHAPE):
        operation = CASES[label]
        self.f = operation.using(implementation)
        *lead, width = shape
        self.operands = operation.operands(rng, lead=tuple(lead), width=width)
        self.is_rows = [IS_ROWS[kind] for kind in operation.kinds]
        self.argnums = tuple(range(len(self.operands)))
        self.gradients = jax.grad(summed(self.f), self.argnums)
        one_device = operation.using("xla")
        self.values = one_device(*self.operands)
        self.slopes = jax.grad(summed(one_device), self.argnums)(*self.operands)

    def specs(self, rows, parameters=REPLICATED):
        return tuple(
            rows if of_rows else parameters if x.ndim else REPLICATED
            for x, of_rows in zip(self.operands, self.is_rows, strict=True)
        )

    def put(self, mesh, rows, parameters=REPLICATED):
        return [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(self.operands, self.specs(rows, parameters), strict=True)
        ]


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("d", "m"), axis_types=(kind, kind))


def collectives(compiled) -> list[str]:
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf"\b({kinds})(?:-start)?\(", compiled.as_text())


def run(f, *operands):
    """Results and the collectives of the program that computed them."""
    compiled = jax.jit(f).lower(*operands).compile()
    return compiled(*operands), collectives(compiled)


# --- batch norms ---------------------------------------------------------------------------------

CHANNELS = 32
SHAPES = {"last": (16, 4, CHANNELS), "first": (16, CHANNELS, 4), "rows": (16, CHANNELS)}
AXES = {"last": -1, "first": 1, "rows": -1}


class BatchNormCase:
    """A batch norm, operands of it, and what it should give: itself on one device."""

    def __init__(self, layout, implementation, rng, **options):
        self.f = functools.partial(
            golden_batch_norm, axis=AXES[layout], implementation=implementation, **options
        )
        self.operands = [jnp.asarray(rng.normal(size=SHAPES[layout]))]
        self.operands += [jnp.asarray(p) for p in rng.normal(size=(2, CHANNELS))]
        self.gradients = jax.grad(summed(self.f), (0, 1, 2))
        one_device = functools.partial(self.f, implementation="xla")
        self.values = one_device(*self.operands)
        self.slopes = jax.grad(summed(one_device), (0, 1, 2))(*self.operands)

    def put(self, mesh, spec, parameters=REPLICATED):
        return [
            jax.device_put(x, NamedSharding(mesh, s))
            for x, s in zip(self.operands, (spec, parameters, parameters), strict=True)
        ]
