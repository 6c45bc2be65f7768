"""What an installation says of itself, and that its extension keeps to itself."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import operations
import pytest

import syntonic_jax
from syntonic_jax import _dispatch, _extension

ROOT = Path(__file__).parents[2]
STEMS = {path.stem for path in (ROOT / "src" / "ffi").glob("*.cc")} - {"module"}

needs_kernels = pytest.mark.skipif(
    not _extension.available(), reason=f"no kernels here: {_extension.reason()}"
)


def python(*arguments):
    """Runs Python elsewhere than in the source tree; returns what it printed."""
    package = str(Path(syntonic_jax.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=sys.prefix,
        env=os.environ | {"PYTHONPATH": package},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def extension_file():
    return _extension._kernels.__file__


@needs_kernels
def test_extension_exports_nothing_but_its_entry_point():
    lines = subprocess.check_output(["nm", "-D", "--defined-only", extension_file()], text=True)
    assert [line.split()[-1] for line in lines.splitlines()] == ["PyInit__kernels"]


@needs_kernels
def test_extension_needs_no_cuda_library():
    lines = subprocess.check_output(["readelf", "-d", extension_file()], text=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", lines)
    assert "libc.so.6" in needed
    assert not [name for name in needed if re.search("cuda|cudart|nv", name)]


@needs_kernels
def test_extension_and_jax_load_in_both_orders():
    load = (
        "from importlib import machinery, util\n"
        f"loader = machinery.ExtensionFileLoader('_kernels', {extension_file()!r})\n"
        "util.module_from_spec(util.spec_from_loader('_kernels', loader))\n"
    )
    use = "import jax.numpy as jnp; print(float(jnp.ones(3, 'bfloat16').sum()))\n"
    assert python("-c", load + use) == python("-c", use + load) == "3.0\n"


@needs_kernels
def test_extension_offers_both_stages_of_every_target():
    registrations = _extension._kernels.registrations()
    assert registrations.keys() == {f"syntonic_{target}" for target in operations.TARGETS}
    assert all(stages.keys() == {"execute", "initialize"} for stages in registrations.values())


@needs_kernels
def test_extension_was_built_for_an_ffi_that_this_jaxlib_has():
    built = _extension._kernels.ffi_api_version()
    assert _extension.refusal(built, _extension.runtime_ffi_api_version()) is None


def test_kernels_of_a_newer_ffi_are_refused():
    major, minor = _extension.runtime_ffi_api_version()
    assert _extension.refusal((major, minor), (major, minor)) is None
    why = _extension.refusal((major, minor + 1), (major, minor))
    assert why.startswith(f"the kernels were built for XLA FFI {major}.{minor + 1}")


@needs_kernels
def test_extension_knows_its_kernels_and_architectures():
    assert set(_extension.kernels()) == STEMS
    assert _extension.architectures()
    assert all(re.fullmatch(r"\d+[af]?(-real|-virtual)?", a) for a in _extension.architectures())
    assert _extension.reason() is None


@pytest.mark.parametrize(
    ("architecture", "runs_on"),
    [
        ("80-real", {"8.0", "8.6", "8.9"}),
        ("86-real", {"8.6", "8.9"}),
        ("90-real", {"9.0"}),
        ("90a-real", {"9.0"}),
        ("90a", {"9.0"}),
        ("100-real", {"10.0", "10.3"}),
        ("100f-real", {"10.0", "10.3"}),
        ("100f", {"10.0", "10.3"}),
        ("100a-virtual", {"10.0"}),
        ("120-virtual", {"12.0", "12.1"}),
        ("90-virtual", {"9.0", "10.0", "10.3", "12.0", "12.1"}),
        ("90", {"9.0", "10.0", "10.3", "12.0", "12.1"}),
        ("native", set()),
    ],
)
def test_which_devices_code_runs_on(architecture, runs_on, monkeypatch):
    devices = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1"]
    monkeypatch.setattr(_extension, "architectures", lambda: (architecture,))
    assert {device for device in devices if _extension.covers(device)} == runs_on


def test_import_starts_no_backend():
    program = (
        "import syntonic_jax; from jax._src import xla_bridge; "
        "print(xla_bridge.backends_are_initialized())"
    )
    assert python("-c", program) == "False\n"


@pytest.fixture
def copied(tmp_path):
    """A copy of the package without its extension, to be spoilt."""
    source = Path(syntonic_jax.__file__).parent
    ignored = shutil.ignore_patterns("_kernels*", "no_kernels.txt", "__pycache__")
    shutil.copytree(source, tmp_path / "syntonic_jax", ignore=ignored)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        (None, "", "it is a source tree, or was installed with SYNTONIC_CUDA=OFF"),
        ("no_kernels.txt", "there is no nvcc.\n", "there is no nvcc."),
        ("_kernels.abi3.so", "not an ELF file", "the extension does not load: "),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="extensions are .so files elsewhere")
def test_package_without_kernels_works_and_says_why(copied, file, content, reason):
    if file is not None:
        (copied / "syntonic_jax" / file).write_text(content)
    # An editable installation would put itself before the path.
    program = (
        f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        f"sys.path.insert(0, {str(copied)!r})\n"
        "import jax.numpy as jnp, syntonic_jax as sj; from syntonic_jax import _extension as e\n"
        "print(float(sj.phi_residual(jnp.ones(()), jnp.ones(()))))\n"
        "print(e.available(), e.kernels(), e.architectures(), e.covers('9.0'))\n"
        "print(e.reason())"
    )
    value, state, why = python("-c", program).splitlines()
    assert abs(float(value) - syntonic_jax.PHI) < 1e-6
    assert state == "False () () False"
    assert why.startswith(reason)


def test_report_for_programs():
    report = json.loads(python("-m", "syntonic_jax", "--json"))
    assert report.keys() == {"versions", "extension", "devices"}
    assert report["versions"]["jax"] == jax.__version__
    assert report["extension"] == {
        "loaded": _extension.available(),
        "reason": _extension.reason(),
        "kernels": list(_extension.kernels()),
        "architectures": list(_extension.architectures()),
    }
    assert report["devices"]
    for device in report["devices"]:
        assert device["implementations"] == {
            operation: _dispatch.selected(
                operation, device["platform"], device["compute_capability"]
            )
            for operation in _dispatch.OPERATIONS
        }


def test_report_of_kernels_alone():
    report = json.loads(python("-m", "syntonic_jax", "--kernels", "--json"))
    assert report.keys() == {"extension"}
    text = python("-m", "syntonic_jax", "--kernels")
    if _extension.available():
        assert all(stem in text for stem in STEMS)
    else:
        assert text == f"kernels        none: {_extension.reason()}\n"


def test_report_for_people():
    text = python("-m", "syntonic_jax")
    assert re.search(rf"^jax +{re.escape(jax.__version__)}$", text, re.MULTILINE)
    assert re.search(r"^device 0 ", text, re.MULTILINE)
    for operation in _dispatch.OPERATIONS:
        assert re.search(rf"^  {operation} +0: (cuda|xla)", text, re.MULTILINE)
