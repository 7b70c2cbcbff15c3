"""Single answers with a verdict, as KTO takes them: no pairs, and no instructions to follow either.

A verdict is a column of two values whose name or values call an answer good or bad: ``label``,
``is_safe``, ``thumbs``, ``"accepted"``. A truth value of another name (``is_english``) may be
anything: it is no verdict, and the account names it among the columns that nobody reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dpo_cli.data.formats.base import Reading
from dpo_cli.data.formats.prompts import CONVERSATION_NAMES, PROMPT_NAMES
from dpo_cli.data.schema import RawRow

ANSWER_NAMES = ("completion", "answer", "response", "output", "target", "reply", "generation")
"""What a single answer is called."""

_ASKED = frozenset(name for field, others in PROMPT_NAMES.items() for name in (field, *others))
_CONTENT = _ASKED | {*ANSWER_NAMES, *CONVERSATION_NAMES}
_TURN = ("role", "from", "speaker", "content", "value", "text")

_GRADES = frozenset("score scores scored rating rated reward rewards grade graded quality vote votes".split())
"""Names of verdicts that may as well be marks on a longer scale: of numbers, both must be there."""
_JUDGED = frozenset(
    """
    acceptable accept accepted accurate appropriate approve approved bad best biased bug chosen clean coherent complete
    compliant confirmed correct desirable discard dislike disliked downvote downvoted drop error errors exclude excluded
    factual fail failed fails faithful false feedback fine flagged good great grounded hallucinated hallucination harm
    harmful harmless helpful honest inaccurate inappropriate include included incorrect invalid irrelevant judgement
    judgment keep kto label labels like liked lost offensive ok okay pass passed passes polite poor positive prefer
    preferred refusal refused reject rejected relevant review reviewed right safe safety satisfied satisfactory selected
    solved success successful thumb thumbs toxic toxicity true truthful undesirable unhelpful unsafe upvote upvoted
    usable useful useless valid verdict verified violation win winner won wrong
    """.split()
)
"""Words in the name of a column that says whether an answer is good."""

_YES_OR_NO = frozenset(("true", "false", "yes", "no", "y", "n", "0", "1", "-1", "0.0", "1.0", "-1.0"))
_OPPOSITES = frozenset(("up", "down", "like", "dislike", "pass", "fail", "right", "wrong"))
"""Values that are verdicts under such a name only."""
_VERDICTS = frozenset(
    """
    good bad accepted rejected accept reject chosen preferred dispreferred desirable undesirable correct incorrect
    safe unsafe helpful unhelpful harmless harmful toxic acceptable unacceptable passed failed upvoted downvoted liked
    disliked approved thumbs_up thumbs_down thumbsup thumbsdown \U0001f44d \U0001f44e
    """.split()
)
"""Values that are verdicts under any name."""


def unpaired_label(rows: Sequence[RawRow]) -> str | None:
    """The column that calls each of these rows' answers good or bad, if there is one."""
    values: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in _columns_of(row):
            values.setdefault(name, []).append(value)
    return next((name for name, found in values.items() if _is_verdict(name, found)), None)


def _columns_of(row: RawRow) -> Iterator[tuple[str, Any]]:
    """What a row says beside prompt and answer, also within objects and in the last turn of a conversation."""
    for name, value in row.items():
        if name in CONVERSATION_NAMES and isinstance(value, list) and value and isinstance(value[-1], dict):
            yield from ((f"{name}.{key}", found) for key, found in value[-1].items() if key not in _TURN)
        elif name in _CONTENT or value is None or value == "":
            continue
        elif isinstance(value, dict):
            yield from ((f"{name}.{key}", found) for key, found in value.items() if found is not None)
        else:
            yield name, value


def _is_verdict(name: str, values: Sequence[Any]) -> bool:
    if not all(isinstance(value, bool | int | float | str) for value in values):
        return False
    said = {re.sub(r"(?<=\w)[ -](?=\w)", "_", str(value).strip().lower()) for value in values}
    if said <= _VERDICTS:
        return True
    words = set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))
    if words & _GRADES and not words & _JUDGED:
        is_plain = len(said) > 1 or said <= {"-1", "-1.0", "true", "false", *_OPPOSITES}
        return is_plain and said <= _YES_OR_NO | _OPPOSITES
    if "feedback" in words and said <= {"positive", "negative"}:  # under the name of label, these are classes of texts
        return True
    of_the_answer = words & set(ANSWER_NAMES) and all(isinstance(value, bool) for value in values)
    return bool(of_the_answer or (words & _JUDGED and said <= _YES_OR_NO | _OPPOSITES | _VERDICTS))


def unpaired_doubt(name: str) -> Callable[[Sequence[RawRow], Reading], str]:
    """Why such answers are no instructions, for the format of this name."""

    def doubt(rows: Sequence[RawRow], reading: Reading) -> str:
        label = unpaired_label(rows)
        if label is None:
            return ""
        return (
            f"{label} calls single answers good or bad (unpaired, as KTO takes them): they make no pairs, and the bad"
            f" ones no instructions; keep the good ones in a file of their own, or say format: {name} to take all of"
            " them"
        )

    return doubt
