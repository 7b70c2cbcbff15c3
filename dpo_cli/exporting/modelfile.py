"""The Modelfile of Ollama: the tokenizer's own chat template as a template of Go, and what ends an answer.

A chat template is taken apart by what it writes around messages; one that is no chain of turns is refused. What was
written is read back and rendered by a small interpreter of the part of Go's text/template that is used, so that a
Modelfile of another hand, or another model's, is held against the tokenizer as well.
The format: https://github.com/ollama/ollama/blob/main/docs/modelfile.md and docs/template.md there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_cli.core.errors import MachineError
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import Messages, assistant, is_plain, user

_USER, _ANSWER, _AGAIN, _SYSTEM = "first question 7", "some answer 8", "second question 9", "some rules 6"
_QUOTES = '"""'


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around messages.

    Attributes:
        opening: Before everything where no system message is given.
        system: Around a system message; None where the template takes none.
        user: Around a user's message.
        assistant: Around an answer that is followed by more.
        end: What an answer is to follow.
    """

    opening: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    end: str

    @property
    def text(self) -> str:
        """All that is written around messages."""
        return "".join((self.opening, *(self.system or ()), *self.user, *self.assistant, self.end))

    def go(self) -> str:
        """As a template of Go."""
        roles = [("user", self.user), ("assistant", self.assistant)]
        cases = "{{ else ".join(
            f'{"{{ " if not place else ""}if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for place, (role, (before, after)) in enumerate(roles)
        )
        start = self.opening
        if self.system is not None:
            before, after = self.system
            otherwise = f"{{{{ else }}}}{self.opening}" if self.opening else ""
            start = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{otherwise}{{{{ end }}}}"
        return f"{start}{{{{ range .Messages }}}}{cases}{{{{ end }}}}{{{{ end }}}}{self.end}"


def turns_of(encoder: ChatEncoder, begins_with: str) -> Turns:
    """Take a chat template apart.

    Args:
        encoder: Has the template.
        begins_with: The token that whoever serves the model puts before every text; it is left out.

    Raises:
        MachineError: It is no chain of turns.
    """
    one, other, answer = user(_USER), user(_AGAIN), assistant(_ANSWER)
    rules: Messages = [{"role": "system", "content": _SYSTEM}]

    def asked(messages: Messages) -> str:
        return encoder.render(messages, add_generation_prompt=True) + encoder.opener

    def fits(turns: Turns, conversations: Sequence[Messages]) -> bool:
        return all(begins_with + render(turns.go(), each) == asked(each) for each in conversations)

    plain = [[one], [one, answer, other], [other, answer, one, answer, other]]
    try:
        alone, again = encoder.render([one]), encoder.render([one, answer, other])
        head, user_end = alone.split(_USER)
        before, middle = again.split(_ANSWER)
        answer_end = encoder.render([one, answer]).split(_ANSWER)[1]
        user_start = middle.split(_AGAIN)[0].removeprefix(answer_end)
        answer_start = before.split(_USER)[1].removeprefix(user_end)
        opening = head.removesuffix(user_start).removeprefix(begins_with)
        end = asked([one]).removeprefix(alone)
        turns = Turns(opening, None, (user_start, user_end), (answer_start, answer_end), end)
        if not alone.startswith(begins_with) or "{{" in turns.text or _QUOTES in turns.text or not fits(turns, plain):
            raise ValueError(turns)
    except (RowProblem, ValueError, IndexError):
        raise MachineError(
            "no Modelfile was written: the chat template is no chain of turns, each with a fixed text around it"
        ) from None
    try:
        before, behind = encoder.render([*rules, one]).split(_SYSTEM)
        system = before.removeprefix(begins_with), behind.split(_USER)[0].removesuffix(user_start)
        if fits(with_system := replace(turns, system=system), [rules + each for each in plain]):
            return with_system
    except (RowProblem, ValueError):
        pass
    return turns


def modelfile(file: str, turns: Turns, stops: Sequence[str], lines: Sequence[str] = ()) -> str:
    """The text of a Modelfile for a GGUF file beside it, with comments before it."""
    head = [*(f"# {line}" for line in lines), f"FROM ./{file}"]
    ends = [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join([*head, f"TEMPLATE {_QUOTES}{turns.go()}{_QUOTES}", *ends, ""])


def problems_of_modelfile(text: str, encoder: ChatEncoder, prompts: Sequence[Messages], begins_with: str) -> list[str]:
    """What is wrong with a Modelfile, one sentence each.

    Args:
        text: Its text.
        encoder: The chat encoder that the model was trained with.
        prompts: On which the ids must be equal; those with tools, or with white space at an end, are left out.
        begins_with: What is put before every text.
    """
    found = []
    template = re.search(rf"^TEMPLATE {_QUOTES}(.*?){_QUOTES}", text, re.DOTALL | re.MULTILINE)
    if not re.search(r"^FROM \S", text, re.MULTILINE):
        found.append("the Modelfile has no line FROM")
    if template is None:
        found.append("the Modelfile has no TEMPLATE")
    else:
        for prompt in filter(is_plain, prompts):
            if any(message["content"] != message["content"].strip() for message in prompt):
                continue  # some templates strip it
            try:
                ids = encoder.tokenize(begins_with + render(template[1], prompt))
            except (ValueError, RowProblem) as error:
                found.append(f"the Modelfile's TEMPLATE cannot be rendered: {error}")
                break
            if ids != encoder.encode_prompt(prompt):
                found.append(
                    "the Modelfile's TEMPLATE is another than the tokenizer's: it makes other tokens of the prompt"
                    f" {prompt[-1]['content'][:60]!r}"
                )
                break
    stops = set(re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE))
    for stop in encoder.end_texts:
        if stop not in stops:
            found.append(f"the end token is lost: the Modelfile has no PARAMETER stop {stop!r}; answers would not end")
    return found


# --- Go's text/template, as far as it is used ---------------------------------------------

_ACTION = re.compile(r"\{\{(-?)\s*(.*?)\s*(-?)\}\}", re.DOTALL)


def render(template: str, messages: Messages) -> str:
    """What Ollama makes of messages: texts, fields, ``if``, ``else if``, ``else``, ``eq``, ``range`` and ``end``.

    Raises:
        ValueError: There is something else in it.
    """
    parts: list[tuple[str, str]] = []
    place, trims = 0, False
    for match in _ACTION.finditer(template):
        text = template[place : match.start()]
        text = text.lstrip() if trims else text
        parts += [("text", text.rstrip() if match[1] else text), ("action", match[2])]
        place, trims = match.end(), bool(match[3])
    parts.append(("text", template[place:].lstrip() if trims else template[place:]))
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    scope = {"System": system, "Messages": list(messages)}
    queue = list(reversed(parts))
    rendered, stop = _block(queue, scope, scope, active=True)
    if stop is not None:
        raise ValueError(f"{{{{ {stop} }}}} stands alone")
    return rendered


def _block(
    queue: list[tuple[str, str]], dot: Mapping[str, Any], root: Mapping[str, Any], *, active: bool
) -> tuple[str, str | None]:
    """Render up to the action that ends a block; that action is given back, too."""
    found: list[str] = []
    while queue:
        kind, content = queue.pop()
        word, _, rest = content.partition(" ")
        if kind == "text":
            found.append(content)
        elif word in ("end", "else"):
            return "".join(found) if active else "", content
        elif word == "if":
            found.append(_choice(queue, rest, dot, root, active=active))
        elif word == "range":
            inner = list(queue)
            items: list[Any] = _value(rest, dot, root) if active else []
            text, stop = _block(queue, {}, root, active=False)
            for item in items:
                again = list(inner)
                text, stop = _block(again, item, root, active=True)
                found.append(text)
            if stop != "end":
                raise ValueError("{{ range }} has no {{ end }}")
        else:
            found.append(str(_value(content, dot, root)) if active else "")
    return "".join(found) if active else "", None


def _choice(
    queue: list[tuple[str, str]], condition: str, dot: Mapping[str, Any], root: Mapping[str, Any], *, active: bool
) -> str:
    """Render an if with all that belongs to it."""
    found, open_ = "", active
    stop: str | None = f"else if {condition}"
    while stop is not None and stop.startswith("else"):
        condition = stop.removeprefix("else").strip().removeprefix("if").strip()
        holds = open_ and (not condition or _holds(condition, dot, root))
        text, stop = _block(queue, dot, root, active=holds)
        found += text
        open_ = open_ and not holds
    if stop != "end":
        raise ValueError("{{ if }} has no {{ end }}")
    return found


def _holds(condition: str, dot: Mapping[str, Any], root: Mapping[str, Any]) -> bool:
    if match := re.fullmatch(r'eq (\S+) "(.*)"', condition):
        return _value(match[1], dot, root) == match[2]
    return bool(_value(condition, dot, root))


def _value(expression: str, dot: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    match = re.fullmatch(r"(\$?)\.(System|Messages|Role|Content)", expression)
    if match is None:
        raise ValueError(f"{{{{ {expression} }}}} is not understood")
    values = root if match[1] else {"Role": dot.get("role"), "Content": dot.get("content"), **dot}
    if values.get(match[2]) is None:
        raise ValueError(f"{{{{ {expression} }}}} has no value here")
    return values[match[2]]
