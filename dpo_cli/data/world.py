"""The embedded small world: bilingual instructions and preferences with a known reward.

Four kinds of task in English and Chinese: adding one to every number of a sentence,
answering a message kindly, praising one aspect of a film, and greeting two people. Every
prompt has exactly one *good* answer and a few *bad* ones (a number missed, a rude reply, a
bad review), all written by one fixed grammar (world.toml). So the reward of an
answer is a known function of its text: 1 if it is the good answer, else 0. A win rate needs
no judge.

All rows are a pure function of a seed: no clock, no torch.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

GOOD_SHARE = 0.25
"""Share g of good answers in the instruction data.

A model that samples like this data is right with probability about g, so DPO can win at most
about 1 - g/2 of the comparisons with it, ties counting one half: 0.875.
"""

NUM_INSTRUCTIONS = 1600
NUM_PREFERENCES = 3600


@dataclass(frozen=True)
class Task:
    """One prompt of the world with its good answer and its bad ones.

    Attributes:
        kind: Name of the task with its language, such as ``add_one.zh``.
        instruction: What is asked.
        input: The text that the instruction is about; empty where there is none.
        good: The one answer with reward 1.
        bad: Answers with reward 0.
    """

    kind: str
    instruction: str
    input: str
    good: str
    bad: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The user message: the instruction, then the input on a line of its own."""
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction

    def reward(self, answer: str) -> float:
        """1 for the good answer, 0 for any other text."""
        return float(answer == self.good)

    def is_well_formed(self, answer: str) -> bool:
        """Whether the text is one of the answers that this prompt can have, right or wrong, whatever its numbers."""
        forms = {_NUMBER.sub("0", known) for known in (self.good, *self.bad)}
        return _NUMBER.sub("0", answer) in forms


@dataclass(frozen=True)
class _Family:
    """Tasks of one shape: templates with slots. Without ``good`` the answers are computed (add one)."""

    kind: str
    instructions: tuple[str, ...]
    input: str
    good: str = ""
    bad: tuple[str, ...] = ()


# --- vocabulary and grammar ---------------------------------------------------------------

_NUMBER_SLOTS = ("n", "m")
_SLOT = re.compile(r"\{(\w+)\}")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Grammar:
    """What tasks are made of.

    Attributes:
        slots: Words by language and slot.
        families: Tasks of one kind together.
        weights: How often each kind is drawn.
        numbers: The least and the largest.
    """

    slots: Mapping[str, Mapping[str, Sequence[str]]]
    families: Sequence[Sequence[_Family]]
    weights: Sequence[int]
    numbers: tuple[int, int] = (2, 30)

    @classmethod
    def of(cls, words: Mapping[str, Mapping[str, str]], groups: Sequence[Mapping[str, Any]]) -> Grammar:
        """A grammar as world.toml writes it: words by language and slot, and groups of tasks."""
        slots = {lang: {name: text.split() for name, text in slots.items()} for lang, slots in words.items()}
        return cls(slots, [_families(group) for group in groups], [group["weight"] for group in groups])


def _families(group: Mapping[str, Any]) -> list[_Family]:
    answers = group.get("good") or dict.fromkeys(group["inputs"], "")
    kind, instructions, bad = group["kind"], group["instructions"], tuple(group.get("bad", ()))
    return [_Family(kind, tuple(instructions), text, good, bad) for text, good in answers.items()]


WORLD: Mapping[str, Any] = tomllib.loads((Path(__file__).parent / "world.toml").read_text(encoding="utf-8"))
"""The words and groups of world.toml."""
GRAMMAR = Grammar.of(**WORLD)


# --- tasks --------------------------------------------------------------------------------


def draw_task(rng: random.Random, grammar: Grammar = GRAMMAR) -> Task:
    """Draw one task; the same state of ``rng`` gives the same task."""
    family = rng.choice(rng.choices(grammar.families, weights=grammar.weights)[0])
    instruction = rng.choice(family.instructions)
    vocabulary = grammar.slots[family.kind.rpartition(".")[2]]
    slots = {
        name: str(rng.randint(*grammar.numbers)) if name in _NUMBER_SLOTS else rng.choice(vocabulary[name])
        for name in sorted(set(_SLOT.findall(instruction + family.input)))
    }
    return _fill(family, instruction, slots)


def task_of(prompt: str) -> Task | None:
    """The task behind a user message, or None where it is not of this world."""
    for family, instruction, pattern in _patterns():
        if match := pattern.fullmatch(prompt):
            return _fill(family, instruction, match.groupdict())
    return None


