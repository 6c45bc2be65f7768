"""What the benchmark measures: every operation, and the jnp composition a user would write instead.

Bytes are ideal ones: each array read once, each result written once, in units of N, the bytes of
one array of the data; parameters and statistics are left out.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import syntonic_jax
from syntonic_jax import PHI, PHI_INV


class Operation(NamedTuple):
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    arrays: int  # of the shape of the data; parameters follow them
    parameters: int
    forward_passes: int  # N read and written
    backward_passes: int | None  # None: the backward pass is no kernel of ours
    by_width: bool = False  # whether the width of a row matters
    only: tuple[int, ...] = ()  # of the usual widths, if not all
    labels: bool = False  # whether an integer for every row follows
    axis: int = -1  # of the parameters
    shapes: tuple[tuple[int, ...], ...] = ()  # instead of rows of some width
    dtypes: tuple[str, ...] = ("bfloat16", "float32", "float16")
    mixed: bool = False  # whether the default is part kernel, part XLA: a third way forward


def plain_layernorm(identity, residual, scale, bias):
    z = identity + PHI_INV * residual
    wide = z.astype(jnp.promote_types(z.dtype, jnp.float32))
    mean, variance = wide.mean(-1, keepdims=True), wide.var(-1, keepdims=True)
    y = (wide - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias
    return y.astype(z.dtype), z


def plain_golden_gelu(x):
    return x * jax.nn.sigmoid(PHI * x)


def plain_crystallize(x, precision=100):
    """All candidates: the nearest a for every b, and of these the nearest."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    bs = jnp.arange(-precision, precision + 1, dtype=wide.dtype)

    def integer(rest):
        return jnp.clip(jnp.round(rest), -precision, precision)

    rest = wide[..., None] - PHI * bs
    b = jnp.argmin(jnp.abs(rest - integer(rest)), -1).astype(wide.dtype) - precision
    return (integer(wide - PHI * b) + PHI * b).astype(x.dtype)


def plain_norm(residual):
    wide = residual.astype(jnp.promote_types(residual.dtype, jnp.float32))
    return PHI_INV * jnp.sqrt(jnp.sum(wide * wide))


def plain_golden_layer_norm(x, scale, bias):
    return plain_layernorm(x, jnp.zeros_like(x), scale * PHI_INV**0.5, bias)[0]


def plain_rmsnorm(identity, residual, scale):
    z = identity + PHI_INV * residual
    wide = z.astype(jnp.promote_types(z.dtype, jnp.float32))
    mean_square = jnp.square(wide).mean(-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + 1e-6) * scale).astype(z.dtype), z


def plain_golden_rms_norm(x, scale):
    return plain_rmsnorm(x, jnp.zeros_like(x), scale * PHI_INV**0.5)[0]


def plain_batch_norm(x, scale, bias, axis=-1):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    mean, variance = wide.mean(axes, keepdims=True), wide.var(axes, keepdims=True)
    slope = jax.lax.rsqrt(variance + 1e-5) * PHI_INV**0.5 * scale.reshape(mean.shape)
    return ((wide - mean) * slope + bias.reshape(mean.shape)).astype(x.dtype)


def batch_norm(*operands, axis=-1, implementation):
    return syntonic_jax.golden_batch_norm(*operands, axis=axis, implementation=implementation)[0]


def plain_batch_norm_relu(*operands):
    return jax.nn.relu(plain_batch_norm(*operands))


@functools.partial(jax.jit, static_argnames="implementation")
def batch_norm_relu(*operands, implementation):
    return jax.nn.relu(batch_norm(*operands, implementation=implementation))


def plain_cross_entropy(logits, labels):
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(wide, labels[:, None], -1)[:, 0]
    return jax.nn.logsumexp(wide, -1) - chosen


def plain_learned_softmax(x, mode_norms):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jax.nn.softmax(wide - PHI_INV * mode_norms).astype(x.dtype)


def learned_softmax(x, mode_norms, implementation):
    return syntonic_jax.syntonic_softmax(x, mode_norms=mode_norms, implementation=implementation)


def plain_softmax(x, axis=-1):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jax.nn.softmax(wide, axis).astype(x.dtype)


