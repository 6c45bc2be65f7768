"""The layers are there without their frameworks being needed."""

import json
import subprocess
import sys

import pytest


def run(code: str):
    """The JSON that a fresh interpreter prints."""
    # -P: the folder of the sources must not hide the installed package.
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_no_framework_is_imported_before_it_is_asked_for():
    loaded = run(
        "import sys, json, syntonic_jax, syntonic_jax.nn\n"
        "print(json.dumps([m for m in ('flax', 'haiku') if m in sys.modules]))"
    )
    assert loaded == []


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [("nnx", "flax", "flax"), ("linen", "flax", "flax"), ("haiku", "haiku", "haiku")],
)
def test_a_missing_framework_names_its_extra(module, package, extra):
    message = run(
        "import sys, json\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import syntonic_jax.nn\n"
        "try:\n"
        f"    syntonic_jax.nn.{module}\n"
        "except ImportError as error:\n"
        "    print(json.dumps(str(error)))"
    )
    assert f"{package!r} is not installed" in message
    assert f"pip install 'syntonic-jax[{extra}]'" in message


def test_a_broken_framework_is_not_called_missing():
    """An installed framework whose own imports fail is reported as it is."""
    kind, name = run(
        "import sys, json\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'jmp':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "try:\n"
        "    import syntonic_jax.nn.haiku\n"
        "except ImportError as error:\n"
        "    print(json.dumps([type(error).__name__, error.name]))"
    )
    assert (kind, name) == ("ModuleNotFoundError", "jmp")


def test_an_unknown_module_is_an_attribute_error():
    import syntonic_jax.nn

    assert {"nnx", "linen", "haiku"} <= set(dir(syntonic_jax.nn))
    with pytest.raises(AttributeError, match="torch"):
        _ = syntonic_jax.nn.torch
