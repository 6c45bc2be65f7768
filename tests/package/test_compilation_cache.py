"""The cache of compiled programs that the workers of a run share."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture
def folder(tmp_path):
    kept = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", kept)
    compilation_cache.reset_cache()


def test_what_another_worker_has_not_written_whole_is_compiled(folder):
    """jax writes an entry in place, so that one can be read half written."""

    def f(x):
        return jnp.sin(x) + 25

    x = jnp.arange(7.0)
    expected = jax.jit(f)(x)
    entries = [path for path in folder.iterdir() if "jit_f" in path.name]
    assert entries
    for path in entries:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    jax.clear_caches()
    assert (jax.jit(f)(x) == expected).all()
