"""Train or held out: decided by the prompt's content alone.

The same prompt falls on the same side in every file, so no held-out prompt can be in any
training data, and adding rows moves none across.
"""

from __future__ import annotations

from dpo_cli.data.schema import TOOLS, Messages, content_id


def opening_of(prompt: Messages) -> Messages:
    """All up to the first user turn, whatever tools there are: the prompt itself, where nothing is left out of it."""
    if prompt and TOOLS in prompt[0]:
        prompt = [{name: text for name, text in prompt[0].items() if name != TOOLS}, *prompt[1:]]
    if len(prompt) == 1:
        return prompt
    first = next((index for index, message in enumerate(prompt) if message["role"] == "user"), len(prompt) - 1)
    return prompt if first == len(prompt) - 1 else prompt[: first + 1]


def deciding_part(prompt: Messages, split_by: str) -> Messages:
    """What of a prompt decides its split: its ``opening``, or the whole ``prompt``."""
    return prompt if split_by == "prompt" else opening_of(prompt)


def position_of(digest: str) -> float:
    """A number in [0, 1) by the first 64 bits of a content id."""
    return int(digest[:16], 16) / 2.0**64


def split_position(prompt: Messages) -> float:
    """A number in [0, 1) that is uniform over openings and fixed for each.

    The opening is all up to the first user turn, so a longer conversation falls where the
    shorter one falls that it goes on from.
    """
    return position_of(content_id(opening_of(prompt)))


def is_held_out(prompt: Messages, eval_fraction: float, split_by: str = "opening") -> bool:
    """Whether the prompt belongs to the eval split."""
    return position_of(content_id(deciding_part(prompt, split_by))) < eval_fraction
