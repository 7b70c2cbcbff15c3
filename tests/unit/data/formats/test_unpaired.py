"""Single answers that are good or bad: what a label means, and who learns from them."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_cli.data.formats import PREFERENCE_FORMATS, SFT_FORMATS
from dpo_cli.data.formats.base import Reading
from dpo_cli.data.formats.detect import RowReader
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import PreferenceExample, SftExample, assistant, user

Q, A = [user("q")], [assistant("a")]
GOOD, BAD = PreferenceExample(Q, A, []), PreferenceExample(Q, [], A)


def read(row: dict[str, Any], formats: Any = PREFERENCE_FORMATS, columns: Any = ()) -> Any:
    return RowReader(formats, "unpaired", dict(columns), Reading()).read(row)[1]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        *((label, GOOD) for label in (True, 1, 1.0, "1", "Good", "thumbs-up", "Thumbs up", "yes", "👍")),
        *((label, BAD) for label in (False, 0, -1, "-1", "bad", "thumbs_down", "Disliked", "no", "👎")),
    ],
)
def test_a_label_is_good_or_bad(label: Any, expected: PreferenceExample) -> None:
    assert read({"prompt": "q", "completion": "a", "label": label}) == expected
    messages = {"prompt": Q, "completion": A, "feedback": label}
    assert read(messages, columns={"label": "feedback"}) == expected


@pytest.mark.parametrize(
    ("label", "reason"), [(None, "no_label"), ("", "no_label"), (2, "unknown_label"), ("toxic", "unknown_label"),
                          ([True], "unknown_label")]
)  # fmt: skip
def test_another_label_is_refused(label: Any, reason: str) -> None:
    with pytest.raises(RowProblem) as caught:
        read({"prompt": "q", "completion": "a", "label": label})
    assert caught.value.reason == reason


def test_instructions_are_the_good_answers() -> None:
    assert read({"prompt": "q", "response": "a", "label": True}, SFT_FORMATS) == SftExample(Q, A)
    with pytest.raises(RowProblem, match="is a bad answer: it is not to be learned"):
        read({"prompt": "q", "response": "a", "label": False}, SFT_FORMATS)