def _fill(family: _Family, instruction: str, slots: dict[str, str]) -> Task:
    text = family.input.format(**slots)
    asked = instruction.format(**slots)
    if family.good:
        bad = tuple(answer.format(**slots) for answer in family.bad)
        return Task(family.kind, asked, text, family.good.format(**slots), bad)
    if len(_NUMBER.findall(text)) == 1:
        return Task(family.kind, asked, text, _shift(text, 1), (text,))
    bad = (text, _shift(text, 0, 1), _shift(text, 1, 0))
    return Task(family.kind, asked, text, _shift(text, 1, 1), bad)


def _shift(sentence: str, *deltas: int) -> str:
    """Add to each number of the sentence its delta."""
    remaining = iter(deltas)
    return _NUMBER.sub(lambda match: str(int(match.group()) + next(remaining)), sentence)


@cache
def _patterns() -> tuple[tuple[_Family, str, re.Pattern[str]], ...]:
    return tuple(
        (family, instruction, _compile(family, f"{instruction}\n{family.input}" if family.input else instruction))
        for group in GRAMMAR.families
        for family in group
        for instruction in family.instructions
    )


def _compile(family: _Family, template: str) -> re.Pattern[str]:
    vocabulary = GRAMMAR.slots[family.kind.rpartition(".")[2]]
    pieces = _SLOT.split(template)  # text, slot, text, slot, ..., text
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            pieces[index] = re.escape(piece)
        elif piece in _NUMBER_SLOTS:
            pieces[index] = rf"(?P<{piece}>\d+)"
        else:
            pieces[index] = f"(?P<{piece}>{'|'.join(map(re.escape, vocabulary[piece]))})"
    return re.compile("".join(pieces))


# --- texts --------------------------------------------------------------------------------


def words() -> list[str]:
    """Every word of the world, as the tokenizer of the embedded model should know it.

    English words come bare and with a space before them; Chinese words and phrases come
    whole, punctuation apart, and so do all numbers of two digits.
    """
    templates = [
        text
        for group in GRAMMAR.families
        for family in group
        for text in (*family.instructions, family.input, family.good, *family.bad)
    ]
    texts = [piece for template in templates for piece in _SLOT.split(template)[::2]]
    texts += [word for slots in GRAMMAR.slots.values() for values in slots.values() for word in values]
    found: dict[str, None] = {}
    for text in texts:
        for word in re.findall(r"[A-Za-z]+|[\u4e00-\u9fff]+|[^\w\s]", text):
            found[word] = None
            if word.isascii() and word.isalpha():
                found[f" {word}"] = None
    return [*found, *(str(number) for number in range(10, 100))]


def draw_tasks(seed: int) -> Iterator[Task]:
    """An endless stream of tasks with different prompts."""
    rng = random.Random(f"tasks {seed}")
    seen: set[str] = set()
    while True:
        task = draw_task(rng)
        if task.prompt not in seen:
            seen.add(task.prompt)
            yield task


def instruction_rows(seed: int, num_rows: int = NUM_INSTRUCTIONS) -> list[dict[str, str]]:
    """Instruction data of mixed quality: a share GOOD_SHARE of good answers, the rest bad.

    A few rows are dirty on purpose (repeated, without an answer), as real files are.
    """
    rng = random.Random(f"instructions {seed}")
    rows = []
    for task in islice(draw_tasks(2 * seed), num_rows):
        answer = task.good if rng.random() < GOOD_SHARE else rng.choice(task.bad)
        rows.append({"instruction": task.instruction, "input": task.input, "output": answer})
    for index in range(100, num_rows, 400):
        rows[index] = {**rows[index], "output": ""}
        rows[index + 1] = dict(rows[index - 1])
    return rows


def preference_rows(seed: int, num_rows: int = NUM_PREFERENCES) -> list[dict[str, str]]:
    """Preference data: the good answer chosen over a bad one.

    A few rows are dirty on purpose (repeated, an empty side, equal sides), as real files are.
    """
    rng = random.Random(f"preferences {seed}")
    rows = [
        {"prompt": task.prompt, "chosen": task.good, "rejected": rng.choice(task.bad)}
        for task in islice(draw_tasks(2 * seed + 1), num_rows)
    ]
    for index in range(100, num_rows - 2, 400):
        rows[index] = {**rows[index], "rejected": rows[index]["chosen"]}
        rows[index + 1] = {**rows[index + 1], "rejected": ""}
        rows[index + 2] = dict(rows[index - 1])
    return rows
