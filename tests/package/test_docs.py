"""What README and docs say of names, files, tables and figures is so."""

import doctest
import importlib.util
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

import syntonic_jax
from syntonic_jax import _dispatch, _extension

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
FOLDERS = "benchmarks|cuda|docs|examples|src|syntonic_jax|tests"


def section(text: str, heading: str) -> str:
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def table(text: str) -> list[list[str]]:
    """The cells of the rows below the head of the first table."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(path: Path) -> set[str]:
    """What a Python file defines, wherever in it."""
    return set(re.findall(r"^\s*(?:def|class) (\w+)", path.read_text(encoding="utf-8"), re.M))


@pytest.fixture(scope="module")
def figures():
    """benchmarks/figures.py as a module."""
    spec = importlib.util.spec_from_file_location("figures", ROOT / "benchmarks" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page):
    # Under x64, which other tests of this process may have turned on, types would differ.
    with jax.enable_x64(False):
        failed, _ = doctest.testfile(str(page), module_relative=False)
    assert failed == 0


def test_some_examples_run():
    """A fence or prompt that doctest does not see would make the test above pass emptily."""
    parser = doctest.DocTestParser()
    assert len(parser.get_examples(README)) >= 10


def test_the_table_of_operations_is_the_public_functions():
    rows = {row[0].strip("`") for row in table(section(README, "Operations"))}
    public = {name for name in syntonic_jax.__all__ if callable(getattr(syntonic_jax, name))}
    assert rows == {name for name in public if not isinstance(getattr(syntonic_jax, name), type)}
    assert rows == set(_dispatch.OPERATIONS)  # what python -m syntonic_jax reports
    for name in set(syntonic_jax.__all__) - rows:
        assert f"`{name}`" in section(README, "Operations")


def test_the_table_of_transformations_names_tests_that_exist():
    rows = table(section(README, "Transformations"))
    assert len(rows) >= 16
    for row in rows:
        path, _, test = row[-1].strip("`").partition("::")
        assert (ROOT / path).is_file(), path
        assert not test or test in names(ROOT / path), row[-1]


def test_the_table_of_implementations_is_what_is_selected(monkeypatch):
    """As on a machine with a GPU that the kernels are compiled for."""
    monkeypatch.setattr(_extension, "available", lambda: True)
    monkeypatch.setattr(_extension, "covers", lambda capability: True)
    page = (ROOT / "docs" / "implementation.md").read_text(encoding="utf-8")
    rows = table(section(page, "What `None` selects"))
    documented = {re.match(r"`(\w+)`", row[0])[1]: row[1].strip("`") for row in rows}
    assert documented == {op: _dispatch.selected(op, "cuda", "9.0") for op in _dispatch.OPERATIONS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    """Of this project: what is not said to belong to the original."""
    text = re.sub(r"^\| .*?(?= \| )", "|", page.read_text(encoding="utf-8"), flags=re.M)
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)(?:::\w+)?`", text):
        assert (ROOT / path).exists(), path


def test_tests_that_the_original_is_mapped_to_exist():
    page = (ROOT / "docs" / "from-the-original.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) == 6
    assert named <= names(ROOT / "tests" / "ops" / "test_phi_residual.py")


def test_names_of_the_library_in_the_docs_exist():
    for page in PAGES:
        for name in re.findall(r"`syntonic_jax\.(\w+)", page.read_text(encoding="utf-8")):
            # A subpackage is an attribute only once something has imported it.
            exists = hasattr(syntonic_jax, name) or find_spec(f"syntonic_jax.{name}")
            assert exists, f"{page.name}: {name}"


def test_every_build_variable_and_preset_is_documented():
    """And the other way round."""
    page = (ROOT / "docs" / "building.md").read_text(encoding="utf-8")
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    presets = (ROOT / "CMakePresets.json").read_text(encoding="utf-8")
    defined = set(re.findall(r"(?:option|set)\((SYNTONIC_\w+) .*?(?:CACHE|ON|OFF)", cmake))
    assert defined == set(re.findall(r"^\| `(SYNTONIC_\w+)`", page, re.M))
    known = set(re.findall(r'"name": "([\w-]+)"', presets))
    assert known == set(re.findall(r"--preset ([\w-]+)", page))


def test_figures_are_those_of_the_results(figures):
    for path, text in figures.expected().items():
        assert path.read_text(encoding="utf-8") == text, (
            f"{path.name} is not of benchmarks/results: run {Path(sys.executable).name} "
            "benchmarks/figures.py"
        )
