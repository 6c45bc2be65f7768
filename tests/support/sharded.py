"""Operations with sharded operands: what they should give, and the collectives of a program."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from syntonic_jax import (
    crystallize,
    golden_batch_norm,
    golden_gelu,
    golden_layer_norm,
    phi_residual,
    phi_residual_gelu,
    phi_residual_layernorm,
    residual_component_norm,
    syntonic_cross_entropy,
    syntonic_log_softmax,
    syntonic_softmax,
)

SHAPE, WIDTH = (16, 4, 32), 32


def softmax(x, norms, **options):
    return syntonic_softmax(x, mode_norms=norms, **options)


def log_softmax(x, weights, **options):
    """With weights of their own for every row, and a mask."""
    y = syntonic_log_softmax(x, syntony=jnp.square(weights), where=x < 1, **options)
    return jnp.where(x < 1, y, 0)


def cross_entropy(x, norms, **options):
    labels = (x.sum(-1) > 0).astype("int32")
    return syntonic_cross_entropy(x, labels, mode_norms=norms, **options)


CALLS = {
    "layernorm": (functools.partial(phi_residual_layernorm, return_sum=True), "rrpp"),
    "layer_norm": (golden_layer_norm, "rpp"),
    "gelu": (phi_residual_gelu, "rr"),
    "sum": (phi_residual, "rr"),
    "golden_gelu": (golden_gelu, "r"),
    "crystallize": (crystallize, "r"),
    "norm": (residual_component_norm, "r"),
    "softmax": (softmax, "rp"),
    "log_softmax": (log_softmax, "rr"),
    "cross_entropy": (cross_entropy, "rp"),
}
SOFTMAX = "softmax", "log_softmax", "cross_entropy"
REPLICATED = P()
BATCH = [P("d"), P(("d", "m")), P("d", "m"), P(None, "m")]
FEATURE = [P("d", None, "m"), P(None, None, "m")]


def summed(f):
    """A loss without weights of its own, whose sharding would be one more thing to decide."""

    def total(*operands):
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(f(*operands)))

    return total


class Case:
    """A function, operands of it, and what it should give: itself on one device."""

    def __init__(self, name, implementation, rng, shape=SHAPE):
        f, kinds = CALLS[name]
        self.f = functools.partial(f, implementation=implementation)
        shapes = [shape if kind == "r" else shape[-1:] for kind in kinds]
        self.operands = [jnp.asarray(rng.normal(size=s)) for s in shapes]
        self.kinds = kinds
        self.argnums = tuple(range(len(kinds)))
        self.gradients = jax.grad(summed(self.f), self.argnums)
        one_device = functools.partial(f, implementation="xla")
        self.values = one_device(*self.operands)
        self.slopes = jax.grad(summed(one_device), self.argnums)(*self.operands)

    def put(self, mesh, rows, parameters=REPLICATED):
        specs = [rows if kind == "r" else parameters for kind in self.kinds]
        return [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(self.operands, specs, strict=True)
        ]

    def specs(self, rows, parameters=REPLICATED):
        return tuple(rows if kind == "r" else parameters for kind in self.kinds)


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
