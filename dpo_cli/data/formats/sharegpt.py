"""ShareGPT pairs: ``{"conversations": [turns], "chosen": turn, "rejected": turn}``.

A turn is ``{"from", "value"}`` or ``{"role", "content"}``; the conversation may begin with a
system turn and ends with the user's.
"""

from __future__ import annotations

from dpo_cli.data.formats.alpaca import read_context
from dpo_cli.data.formats.base import Format, RowProblem, check_answer, check_prompt, has_all, read_messages
from dpo_cli.data.schema import PreferenceExample, RawRow


def _read(row: RawRow) -> PreferenceExample:
    for name in ("conversations", "chosen", "rejected"):
        if name not in row:
            raise RowProblem("missing_field", f"has no {name!r}")
    return PreferenceExample(
        prompt=[*read_context(row), *check_prompt(read_messages(row["conversations"], "conversations"))],
        chosen=check_answer(read_messages(row["chosen"], "chosen"), "chosen"),
        rejected=check_answer(read_messages(row["rejected"], "rejected"), "rejected"),
    )


SHAREGPT = Format(
    name="sharegpt",
    fields="conversations, chosen and rejected",
    matches=lambda row: has_all(row, ("conversations", "chosen", "rejected")),
    read=_read,
)
