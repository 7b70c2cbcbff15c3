"""Exit codes and the collection of problems."""

from __future__ import annotations

from dpo_cli.core import errors


def test_each_kind_of_error_has_its_exit_code() -> None:
    codes = {kind.__name__: kind.exit_code for kind in errors.DpoCliError.__subclasses__()}
    assert codes == {
        "ParamsError": 3,
        "DataError": 4,
        "StaleArtifactError": 5,
        "MachineError": 6,
        "Interrupted": 130,
    }


def test_problems_stand_on_lines_of_their_own() -> None:
    assert errors.DataError("a file is missing").problems == ["a file is missing"]
    error = errors.ParamsError(["first", "second"])
    assert error.problems == ["first", "second"]
    assert str(error) == "first\nsecond"
