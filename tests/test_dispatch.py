"""What 'cuda' and None take on GPUs that are only pretended."""

import functools

import jax
import jax.numpy as jnp
import pytest

from syntonic_jax import _compat, _extension, golden_layer_norm


@pytest.mark.parametrize(
    ("available", "architectures", "message"),
    [
        (False, (), "has no kernels: this installation has no kernels .*see docs/building.md"),
        (True, ("80-real",), "has no kernel for compute capability 9.0, only for 80-real; rebuild"),
    ],
)
def test_kernels_asked_for_on_a_gpu_that_cannot_run_them(
    available, architectures, message, monkeypatch
):
    """With a device that is only pretended: nothing is run."""
    monkeypatch.setattr(_compat, "cuda_compute_capabilities", lambda: ("9.0",))
    monkeypatch.setattr(_extension, "available", lambda: available)
    monkeypatch.setattr(_extension, "architectures", lambda: architectures)

    def lowered(f):
        return jax.jit(f).trace(jnp.ones(8)).lower(lowering_platforms=("cuda",)).as_text()

    f = functools.partial(golden_layer_norm, implementation="cuda")
    with pytest.raises(RuntimeError, match=f"golden_layer_norm: implementation='cuda' {message}"):
        lowered(f)
    assert "syntonic" not in lowered(golden_layer_norm)
