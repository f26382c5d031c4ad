"""What failed in a suite runs once more at its end: small suites of their own, run by a pytest of their own."""

import pytest

from tests import suite

PASSES = (("-m", "not alone"), ("-m", "alone"))


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with two tests that pass, one in each pass. A function writes more; `ran` tells how often each of those ran."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a start takes a third of the time
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  alone: in the second pass\n")
    (tmp_path / "conftest.py").write_text(
        "import pathlib, pytest\n"
        "@pytest.fixture\n"
        "def turn(request):\n"
        "    file = pathlib.Path(__file__).parent / f'{request.node.name}.turns'\n"
        "    file.write_text((file.read_text() if file.exists() else '') + '.')\n"
        "    return len(file.read_text())\n"
    )
    (tmp_path / "test_passes.py").write_text("import pytest\ndef test_a(): ...\n@pytest.mark.alone\ndef test_b(): ...\n")
    return tmp_path


def ran(checkout):
    return {file.stem: len(file.read_text()) for file in checkout.glob("*.turns")}


def test_a_suite_that_passes(checkout, capfd):
    assert suite.run(PASSES, ["-q"], checkout) == suite.PASSED
    assert "once more" not in capfd.readouterr().out


@pytest.mark.parametrize("mark", ["", "@pytest.mark.alone\n"], ids=["first pass", "second pass"])
def test_a_test_that_fails_once_is_flaky(checkout, capfd, mark):
    (checkout / "test_more.py").write_text(
        f"import pytest\n{mark}def test_sometimes(turn): assert turn == 2\ndef test_well(turn): ...\n"
    )
    assert suite.run(PASSES, ["-q"], checkout) == suite.PASSED
    assert "FLAKY test_more.py::test_sometimes" in capfd.readouterr().out
    assert ran(checkout) == {"test_sometimes": 2, "test_well": 1}


def test_a_test_that_fails_twice_fails_the_suite(checkout, capfd):
    (checkout / "test_more.py").write_text("def test_never(turn): assert 0\ndef test_sometimes(turn): assert turn == 2\n")
    assert suite.run(PASSES, ["-q"], checkout) == suite.FAILED
    shown = capfd.readouterr().out
    assert "FLAKY test_more.py::test_sometimes" in shown
    assert "FLAKY test_more.py::test_never" not in shown
    assert ran(checkout) == {"test_never": 2, "test_sometimes": 2}


def test_a_failure_of_an_earlier_suite_is_not_run_again(checkout):
    (checkout / "test_more.py").write_text("def test_never(turn): assert 0\n")
    assert suite.run(PASSES, ["-q"], checkout) == suite.FAILED
    assert suite.run(PASSES, ["-q", "--deselect", "test_more.py::test_never"], checkout) == suite.PASSED
    assert ran(checkout) == {"test_never": 2}


def test_a_file_that_cannot_be_imported_ends_the_suite(checkout):
    (checkout / "test_more.py").write_text("import nothing_of_this_name\n")
    assert suite.run(PASSES, ["-q"], checkout) == pytest.ExitCode.INTERRUPTED


def test_options_that_choose_nothing(checkout):
    assert suite.run(PASSES, ["-q", "-k", "nothing_of_this_name"], checkout) == suite.NONE_CHOSEN


def test_a_skip_fails_in_ci_even_beside_a_flaky_test(checkout, monkeypatch):
    conftest = (checkout / "conftest.py").read_text()
    (checkout / "conftest.py").write_text(f"{conftest}from tests.conftest import pytest_sessionfinish\n")
    (checkout / "test_more.py").write_text(
        "import pytest\ndef test_skipped(): pytest.skip('no reason')\ndef test_sometimes(turn): assert turn == 2\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(suite.ROOT))
    monkeypatch.setenv("CI", "true")
    assert suite.run(PASSES, ["-q"], checkout) == 6
    monkeypatch.delenv("CI")
    (checkout / "test_sometimes.turns").unlink()
    assert suite.run(PASSES, ["-q"], checkout) == suite.PASSED