CHANNELS_LAST = ((64, 56, 56, 256), (256, 14, 14, 1024), (65536, 1024))
CHANNELS_FIRST = ((64, 256, 56, 56), (256, 1024, 14, 14))
INNER_AXIS = ((512, 4096, 64), (15420, 512, 17))
CLASSES = ((2670, 50257), (883, 151936))

OPERATIONS = {
    # reads identity and residual, writes y and z; backward reads z and the cotangents of y and z,
    # writes those of identity and residual
    "phi_residual_layernorm": Operation(
        functools.partial(syntonic_jax.phi_residual_layernorm, return_sum=True),
        *(plain_layernorm, 2, 2, 4, 5),
        by_width=True,
    ),
    "phi_residual_rmsnorm": Operation(
        functools.partial(syntonic_jax.phi_residual_rmsnorm, return_sum=True),
        *(plain_rmsnorm, 2, 1, 4, 5),
        by_width=True,
        only=(1024, 4096, 8192, 16384, 50257),
    ),
    "golden_layer_norm": Operation(
        *(syntonic_jax.golden_layer_norm, plain_golden_layer_norm, 1, 2, 2, 3),
        by_width=True,
        only=(768, 1024, 4096, 16384),
    ),
    "golden_rms_norm": Operation(
        *(syntonic_jax.golden_rms_norm, plain_golden_rms_norm, 1, 1, 2, 3),
        by_width=True,
        only=(768, 1024, 4096, 16384),
    ),
    # does not fit on the chip: reads x twice and writes y; backward reads x and the cotangent twice
    "golden_batch_norm": Operation(
        *(batch_norm, plain_batch_norm, 1, 2, 3, 5),
        shapes=CHANNELS_LAST,
        dtypes=("bfloat16", "float32"),
        mixed=True,
    ),
    "golden_batch_norm, channels first": Operation(
        functools.partial(batch_norm, axis=1),
        functools.partial(plain_batch_norm, axis=1),
        *(1, 2, 3, 5),
        axis=1,
        shapes=CHANNELS_FIRST,
        dtypes=("bfloat16", "float32"),
        mixed=True,
    ),
    # what the default is for: no less is read or written, where the activation is fused
    "golden_batch_norm, then relu": Operation(
        *(batch_norm_relu, plain_batch_norm_relu, 1, 2, 3, None),
        shapes=CHANNELS_LAST[:1],
        dtypes=("bfloat16", "float32"),
        mixed=True,
    ),
    "syntonic_softmax": Operation(
        syntonic_jax.syntonic_softmax, plain_softmax, 1, 0, 2, 3, by_width=True
    ),
    "syntonic_softmax, learned": Operation(
        *(learned_softmax, plain_learned_softmax, 1, 1, 2, 3),
        by_width=True,
        only=(1024, 4096, 50257),
    ),
    "syntonic_softmax, inner axis": Operation(
        functools.partial(syntonic_jax.syntonic_softmax, axis=1),
        functools.partial(plain_softmax, axis=1),
        *(1, 0, 2, 3),
        axis=1,
        shapes=INNER_AXIS,
        dtypes=("bfloat16", "float32"),
    ),
    # reads the logits; backward reads them again and writes their gradient
    "syntonic_cross_entropy": Operation(
        *(syntonic_jax.syntonic_cross_entropy, plain_cross_entropy, 1, 0, 1, 2),
        labels=True,
        shapes=CLASSES,
        dtypes=("bfloat16", "float32"),
    ),
    # backward reads a cotangent and writes two, of which the first is a copy of it
    "phi_residual": Operation(syntonic_jax.phi_residual, lambda x, r: x + PHI_INV * r, 2, 0, 3, 3),
    # backward reads what was saved and a cotangent, writes two
    "phi_residual_relu": Operation(
        syntonic_jax.phi_residual_relu, lambda x, r: jax.nn.relu(x + PHI_INV * r), 2, 0, 3, 4
    ),
    "phi_residual_gelu": Operation(
        syntonic_jax.phi_residual_gelu, lambda x, r: jax.nn.gelu(x + PHI_INV * r), 2, 0, 3, 4
    ),
    "golden_gelu": Operation(syntonic_jax.golden_gelu, plain_golden_gelu, 1, 0, 2, 3),
    # straight-through: its backward pass copies the cotangent
    "crystallize": Operation(syntonic_jax.crystallize, plain_crystallize, 1, 0, 2, None),
    # backward reads the residual and writes its gradient
    "residual_component_norm": Operation(
        syntonic_jax.residual_component_norm, plain_norm, 1, 0, 1, 2
    ),
}


