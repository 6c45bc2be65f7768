"""What 'cuda' and None take: on a CPU, on other platforms, on GPUs that are only pretended."""

import functools

import jax
import jax.numpy as jnp
import pytest
from fresh import run_fresh
from lowered import ROWS, custom_calls, gradients, layernorm

from syntonic_jax import (
    _compat,
    _extension,
    golden_layer_norm,
    phi_residual_gelu,
    phi_residual_layernorm,
)


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


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_no_kernel_is_asked_for(implementation):
    for f in (phi_residual_layernorm, phi_residual_gelu):
        f = functools.partial(f, implementation=implementation)
        for platform in ("cpu", "cuda"):  # None: nothing is known of a GPU that is not there
            assert custom_calls(gradients(f, 0, 1), ROWS, ROWS, platform=platform) == []


@pytest.mark.parametrize("platform", ["tpu", "rocm"])
def test_other_platforms(platform):
    assert custom_calls(phi_residual_layernorm, ROWS, ROWS, platform=platform) == []
    with pytest.raises(ValueError, match=rf"phi_residual_layernorm.*'cuda'.*{platform}"):
        custom_calls(layernorm, ROWS, ROWS, platform=platform)


def test_cuda_on_a_cpu_names_the_remedy():
    """In a fresh process, as the double may serve platform cpu in this one."""
    script = """
        import jax, jax.numpy as jnp, syntonic_jax
        from syntonic_jax import _extension
        x = jnp.ones((2, 4))
        functions = {
            "phi_residual": lambda: syntonic_jax.phi_residual(x, x, implementation="cuda"),
            "phi_residual_layernorm": lambda: jax.jit(
                lambda x: syntonic_jax.phi_residual_layernorm(x, x, implementation="cuda")
            )(x),
            "golden_gelu": lambda: syntonic_jax.golden_gelu(x, implementation="cuda"),
            "crystallize": lambda: syntonic_jax.crystallize(x, implementation="cuda"),
            "residual_component_norm": lambda: jax.grad(
                lambda x: syntonic_jax.residual_component_norm(x, implementation="cuda")
            )(x),
        }
        for name, function in functions.items():
            jax.eval_shape(function)  # tracing is fine
            try:
                function()
            except ValueError as error:
                text = str(error)
                assert name in text and "implementation='cuda'" in text, text
                assert "cpu" in text and "implementation=None" in text, text
                assert "no CUDA device" in text, text
                assert ("no kernels" in text) == (not _extension.available()), text
            else:
                raise SystemExit(f"{name} ran")
    """
    run_fresh(script)


def test_importing_initialises_no_backend():
    run_fresh("""
        import syntonic_jax
        from jax._src import xla_bridge
        assert not xla_bridge.backends_are_initialized()
    """)
