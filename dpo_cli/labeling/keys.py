"""The keys by which people vote, of the page and of the terminal alike."""

from __future__ import annotations

from typing import NamedTuple

from dpo_cli.data.votes import BOTH_BAD, DOWN, SKIPPED, TIED, UP, A, B
from dpo_cli.labeling.items import Mode


class Key(NamedTuple):
    """What a key does: it votes, or does something else that page and terminal know by name.

    Attributes:
        key: As it is shown.
        name: Of its button.
        about: For the help.
        vote: Which vote it gives.
        act: What else it does.
        is_main: Whether most votes are given by it.
    """

    key: str
    name: str
    about: str
    vote: str | None = None
    act: str | None = None
    is_main: bool = False


_COMMON = (
    Key("S", "Skip", "skip: you cannot say", SKIPPED),
    Key("U", "Undo", "take back your last vote", act="undo"),
)
KEYS: dict[Mode, tuple[Key, ...]] = {
    "pair": (
        Key("F", "A is better", "A, the first answer, is better", A, is_main=True),
        Key("J", "B is better", "B, the second answer, is better", B, is_main=True),
        Key("T", "Tie", "both are equally good", TIED),
        Key("B", "Both bad", "neither is acceptable", BOTH_BAD),
        *_COMMON,
    ),
    "ranking": (
        Key("Enter", "Save", "save the ranking, when every answer has its rank", act="save", is_main=True),
        Key("T", "Tie", "the next one has the same rank as the last", act="tie"),
        Key("R", "Start over", "take all ranks away", act="clear"),
        *_COMMON,
    ),
    "thumbs": (
        Key("F", "Bad", "thumbs down", DOWN, is_main=True),
        Key("J", "Good", "thumbs up", UP, is_main=True),
        *_COMMON,
    ),
}
STRENGTHS = ("a little better", "better", "much better")
"""What 1 to 3 say before a vote on a pair."""

_DIGITS: dict[Mode, tuple[tuple[str, str], ...]] = {
    "pair": (("1 2 3", f"before F or J: by how much ({', '.join(STRENGTHS)})"),),
    "ranking": (("1 ... 9", "the best answer first, then the next one; once more takes its rank away"),),
    "thumbs": (),
}
NOT_RANKED = "Give every answer a rank first: press the numbers of the answers, the best one first."
NOTE = (
    "Every vote is saved at once. You can stop at any time and go on later. Who wrote an answer is not shown, and the"
    " order of the answers is drawn by chance. Some questions come again."
)


def help_of(mode: Mode) -> list[tuple[str, str]]:
    """Keys and what they do, as the help shows them."""
    main, rest = ([(each.key, each.about) for each in KEYS[mode] if each.is_main is wanted] for wanted in (True, False))
    return [*main, *_DIGITS[mode], *rest, ("?", "this help")]
