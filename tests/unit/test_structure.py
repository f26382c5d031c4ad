"""The check of the code's structure sees what it is there for, in small packages made for it."""

import pytest

from tests import structure


@pytest.fixture
def package(tmp_path):
    """A function that writes modules, a name → text each, into a package and returns the checkout and the package's name."""

    def write(name, **modules):
        folder = tmp_path / name
        folder.mkdir()
        for module, text in {"__init__": "", **modules}.items():
            (folder / f"{module}.py").write_text(text)
        return tmp_path, (name,)

    return write


@pytest.mark.parametrize(
    "how",
    [
        "import circling_{0}.one\n",
        "def later():\n    from circling_{0} import one\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from circling_{0}.one import x\n",
    ],
    ids=["plainly", "within a function", "for the type checker"],
)
def test_a_circle(package, how, request):
    number = next(iter(request.node.callspec.indices.values()))
    name = f"circling_{number}"
    checkout = package(
        name,
        one=f"from {name} import two\n",
        two=f"from {name} import three\n",
        three=how.format(number),
        four=f"import {name}.one\n",
    )
    assert structure.circles(*checkout) == [[f"{name}.one", f"{name}.three", f"{name}.two"]]


def test_no_circle(package):
    checkout = package("straight", one="from straight import two, three\n", two="from straight import three\n", three="")
    assert structure.circles(*checkout) == []


def test_two_circles_in_one_package(package):
    checkout = package("twice", **{a: f"import twice.{b}\n" for a, b in ("ab", "bc", "ca", "de", "ed")})
    assert structure.circles(*checkout) == [["twice.a", "twice.b", "twice.c"], ["twice.d", "twice.e"]]


def test_too_large(package):
    many = "class Many:\n" + "    def f(self): ...\n" * 26
    long = "class Long:\n" + "    x = 1\n" * 400
    checkout = package("large", many=many, long=long, fits="x = 1\n" * 400)
    assert list(structure.sizes(*checkout)) == [
        "large/long.py has 401 lines; a file may have 400",
        "large/long.py: class Long has 0 methods in 401 lines; it may have 25 and 400",
        "large/many.py: class Many has 26 methods in 27 lines; it may have 25 and 400",
    ]
