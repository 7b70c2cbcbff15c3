"""What a language model that judges is asked: the paper's questions, one for Chinese, or the user's own.

The questions are those of the paper's appendix C.2 (Rafailov et al. 2023), simple (S) and concise (C) for summaries and
one for dialogue. Where the paper lets the judge explain itself first, ours answers with one token, which is read by
its log-probability. The candidates are called A and B and nothing else: no name gives a method away.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dpo_cli.core.artifacts import digest_bytes
from dpo_cli.core.errors import ParamsError
from dpo_cli.data.schema import Messages, text_of
from dpo_cli.judging.judge import OPTIONS, TIE_OPTION, Question

_SUMMARY = """\
Which of the following summaries does a better job of summarizing the most important points in the given forum post\
{criterion}

Post:
{{prompt}}

Summary A:
{{a}}

Summary B:
{{b}}

State only "A" or "B" to indicate your choice."""

TEMPLATES = {
    "summary": _SUMMARY.format(criterion="?"),
    "summary-concise": _SUMMARY.format(
        criterion=", without including unimportant or irrelevant details? A good summary is both precise and concise."
    ),
    "dialogue": """\
For the following query to a chatbot, which response is more helpful?

Query: {prompt}

Response A:
{a}

Response B:
{b}

State only "A" or "B" to indicate which response is more helpful.""",
    "dialogue-zh": """\
对于下面这条发给聊天机器人的消息，哪一个回复更有帮助？

消息：{prompt}

回复 A：
{a}

回复 B：
{b}

请只回答 "A" 或 "B"，表示哪一个回复更有帮助。""",
}
"""Templates by name: the paper's S, C and dialogue, and the last one in Chinese."""

_PLACEHOLDER = re.compile(r"\{([A-Za-z_]+)\}")
_NEEDED = ("prompt", "a", "b")
_TIE = "tie"


@dataclass(frozen=True)
class Template:
    """A question to a language model, with places for the prompt and both answers.

    Attributes:
        name: Its name, or that of its file.
        text: With ``{prompt}``, ``{a}`` and ``{b}`` once each, and with ``{tie}``, which becomes
            :data:`~dpo_cli.judging.judge.TIE_OPTION`, where a tie may be answered.
    """

    name: str
    text: str

    @property
    def options(self) -> tuple[str, ...]:
        """What may be answered: A, B and, where the text offers it, the name of a tie."""
        ties = (TIE_OPTION,) if _TIE in _PLACEHOLDER.findall(self.text) else ()
        return (*OPTIONS, *ties)

    @property
    def digest(self) -> str:
        """What tells it from other texts."""
        return digest_bytes(self.text.encode())

    def render(self, question: Question) -> str:
        """The text of a question; braces in the prompt and the answers stay as they are."""
        values: Mapping[str, str] = {
            "prompt": question.prompt,
            "a": question.a,
            "b": question.b,
            _TIE: TIE_OPTION,
        }
        return _PLACEHOLDER.sub(lambda found: values[found[1]], self.text)


def open_template(name: str, source: str) -> Template:
    """A template by its name in :data:`TEMPLATES`, or from a file of UTF-8 text.

    Args:
        name: The name, or the path of the file.
        source: The setting that says so, for messages.

    Raises:
        ParamsError: There is none, or it lacks a place, has one twice or one that is not known.
    """
    if name in TEMPLATES:
        return Template(name, TEMPLATES[name])
    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ParamsError(
            f"{source} must be one of {', '.join(TEMPLATES)}, or a file with {{prompt}}, {{a}} and {{b}}, got {name!r}"
            f" ({error.strerror})"
        ) from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    if problems := _problems(text):
        raise ParamsError([f"{path}: {problem}" for problem in problems])
    return Template(path.name, text.strip())


def _problems(text: str) -> list[str]:
    places = _PLACEHOLDER.findall(text)
    found = []
    for name in _NEEDED:
        if places.count(name) != 1:
            found.append(f"{{{name}}} must stand in it once, got {places.count(name)} times")
    known = (*_NEEDED, _TIE)
    for name in dict.fromkeys(places):
        if name not in known:
            close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
            hint = (
                f"did you mean {{{close[0]}}}?" if close else f"there are {', '.join(f'{{{each}}}' for each in known)}"
            )
            found.append(f"{{{name}}} is not a place for anything; {hint}")
    around = _PLACEHOLDER.sub(" ", text)
    found += [
        f"it must call the candidates A and B, since the answer is one of these letters; {option} is not in it"
        for option in OPTIONS
        if not re.search(rf"(?<![A-Za-z]){option}(?![A-Za-z])", around)
    ]
    return found


_ROLES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


def transcript(prompt: Messages) -> str:
    """A prompt as a judge reads it: a single user message as it is, else every message with its role."""
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n\n".join(f"{_ROLES[message['role']]}: {text_of([message])}" for message in prompt)
