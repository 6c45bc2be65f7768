"""The emulated kernels in the place of the custom calls."""

import double
import emulator
import jax
import pytest

from syntonic_jax import _custom_call


@pytest.fixture(scope="module")
def emulated():
    """Has the custom calls of this module served by the emulated kernels."""
    double.install()  # has them emitted
    for name, stages in emulator.targets().items():
        jax.ffi.register_ffi_target(name + "_emulated", stages, platform="cpu")
        jax.ffi.register_ffi_target_as_batch_partitionable(name + "_emulated")
    call = _custom_call._call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            _custom_call, "_call", lambda target, *a, **k: call(target + "_emulated", *a, **k)
        )
        jax.clear_caches()
        yield
    jax.clear_caches()
