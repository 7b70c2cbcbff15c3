"""Single completions with a verdict, as KTO takes them: no pairs, and no instructions to follow either."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_cli.data.formats.base import Reading
from dpo_cli.data.schema import RawRow

_LABELS = ("label", "kto_tag")
_VERDICTS = ("true", "false", "0", "1", "0.0", "1.0")


def unpaired_label(rows: Sequence[RawRow]) -> str | None:
    """The field that calls each of these rows good or bad, if there is one."""
    for name in _LABELS:
        labels = [row[name] for row in rows if row.get(name) is not None]
        if labels and all(str(label).lower() in _VERDICTS for label in labels):
            return name
    return None


def unpaired_doubt(rows: Sequence[RawRow], reading: Reading) -> str:
    """Why such completions are no instructions."""
    name = unpaired_label(rows)
    if name is None:
        return ""
    return (
        f"{name} calls single completions good or bad (unpaired, as KTO takes them): they make no pairs, and the bad"
        " ones no instructions; keep the good ones in a file of their own, or name the format to take all of them"
    )
