"""The examples run as a user runs them, only shorter."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

EXAMPLES = Path(__file__).parents[2] / "examples"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def digits():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("digits", EXAMPLES / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits_trains_and_draws(tmp_path):
    """Four epochs of six blocks are no more than a start, yet far above the 10 % of guessing."""
    picture = tmp_path / "pictures" / "digits.png"
    short = ["--epochs", "4", "--depth", "6", "--out", str(picture), "--require", "60"]
    done = subprocess.run(
        [sys.executable, "-P", EXAMPLES / "digits.py", *short], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    accuracy = re.search(r"test accuracy: ([\d.]+) %", done.stdout)
    assert accuracy
    assert 60 <= float(accuracy[1]) <= 100
    assert picture.read_bytes().startswith(PNG)


def test_digits_fails_below_the_required_accuracy(digits, tmp_path, capsys):
    out = str(tmp_path / "digits.png")
    options = ["--epochs", "1", "--depth", "2", "--mode", "standard", "--out", out]
    assert digits.main([*options, "--require", "100.1"]) == 1
    assert "below the required 100.10 %" in capsys.readouterr().out


def test_quantised_trains():
    """Two epochs are a start, yet far above the 10 % of guessing, on the lattice as beside it."""
    short = ["--epochs", "2", "--seeds", "1", "--precision", "5", "100"]
    done = subprocess.run(
        [sys.executable, "-P", EXAMPLES / "quantised.py", *short],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"(plain|precision \d+) .*?([\d.]+) %", done.stdout)
    assert [name for name, _ in rows] == ["plain", "precision 5", "precision 100"]
    assert all(60 <= float(accuracy) <= 100 for _, accuracy in rows)


@pytest.mark.parametrize(
    "options", [["--mode", "golden"], ["--depth", "1"], ["--epochs", "0"], ["--seed", "x"]]
)
def test_digits_refuses_bad_options(digits, options, capsys):
    with pytest.raises(SystemExit, match="2"):
        digits.main(options)
    assert options[0] in capsys.readouterr().err


def test_norms_grow_as_predicted(digits):
    """Over 16 blocks of the example's networks.

    A block's factor of the squared norm varies by about 0.1 from network to network (7 / width of
    it from the branch, 4 / width from the scalar product), so the mean of 8 networks over 16 blocks
    is off by 0.15, and the factor of the norm a block by 0.15 / 2 / 16: 0.5 %; four times that is
    allowed, while the three modes are 20 % apart.
    """
    norms = digits.norms_by_depth(depth=16)
    predicted = {"standard": 1.41421356, "phi": 1.17557050, "phi_symmetric": 0.87403205}
    assert {mode.value for mode in norms} == set(predicted)
    for mode, measured in norms.items():
        assert measured.shape == (8, 17)
        assert math.isclose(digits.GROWTH[mode], predicted[mode.value], rel_tol=1e-8)
        assert digits.growth(measured) == pytest.approx(predicted[mode.value], rel=0.02)
