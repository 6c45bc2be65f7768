"""Transformations to put an operation through: (f, operation) -> a function of the operands.

Each is applied to the operation and to its formula in plain jnp alike.
"""

import itertools

import jax
import jax.numpy as jnp
import oracles


def loss(f, only=None):
    """A scalar in which every element of every output (or of one) weighs differently."""

    def value(*operands):
        outputs = jax.tree.leaves(f(*operands))
        if only is not None:
            outputs = outputs[only : only + 1]
        total = 0.0
        for out in outputs:
            weights = jnp.linspace(0.5, 1.5, out.size, dtype=out.dtype).reshape(out.shape)
            part = jnp.sum(jnp.sin(out * weights))
            total = total + part.astype(oracles.accumulation(out.dtype))  # outputs may differ
        return total

    return value


def subsets(n: int) -> list[tuple[int, ...]]:
    return [s for k in range(1, n + 1) for s in itertools.combinations(range(n), k)]


def positions(operation) -> tuple[int, ...]:
    return tuple(range(len(operation.kinds)))


def moved(f, chosen, operands):
    """f as a function of the chosen operands, the others held."""

    def of_chosen(*values):
        full = list(operands)
        for i, value in zip(chosen, values, strict=True):
            full[i] = value
        return f(*full)

    return of_chosen


def tangent(x):
    return jnp.cos(3 * x)


def value(f, operation):
    return f


def jvp(f, operation):
    """Along every subset of operands; the others have symbolic zeros for tangents."""

    def run(*operands):
        results = []
        for chosen in subsets(len(operands)):
            primals = tuple(operands[i] for i in chosen)
            tangents = tuple(map(tangent, primals))
            results.append(jax.jvp(moved(f, chosen, operands), primals, tangents))
        return results

    return run


def vjp(f, operation):
    """With respect to every subset of operands."""

    def run(*operands):
        return [jax.value_and_grad(loss(f), s)(*operands) for s in subsets(len(operands))]

    return run


def vjp_of_each_output(f, operation):
    """The cotangents of the other outputs are symbolic zeros."""

    def run(*operands):
        count = len(jax.tree.leaves(jax.eval_shape(f, *operands)))
        return [jax.grad(loss(f, i), positions(operation))(*operands) for i in range(count)]

    return run


def linearize(f, operation):
    def run(*operands):
        out, push = jax.linearize(f, *operands)
        pull = jax.linear_transpose(push, *operands)
        return out, push(*map(tangent, operands)), pull(out)

    return run


def jacfwd(f, operation):
    return jax.jacfwd(f, positions(operation))


def jacrev(f, operation):
    return jax.jacrev(f, positions(operation))


def hessian(f, operation):
    return jax.hessian(loss(f), positions(operation))


def grad_of_grad(f, operation):
    """Reverse over reverse, which transposes the cotangent's own derivative."""
    gradients = jax.grad(loss(f), positions(operation))
    return jax.grad(loss(gradients), positions(operation))


def jvp_of_jvp(f, operation):
    def along(g):
        return lambda *xs: jax.jvp(g, xs, tuple(map(tangent, xs)))[1]

    return along(along(f))


def batch(x, axis=0):
    return jnp.stack([x, 0.5 * x + 1, -x], axis)


def batched(f, chosen, operands, axis=0, **options):
    """vmap of f with the chosen operands batched along `axis`."""
    axes = [axis if i in chosen else None for i in range(len(operands))]
    operands = [batch(x, axis) if i in chosen else x for i, x in enumerate(operands)]
    return jax.vmap(f, in_axes=axes, **options)(*operands)


def vmap(f, operation):
    """Every combination of batched and unbatched operands."""
    return lambda *operands: [batched(f, s, operands) for s in subsets(len(operands))]


def vmap_other_axes(f, operation):
    """The last axis in and out, the first operand's first axis beside the second's last one."""

    def run(*operands):
        everything = range(len(operands))
        results = [batched(f, everything, operands, axis=-1, out_axes=-1)]
        if len(operands) > 1:
            mixed = jax.vmap(f, in_axes=(0, -1) + (None,) * (len(operands) - 2))
            results.append(mixed(batch(operands[0]), batch(operands[1], -1), *operands[2:]))
        return results

    return run


def vmap_nested(f, operation):
    """The outer axis maps all operands; the inner one all, and then the first alone."""

    def run(*operands):
        everything = range(len(operands))
        return [
            batched(lambda *xs, c=c: batched(f, c, xs), everything, operands)
            for c in (everything, (0,))
        ]

    return run


def vmap_of_grad(f, operation):
    """Gradients of every operand for each example, over every combination of what is mapped."""
    gradients = jax.grad(loss(f), positions(operation))
    return lambda *operands: [batched(gradients, s, operands) for s in subsets(len(operands))]


def vmap_of_hessian(f, operation):
    """Of the first operand, one for each example."""
    return lambda *operands: batched(jax.hessian(loss(f)), (0,), operands)


def step(f, *operands):
    """An endomorphism of the first operand."""
    return 0.5 * operands[0] + jax.tree.leaves(f(*operands))[0]


def scan(f, operation):
    def run(*operands):
        def looped(*operands):
            def body(carry, _):
                carry = step(f, carry, *operands[1:])
                return carry, jnp.sum(carry)

            return jax.lax.scan(body, operands[0], None, length=3)

        return looped(*operands), jax.grad(loss(looped), positions(operation))(*operands)

    return run


def checkpoint(f, operation):
    """Gradients with rematerialisation, under several policies."""
    policies = jax.checkpoint_policies

    def twice(*operands):
        return f(step(f, *operands), *operands[1:])

    def run(*operands):
        return [
            jax.grad(loss(jax.checkpoint(twice, policy=policy)), positions(operation))(*operands)
            for policy in (None, policies.everything_saveable, policies.dots_saveable)
        ]

    return run


def cond(f, operation):
    """Taken and not taken, differentiated, and turned into a select by vmap."""

    def branches(pick, *operands):
        return jax.lax.cond(pick, lambda *xs: step(f, *xs), lambda x, *_: 2 * x, *operands)

    gradients = jax.value_and_grad(loss(branches), tuple(i + 1 for i in positions(operation)))

    def run(*operands):
        picks = jnp.array([True, False])
        axes = (0,) + (None,) * len(operands)
        each = [gradients(pick, *operands) for pick in picks]
        return each, jax.vmap(gradients, axes)(picks, *operands)

    return run


ALL = (
    value,
    jvp,
    vjp,
    vjp_of_each_output,
    linearize,
    jacfwd,
    jacrev,
    hessian,
    grad_of_grad,
    jvp_of_jvp,
    vmap,
    vmap_other_axes,
    vmap_nested,
    vmap_of_grad,
    vmap_of_hessian,
    scan,
    checkpoint,
    cond,
)


def to_second_order(f, given, along):
    """To second order: forward, reverse, forward over reverse and reverse over reverse."""

    def scalar(given):
        return jnp.sum(jnp.sin(3 * f(given)))

    def second(given):
        return sum(jnp.sum(jnp.sin(v)) for v in jax.tree.leaves(jax.grad(scalar)(given)))

    return (
        jax.jvp(f, (given,), (along,)),
        jax.grad(scalar)(given),
        jax.jvp(jax.grad(scalar), (given,), (along,))[1],
        jax.grad(second)(given),
    )
