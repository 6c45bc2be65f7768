"""Attention whose keys have weights, by cuDNN's flash attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

nnx = pytest.importorskip("flax.nnx")

from syntonic_jax.nn.nnx import SyntonicAttention  # noqa: E402

pytestmark = pytest.mark.gpu

HEADS, FEATURES, POSITIONS = 4, 256, 128


def layer_and_state(implementation, dtype=jnp.bfloat16, norms=1.0, **options):
    """The same parameters whatever the implementation; mode norms that differ."""
    layer = SyntonicAttention(
        *(HEADS, FEATURES, POSITIONS),
        dtype=dtype,
        mode_norms_init=jax.nn.initializers.normal(norms),
        rngs=nnx.Rngs(0),
        implementation=implementation,
        **options,
    )
    definition, state = nnx.split(layer)
    return layer, lambda state, x: nnx.merge(definition, state)(x, is_causal=True), state


def test_flash_attention_runs(rng):
    x = jnp.asarray(rng.normal(size=(2, POSITIONS, FEATURES)), jnp.bfloat16)
    flash, attend, state = layer_and_state("cudnn")
    compiled = jax.jit(attend).lower(state, x).compile()
    assert "__cudnn$fmha" in str(compiled.as_text())
    plain, by_xla, same = layer_and_state("xla")
    expected = np.asarray(jax.jit(by_xla)(same, x), np.float32)
    assert (flash.path, plain.path) == ("folded", "bias")
    # Probabilities and results are rounded to bfloat16, which may tip either.
    bound = 4 * 2.0**-8 * float(np.max(np.abs(expected)))
    actual = np.asarray(compiled(state, x), np.float32)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


def test_its_backward_pass_too(rng):
    x = jnp.asarray(rng.normal(size=(2, POSITIONS, FEATURES)), jnp.bfloat16)
    _, attend, state = layer_and_state("cudnn")
    gradient = jax.jit(jax.grad(lambda state, x: attend(state, x).astype(jnp.float32).sum()))
    compiled = gradient.lower(state, x).compile()
    assert str(compiled.as_text()).count("__cudnn$fmha") >= 2
    (mode_norms,) = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(compiled(state, x))
        if "mode_norms" in jax.tree_util.keystr(path)
    ]
    assert np.isfinite(mode_norms).all()
    assert np.any(mode_norms != 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("head", "path"), [(256, "bias"), (248, "folded")])
def test_largest_heads(head, path, dtype, rng):
    """256 features leave no room for weights of keys; 248 do, in float16 for large norms too.

    As a bias these have the type of the queries, of which cuDNN takes no other: 8 apart there.
    """
    norms = 20_000.0 if path == "folded" else 10.0
    x = jnp.asarray(rng.normal(size=(2, POSITIONS, FEATURES)), dtype)
    found = {}
    for implementation in ("cudnn", "xla"):
        layer, attend, state = layer_and_state(
            implementation, jnp.dtype(dtype), norms, qkv_features=HEADS * head
        )
        assert implementation == "xla" or layer.path == path
        compiled = jax.jit(attend).lower(state, x).compile()
        assert ("__cudnn$fmha" in str(compiled.as_text())) == (implementation == "cudnn")
        found[implementation] = np.asarray(compiled(state, x), np.float32)
    bound = 4 * float(jnp.finfo(dtype).eps) * float(np.max(np.abs(found["xla"])))
    np.testing.assert_allclose(found["cudnn"], found["xla"], rtol=0, atol=bound)
