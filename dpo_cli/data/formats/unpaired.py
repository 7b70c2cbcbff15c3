"""Single answers that are good or bad: thumbs up and down.

``{"prompt", "completion", "label"}``, where the label is a truth value, 1 or 0, or a word such as ``good`` or ``bad``,
``up`` or ``down``. Whether a label praises or blames is not to be seen in the data (``is_toxic: true``), so the user
names the format, and the column.
"""

from __future__ import annotations

import re
from typing import Any

from dpo_cli.data.formats.base import Format, Reading
from dpo_cli.data.formats.instructions import PROMPT_COMPLETION
from dpo_cli.data.formats.labels import label_text
from dpo_cli.data.formats.prompts import read_answer, read_prompt, with_reasoning
from dpo_cli.data.problem import RowProblem, kind_of
from dpo_cli.data.schema import PreferenceExample, RawRow

_LABELS = {
    **dict.fromkeys(
        "true 1 yes good up thumbs_up like liked upvote accepted chosen desirable positive \U0001f44d".split(), True
    ),
    **dict.fromkeys(
        "false 0 -1 no bad down thumbs_down dislike disliked downvote rejected undesirable negative \U0001f44e".split(),
        False,
    ),
}


def _is_good(value: Any) -> bool:
    if value is None or value == "":
        raise RowProblem("no_label", "has nothing in 'label'")
    if isinstance(value, list | dict):
        raise RowProblem("unknown_label", f"'label' must be one value, got {kind_of(value)}")
    label = re.sub(r"(?<=\w)[ -](?=\w)", "_", label_text(value).lower())
    if label not in _LABELS:
        raise RowProblem(
            "unknown_label", f"has the label {label[:40]!r}; it must be good or bad, true or false, 1 or 0"
        )
    return _LABELS[label]


def _read(row: RawRow, reading: Reading) -> PreferenceExample:
    is_good = _is_good(row.get("label"))
    prompt = read_prompt(row, reading)
    answer = with_reasoning(row, read_answer(row, "completion", prompt, reading))
    return PreferenceExample(prompt, answer, []) if is_good else PreferenceExample(prompt, [], answer)


UNPAIRED = Format(
    name="unpaired",
    fields="prompt, completion and label",
    names={**PROMPT_COMPLETION.names, "label": ()},
    needs=tuple((*needed, "label") for needed in PROMPT_COMPLETION.needs),
    read=_read,
    matches=PROMPT_COMPLETION.matches,
    note=PROMPT_COMPLETION.note,
    alternatives=PROMPT_COMPLETION.alternatives,
    unread=PROMPT_COMPLETION.unread,
    by_name=True,
)
