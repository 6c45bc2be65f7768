"""The examples in the docstrings of every module that is installed."""

import doctest
import importlib
import pkgutil

import pytest

import syntonic_jax

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(syntonic_jax.__path__, "syntonic_jax.")
    if not module.name.endswith(("._kernels", ".__main__"))
)


@pytest.mark.parametrize("name", ["syntonic_jax", *MODULES])
def test_examples_run(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_every_public_function_has_an_example():
    """Doctest would pass over a docstring without one in silence."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in syntonic_jax.__all__:
        value = getattr(syntonic_jax, name)
        if callable(value):
            examples = [test.examples for test in finder.find(value, name)]
            assert any(examples), f"{name} has no example"