class Case(NamedTuple):
    op: str
    direction: str
    dtype: str
    shape: tuple[int, ...]
    implementation: str

    @property
    def ideal_bytes(self) -> int:
        operation = OPERATIONS[self.op]
        forward = self.direction == "forward"
        passes = operation.forward_passes if forward else operation.backward_passes
        assert passes is not None
        return passes * math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def function(self) -> Callable[..., Any]:
        """The operation in this implementation, of its operands alone."""
        operation = OPERATIONS[self.op]
        if self.implementation == "xla":
            return operation.plain
        implementation = None if self.implementation == "default" else self.implementation
        return functools.partial(operation.ours, implementation=implementation)

    def operands(self, seed: int) -> tuple[jax.Array, ...]:
        operation = OPERATIONS[self.op]
        *keys, last = jax.random.split(
            jax.random.key(seed), operation.arrays + operation.parameters + 1
        )
        arrays = [jax.random.normal(k, self.shape, self.dtype) for k in keys[: operation.arrays]]
        parameters = [
            jax.random.normal(k, (self.shape[operation.axis],), jnp.float32)
            for k in keys[operation.arrays :]
        ]
        *lead, classes = self.shape
        labels = [jax.random.randint(last, lead, 0, classes)] if operation.labels else []
        return (*arrays, *parameters, *labels)

    def call(self, seed: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """What is timed, and its arguments.

        The backward pass is timed alone: a function of what the forward pass kept and of the
        cotangents.
        """
        operands = self.operands(seed)
        if self.direction == "forward":
            return self.function(), operands
        operation = OPERATIONS[self.op]
        count = operation.arrays + operation.parameters
        function, labels = jax.jit(self.function()), operands[count:]
        results, pull = jax.vjp(lambda *given: function(*given, *labels), *operands[:count])
        key = jax.random.key(seed + 1)
        cotangents = jax.tree.map(lambda y: jax.random.normal(key, y.shape, y.dtype), results)
        return (lambda pull, cotangents: pull(cotangents)), (pull, cotangents)


# Row widths and types. Elementwise operations have one shape a type.
FULL = {
    "bfloat16": (
        *(256, 768, 1000, 1024, 4096, 5000, 8192, 12288),
        *(16384, 32768, 50257, 65536, 131072, 262144),
    ),
    "float32": (256, 1024, 4096, 16384, 50257, 65536, 131072, 262144),
    "float16": (4096,),
}
QUICK = {"bfloat16": (1024, 8192, 16384)}
ELEMENTWISE_WIDTH = 4096


def fitted(shape: tuple[int, ...], elements: int, axis: int) -> tuple[int, ...]:
    """`shape` with as much of every axis but that of the channels as `elements` allow."""
    sizes = list(shape)
    for i, n in enumerate(shape):
        if i != axis % len(shape):
            sizes[i] = max(1, min(n, elements // (math.prod(sizes) // n)))
    return tuple(sizes)


def cases(
    operations: list[str],
    widths: dict[str, tuple[int, ...]],
    implementations: list[str],
    array_bytes: int,
) -> Iterator[Case]:
    """All of them; arrays have as many whole rows as fit into `array_bytes`."""
    for op in operations:
        operation = OPERATIONS[op]
        directions = ["forward"] + ["backward"] * (operation.backward_passes is not None)
        for dtype, of_dtype in widths.items():
            if dtype not in operation.dtypes:
                continue
            widths_of = of_dtype if operation.by_width else (ELEMENTWISE_WIDTH,)
            if operation.only:
                widths_of = [w for w in widths_of if w in operation.only] or of_dtype
            elements = array_bytes // jnp.dtype(dtype).itemsize
            rows = [(max(1, elements // width), width) for width in widths_of]
            for shape in [fitted(s, elements, operation.axis) for s in operation.shapes] or rows:
                for direction in directions:
                    third = operation.mixed and direction == "forward" and "cuda" in implementations
                    for implementation in implementations + ["default"] * third:
                        yield Case(op, direction, dtype, shape, implementation)
