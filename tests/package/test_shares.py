"""The shares of the variants of tests, of which .ci/run gives each version of jax one."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest

COUNTS = {"a.py::one": 0, "a.py::two": 1, "a.py::three": 2, "b.py::many": 40, "b.py::odd": 7}


class Item:
    def __init__(self, nodeid, once=False):
        self.nodeid, self.once = nodeid, once
        self.path = Path("tests", "ops", nodeid.split(":")[0])

    def get_closest_marker(self, name):
        return self.once if name == "once" else None


def items():
    yield from (Item(name) for name, count in COUNTS.items() if count == 0)
    yield from (Item(f"{name}[{i}]") for name, count in COUNTS.items() for i in range(count))
    yield from (Item(f"c.py::apart[{i}]", once=True) for i in range(2))


class Call(Item):
    """A variant that has the double serve the calls of an operation."""

    def __init__(self, operation, i):
        super().__init__(f"d.py::called[double-{operation}-{i}]")
        params = {"implementation": "double", "label": operation}
        self.callspec = SimpleNamespace(params=params)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_one_variant_of_calls_is_in_every_share(n):
    given = [Call(operation, i) for operation in "ab" for i in range(5)]
    shares = [[i.nodeid for i in conftest.of_share(given, f"{k + 1}/{n}")] for k in range(n)]
    for share in shares:
        assert ["-a-" in i for i in share] == [True, False]
    assert len({i for share in shares for i in share}) == 2 * n


@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_variant_is_in_one_share_and_every_test_in_all(n):
    given = list(items())
    shares = [[i.nodeid for i in conftest.of_share(given, f"{k + 1}/{n}")] for k in range(n)]
    for name, count in COUNTS.items():
        found = [[i for i in share if i.split("[")[0] == name] for share in shares]
        if count < n:
            assert all(len(f) == max(count, 1) for f in found)
        else:
            assert sorted(itertools.chain(*found)) == sorted(f"{name}[{i}]" for i in range(count))
            assert max(map(len, found)) - min(map(len, found)) <= 1
    assert [sum(i.startswith("c.py") for i in share) for share in shares] == [0] * (n - 1) + [2]
