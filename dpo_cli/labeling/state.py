"""What a rater is told, on the page and in the terminal: his question, and how far he is.

No model, file or other rater is named in it: a prompt, and answers in the order in which they are shown.
"""

from __future__ import annotations

from typing import Any

from dpo_cli.core.text import visible
from dpo_cli.data.schema import Messages, text_of
from dpo_cli.labeling.engine import Engine


def state_of(engine: Engine, rater: str) -> dict[str, Any]:
    """The rater's question (``question``; None: nothing is left), its number, and his progress, as JSON."""
    asked = engine.ask(rater)
    question = None
    if asked is not None:
        item = engine.items[asked.index]
        question = {
            "prompt": [{"role": message["role"], "text": _shown([message])} for message in item.prompt],
            "answers": [_shown(item.completions[place]) for place in asked.order],
        }
    progress = engine.progress(rater)
    return {
        "mode": engine.settings.mode,
        "number": engine.next_number(rater),
        "question": question,
        "progress": {
            "done": progress.done,
            "left": progress.left,
            "figures": progress.figures(),
            "hint": progress.hint(),
        },
    }


def _shown(messages: Messages) -> str:
    """A text of which nothing is hidden: control characters as signs, and those that turn its direction."""
    return visible(text_of(messages).replace("\r\n", "\n"))
