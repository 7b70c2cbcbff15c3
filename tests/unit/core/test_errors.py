"""Exit codes and the collection of problems."""

from __future__ import annotations

import pytest

from dpo_cli.core import errors


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.DpoCliError, 1),
        (errors.ParamsError, 3),
        (errors.DataError, 4),
        (errors.StaleArtifactError, 5),
        (errors.MachineError, 6),
        (errors.Interrupted, 130),
    ],
)
def test_each_kind_of_error_has_its_exit_code(kind: type[errors.DpoCliError], code: int) -> None:
    assert kind.exit_code == code
    assert issubclass(kind, errors.DpoCliError)


def test_no_exit_code_is_that_of_a_usage_error_or_taken_twice() -> None:
    codes = [kind.exit_code for kind in errors.DpoCliError.__subclasses__()]
    assert len(set(codes)) == len(codes)
    assert not {0, 1, 2} & set(codes)


def test_one_message_is_one_problem() -> None:
    assert errors.DataError("a file is missing").problems == ["a file is missing"]


def test_several_problems_stand_on_lines_of_their_own() -> None:
    error = errors.ParamsError(["first", "second"])
    assert error.problems == ["first", "second"]
    assert str(error) == "first\nsecond"
