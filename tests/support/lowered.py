"""The CUDA lowering as StableHLO, on a machine without a GPU, and what a jaxpr holds."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from syntonic_jax import _dispatch, phi_residual_layernorm

WIDTH = 8
ROWS = jax.ShapeDtypeStruct((6, 4, WIDTH), jnp.bfloat16)
PARAMETER = jax.ShapeDtypeStruct((WIDTH,), jnp.float32)


class Call(NamedTuple):
    target: str
    attributes: dict[str, str]  # "1.0 : f64"
    operands: list[str]  # types: "6x4x8xbf16"
    results: list[str]

    def named(self, part: str) -> dict[str, str]:
        """The types of its `operands` or `results` by their names."""
        names = self.attributes[part].strip('"').split()
        return dict(zip(names, getattr(self, part), strict=True))


def stablehlo(f, *operands, platform="cuda", dialect="stablehlo") -> str:
    return jax.jit(f).trace(*operands).lower(lowering_platforms=(platform,)).as_text(dialect)


def custom_calls(f, *operands, platform="cuda") -> list[Call]:
    calls = []
    for line in stablehlo(f, *operands, platform=platform).splitlines():
        if found := re.search(r"stablehlo\.custom_call @(syntonic\w+)\(.*", line):
            config = re.search(r"mhlo\.backend_config = \{([^}]+)\}", line)
            pairs = [pair.split(" = ") for pair in config[1].split(", ")] if config else []
            operand_types, result_types = line.rsplit(" : (", 1)[1].split(") -> ")
            calls.append(
                Call(
                    found[1],
                    dict(pairs),
                    re.findall(r"tensor<(.*?)>", operand_types),
                    re.findall(r"tensor<(.*?)>", result_types),
                )
            )
    return calls


def number(attribute: str) -> float | int:
    """ "3 : i32" or "1.0 : f64", the only two types there are; MLIR prints seven digits or all."""
    value, kind = attribute.split(" : ")
    return {"i32": int, "f64": float}[kind](value)


def check_call(call: Call, target: str, operands: dict, results: dict, /, **attributes):
    assert call.target == target
    assert list(call.named("operands").items()) == list(operands.items())
    assert list(call.named("results").items()) == list(results.items())
    numbers = {k: number(v) for k, v in call.attributes.items() if k not in ("operands", "results")}
    assert numbers == attributes
    types = {name: type(value) for name, value in numbers.items()}
    assert types == {name: type(value) for name, value in attributes.items()}


def gradients(f, *argnums):
    """Of a sum of all outputs; every output has a cotangent, nothing keeps the forward result."""

    def total(*operands):
        return sum(jnp.sum(x.astype("float32")) for x in jax.tree.leaves(f(*operands)))

    return jax.grad(total, argnums)


def primitives(f, *operands) -> list[str]:
    """Names of the library's primitives in a jaxpr, subexpressions included."""
    text = str(jax.make_jaxpr(f)(*operands))
    found = re.findall(r"= (\w+)\[", text)
    return [name for name in found if re.sub("_(co)?tangent$", "", name) in _dispatch.OPERATIONS]


def kept(f, *operands) -> list[jax.ShapeDtypeStruct]:
    """The arrays that wait for the backward pass."""
    pullback = jax.eval_shape(lambda *x: jax.vjp(f, *x)[1], *operands)
    return sorted((str(x.dtype), x.shape) for x in jax.tree.leaves(pullback))


layernorm = functools.partial(phi_residual_layernorm, implementation="cuda")


def batch(x):
    return jax.ShapeDtypeStruct((5, *x.shape), x.dtype)


def dims(tensor_type: str) -> list[int]:
    return [int(n) for n in re.findall(r"(\d+)x", tensor_type)]
