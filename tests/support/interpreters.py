"""The transformations and interpreters of jax beyond those of transformations.py.

Of the same form, (f, operation) -> a function of the operands, and compared in the same way. None
asks a primitive for a rule of its own; each takes the operations into a program of its kind.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.ode import odeint
from jax.extend.core import jaxpr_as_fun
from transformations import batch, loss, positions, step, tangent


def with_gradients(f, operation):
    return lambda *operands: (
        f(*operands),
        jax.grad(loss(f), positions(operation))(*operands),
    )


def of_first(f, operands):
    """An endomorphism of the first operand."""
    return lambda x: step(f, x, *operands[1:])


# --- loops ----------------------------------------------------------------------------------------


def while_loop(f, operation):
    """Forward mode too: it has no other."""

    def run(*operands):
        def loop(x):
            body = of_first(f, operands)
            return jax.lax.while_loop(
                lambda carry: carry[0] < 3, lambda carry: (carry[0] + 1, body(carry[1])), (0, x)
            )[1]

        return jax.jvp(loop, (operands[0],), (tangent(operands[0]),))

    return run


def fori_loop(f, operation):
    def looped(*operands):
        return jax.lax.fori_loop(0, 3, lambda _, x: of_first(f, operands)(x), operands[0])

    return with_gradients(looped, operation)


def map_in_batches(f, operation):
    def mapped(*operands):
        return jax.lax.map(of_first(f, operands), batch(operands[0]), batch_size=2)

    return with_gradients(mapped, operation)


def associative_scan(f, operation):
    def scanned(*operands):
        def combine(x, y):
            return x + 0.1 * jax.vmap(of_first(f, operands))(y)

        return jax.lax.associative_scan(combine, batch(operands[0]))

    return with_gradients(scanned, operation)


def switch(f, operation):
    def chosen(*operands):
        branches = [lambda x: 2 * x, of_first(f, operands), jnp.sin]
        return [jax.lax.switch(i, branches, operands[0]) for i in jnp.arange(3)]

    return with_gradients(chosen, operation)


# --- derivatives of one's own ---------------------------------------------------------------------


def within_custom_jvp(f, operation):
    @jax.custom_jvp
    def own(*operands):
        return f(*operands)

    @own.defjvp
    def _(primals, tangents):
        y, dy = jax.jvp(f, primals, tangents)
        return y, jax.tree.map(lambda t: 2 * t, dy)

    return with_gradients(own, operation)


def within_custom_vjp(f, operation):
    @jax.custom_vjp
    def own(*operands):
        return f(*operands)

    def backward(residuals, ct):
        return tuple(2 * g for g in residuals(ct))

    own.defvjp(lambda *operands: jax.vjp(f, *operands), backward)
    return with_gradients(own, operation)


def custom_gradient(f, operation):
    @jax.custom_gradient
    def own(*operands):
        y, pull = jax.vjp(f, *operands)
        return y, lambda ct: tuple(3 * g for g in pull(ct))

    return with_gradients(own, operation)


def closure_convert(f, operation):
    def run(*operands):
        converted, held = jax.closure_convert(of_first(f, operands), operands[0])
        return converted(operands[0], *held)

    return with_gradients(run, operation)


def linear_call(f, operation):
    """Of the linearisation, with its transpose given: derivatives of both kinds through it."""

    def run(*operands):
        def push(x, dx):
            return jax.jvp(of_first(f, operands), (x,), (dx,))[1]

        def pull(x, ct):
            return jax.vjp(of_first(f, operands), x)[1](ct)[0]

        def linear(dx):
            return jax.custom_derivatives.linear_call(push, pull, operands[0], dx)

        dx = tangent(operands[0])
        return jax.jvp(linear, (dx,), (operands[0],)), jax.linear_transpose(linear, dx)(dx)

    return run


def linearize_with_aux(f, operation):
    def run(*operands):
        y, push, aux = jax.linearize(lambda *xs: (f(*xs), xs[0] + 1), *operands, has_aux=True)
        _, pull, again = jax.vjp(lambda *xs: (f(*xs), xs[0] + 1), *operands, has_aux=True)
        return y, push(*map(tangent, operands)), aux, pull(y), again

    return run


# --- batching of one's own ------------------------------------------------------------------------


def custom_vmap(f, operation):
    """Around the operation, and with it in the rule."""

    def run(*operands):
        own = jax.custom_batching.custom_vmap(of_first(f, operands))
        own.def_vmap(lambda size, mapped, x: (jax.vmap(of_first(f, operands))(x + 1), mapped[0]))
        sequential = jax.custom_batching.sequential_vmap(of_first(f, operands))
        x = operands[0]
        return own(x), jax.vmap(own)(batch(x)), jax.vmap(sequential)(batch(x))

    return run


# --- programs as data -----------------------------------------------------------------------------


def jaxpr_round_trip(f, operation):
    """To a jaxpr and back, with the gradients of what comes back."""

    def run(*operands):
        closed, shapes = jax.make_jaxpr(f, return_shape=True)(*operands)

        def again(*xs):
            return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(closed)(*xs))

        return with_gradients(again, operation)(*operands)

    return run


def references(f, operation):
    """A mutable array that the operation is read from and written to, discharged by jit."""

    def mutated(*operands):
        ref = jax.new_ref(operands[0])
        for _ in range(2):
            ref[...] = of_first(f, operands)(ref[...])
        return jax.freeze(ref)

    return with_gradients(mutated, operation)


def named(f, operation):
    def run(*operands):
        with jax.named_scope("scope"):
            y = jax.named_call(f, name="call")(*operands)
        return jax.lax.optimization_barrier(y)

    return with_gradients(run, operation)


def composite(f, operation):
    """Which has no derivative of its own: around values and around gradients."""

    def run(*operands):
        value = jax.lax.composite(lambda *xs: f(*xs), "test.value")
        slope = jax.lax.composite(
            lambda *xs: jax.grad(loss(f), positions(operation))(*xs), "test.slope"
        )
        return value(*operands), slope(*operands)

    return run


def platform_dependent(f, operation):
    def run(*operands):
        return jax.lax.platform_dependent(
            *operands, cpu=lambda *xs: f(*xs), default=lambda *xs: f(*xs)
        )

    return with_gradients(run, operation)


def callbacks_beside(f, operation):
    """A Python callback before and after."""

    def run(*operands):
        x = jax.pure_callback(lambda x: x + 1, operands[0], operands[0])
        y = f(x, *operands[1:])
        jax.debug.callback(lambda *_: None, y)
        return y

    return run


# --- solvers --------------------------------------------------------------------------------------


def small(f, operands):
    """A contraction of the first operand, so that equations with it have one solution."""
    return lambda x: 0.05 * jnp.tanh(of_first(f, operands)(x))


def iterated(g, x):
    return jax.lax.fori_loop(0, 80, lambda _, x: g(x), x)


def custom_root(f, operation):
    """x = c + g(x), by iteration; its derivative by a linear solve of the same kind."""

    def solved(*operands):
        g, c = small(f, operands), operands[0]
        return jax.lax.custom_root(
            lambda x: x - c - g(x),
            jnp.zeros_like(c),
            lambda residual, guess: iterated(lambda x: x - residual(x), guess),
            lambda linear, b: iterated(lambda x: x + b - linear(x), b),
        )

    return lambda *operands: jax.jvp(
        functools.partial(_with_first, solved, operands), (operands[0],), (tangent(operands[0]),)
    )


def custom_linear_solve(f, operation):
    def solved(*operands):
        _, push = jax.linearize(small(f, operands), operands[0])
        return jax.lax.custom_linear_solve(
            lambda x: x + push(x),
            operands[0],
            lambda matvec, b: iterated(lambda x: x + b - matvec(x), b),
        )

    return lambda *operands: jax.jvp(
        functools.partial(_with_first, solved, operands), (operands[0],), (tangent(operands[0]),)
    )


def _with_first(g, operands, x):
    return g(x, *operands[1:])


def differential_equation(f, operation):
    """And its adjoint, which is another one."""

    def solved(*operands):
        rest, start = operands[1:], operands[0]
        times = jnp.array([0.0, 0.5])
        return odeint(lambda x, t, *rest: jnp.sin(step(f, x, *rest)), start, times, *rest)

    return solved


LOOPS = (while_loop, fori_loop, map_in_batches, associative_scan, switch)
DERIVATIVES = (
    within_custom_jvp,
    within_custom_vjp,
    custom_gradient,
    closure_convert,
    linear_call,
    linearize_with_aux,
    custom_vmap,
)
PROGRAMS = (
    jaxpr_round_trip,
    references,
    named,
    composite,
    platform_dependent,
    callbacks_beside,
)
SOLVERS = (custom_root, custom_linear_solve, differential_equation)


def all_of(*members):
    """Several as one, which is one compilation."""

    def together(f, operation):
        return lambda *operands: {t.__name__: t(f, operation)(*operands) for t in members}

    return together


GROUPS = {
    "loops": all_of(*LOOPS),
    "derivatives": all_of(*DERIVATIVES),
    "programs": all_of(*PROGRAMS),
    "solvers": all_of(*SOLVERS),
}
