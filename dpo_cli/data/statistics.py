"""What a set of examples is like: lengths, turns, languages. Counted as they stream by.

Of an example only its lengths stay, four bytes each. Languages and scripts are those of a sample,
the examples with the smallest content hash, so neither their order nor a seed decides.
"""

from __future__ import annotations

import heapq
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import Messages, PreferenceExample, RankingExample, SftExample, content_id, text_of
from dpo_cli.statistics.intervals import wilson_interval

SCRIPTS = ("Latin", "Han", "Kana", "Hangul", "Cyrillic", "Arabic", "Devanagari", "other")
"""The scripts that are told apart."""

SAMPLE_SIZE = 2000
"""Examples whose languages and scripts are looked at."""

NO_LETTERS = "none"
"""The language of a text without letters."""

TOO_SHORT = "too_short"
"""The language of a text that is too short, or too much of several languages, to tell it."""

_SAMPLED_CHARACTERS = 1000


class Distribution:
    """Lengths: how many there are, and how they are spread. Each takes four bytes."""

    def __init__(self) -> None:
        self._values = array("i")

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: int) -> None:
        """Count a value, which is a whole number from 0."""
        self._values.append(value)

    def quantile(self, percent: int) -> int:
        """The smallest value that so many percent of the values do not exceed; 0 where there are none."""
        return int(np.quantile(self._values, percent / 100, method="inverted_cdf")) if self._values else 0

    def histogram(self) -> list[tuple[int, int, int]]:
        """Bins as (smallest value, largest value, count), each twice as wide as the one before it."""
        if not self._values:
            return []
        _, widths = np.frexp(np.array(self._values))  # in bits
        counts = np.bincount(widths).tolist()
        return [(1 << bits >> 1, (1 << bits) - 1, counts[bits]) for bits in range(widths.min(), len(counts))]

    def summary(self) -> dict[str, Any]:
        """Mean, quantiles, maximum and histogram."""
        return {
            "count": len(self),
            "mean": sum(self._values) / len(self) if self._values else 0.0,
            "median": self.quantile(50),
            "p95": self.quantile(95),
            "p99": self.quantile(99),
            "max": max(self._values, default=0),
            "histogram": [list(line) for line in self.histogram()],
        }


class Measure(Protocol):
    """What a length is counted in."""

    unit: str

    def prompt(self, prompt: Messages) -> int:
        """Length of a prompt; may raise RowProblem."""
        ...

    def answer(self, prompt: Messages, answer: Messages) -> int:
        """Length of an answer to it; may raise RowProblem."""
        ...


class Characters:
    """Lengths in characters (code points)."""

    unit = "characters"

    def prompt(self, prompt: Messages) -> int:
        """Characters of all messages."""
        return len(text_of(prompt))

    def answer(self, prompt: Messages, answer: Messages) -> int:
        """Characters of the answer."""
        return len(text_of(answer))


class DataStatistics:
    """Statistics of examples of one kind.

    A ranking of K answers is one example, whose prompt counts once; its answers count as chosen
    and rejected once for every pair that is made of it, as training sees them.

    Args:
        measure: What lengths are counted in.
        limits: Lengths of the prompt with its longest answer above which examples are counted.
        language_of: The language of a text, where languages are wanted.
        sample_size: Examples whose languages and scripts are looked at.
    """

    def __init__(
        self,
        measure: Measure | None = None,
        limits: Sequence[int] = (),
        language_of: Callable[[str], str] | None = None,
        sample_size: int = SAMPLE_SIZE,
    ) -> None:
        self._measure = measure or Characters()
        self._language_of = language_of
        self._sample_size = sample_size
        self._sample: list[tuple[int, str, str]] = []  # a heap: negative hash, prompt, answer
        self._lengths: defaultdict[str, Distribution] = defaultdict(Distribution, prompt=Distribution())
        self._whole = Distribution()
        self._turns = Distribution()
        self._over = dict.fromkeys(limits, 0)
        self._multi_turn = self._with_system = 0
        self._rankings = self._pairs = self._longer = self._equal = 0

    def add(
        self, example: SftExample | PreferenceExample | RankingExample, pairs: Sequence[tuple[int, int]] | None = None
    ) -> None:
        """Count an example.

        Args:
            example: The example.
            pairs: Of a ranking: the pairs (better, worse) that count; None: all that are not tied.

        Raises:
            RowProblem: It holds what is no text, or cannot be measured; then nothing of it is counted.
        """
        prompt, answers = example.prompt, example.answers
        sides: Sequence[tuple[int, int]] = [] if isinstance(example, SftExample) else [(0, 1)]
        if isinstance(example, RankingExample):
            sides = example.pairs("all") if pairs is None else pairs
        try:
            digest = content_id(prompt, *answers)
        except UnicodeEncodeError:
            raise RowProblem("bad_unicode", "has half of a surrogate pair, which is no text") from None
        prompt_length = self._measure.prompt(prompt)
        lengths = [self._measure.answer(prompt, answer) for answer in answers]

        self._lengths["prompt"].add(prompt_length)
        if isinstance(example, SftExample):
            self._lengths["completion"].add(lengths[0])
        for better, worse in sides:
            self._lengths["chosen"].add(lengths[better])
            self._lengths["rejected"].add(lengths[worse])
            self._longer += lengths[better] > lengths[worse]
            self._equal += lengths[better] == lengths[worse]
        self._pairs += len(sides)
        self._rankings += isinstance(example, RankingExample)
        whole = prompt_length + max(lengths)
        self._whole.add(whole)
        for limit in self._over:
            self._over[limit] += whole > limit
        roles = [message["role"] for message in prompt]
        self._turns.add(roles.count("user"))
        self._multi_turn += roles.count("user") > 1
        self._with_system += "system" in roles
        self._add_to_sample(digest, prompt, answers[0])

    def summary(self) -> dict[str, Any]:
        """All figures, as JSON has them."""
        num = len(self._whole)
        found: dict[str, Any] = {
            "examples": num,
            "turns": self._turns.summary(),
            "multi_turn": _share(self._multi_turn, num),
            "system_prompt": _share(self._with_system, num),
            "unit": self._measure.unit,
            "lengths": {
                **{name: lengths.summary() for name, lengths in self._lengths.items()},
                "prompt_and_longest_answer": self._whole.summary(),
            },
        }
        if self._over:
            found["over"] = {str(limit): _share(count, num) for limit, count in self._over.items()}
        if self._pairs:
            found["rankings"] = self._rankings
            found["pairs"] = self._pairs
            low, high = wilson_interval(self._longer, self._pairs)
            found["chosen_longer"] = {
                **_share(self._longer, self._pairs),
                "interval": [low, high],
                "equal": self._equal,
            }
        if self._language_of is not None:
            found["languages"] = self._languages(self._language_of)
        found["scripts"] = _script_shares(f"{prompt}\n{answer}" for _, prompt, answer in self._sample)
        found["sampled"] = len(self._sample)
        return found

    def _add_to_sample(self, digest: str, prompt: Messages, answer: Messages) -> None:
        order = -int(digest, 16)
        if len(self._sample) == self._sample_size and order <= self._sample[0][0]:
            return
        entry = (order, _asked(prompt)[:_SAMPLED_CHARACTERS], text_of(answer)[:_SAMPLED_CHARACTERS])
        if len(self._sample) < self._sample_size:
            heapq.heappush(self._sample, entry)
        else:
            heapq.heapreplace(self._sample, entry)

    def _languages(self, language_of: Callable[[str], str]) -> dict[str, Any]:
        prompts: Counter[str] = Counter()
        answers: Counter[str] = Counter()
        different = 0
        for _, prompt, answer in sorted(self._sample):
            asked, answered = (
                language_of(text) if any(map(str.isalpha, text)) else NO_LETTERS for text in (prompt, answer)
            )
            prompts[asked] += 1
            answers[answered] += 1
            different += asked != answered and {NO_LETTERS, TOO_SHORT}.isdisjoint((asked, answered))
        return {
            "prompts": dict(_ordered(prompts)),
            "answers": dict(_ordered(answers)),
            "answer_in_another": _share(different, len(self._sample)),
        }


def _share(count: int, total: int) -> dict[str, Any]:
    return {"count": count, "share": count / total if total else 0.0}


def _ordered(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))


def _asked(prompt: Messages) -> str:
    """What the user says; where no user speaks, all of it."""
    texts = [message["content"] for message in prompt if message["role"] == "user"]
    return "\n".join(texts) if texts else text_of(prompt)


# --- scripts ------------------------------------------------------------------------------

_SCRIPT_NAMES = {
    "LATIN": "Latin",
    "CJK": "Han",
    "IDEOGRAPHIC": "Han",
    "HIRAGANA": "Kana",
    "KATAKANA": "Kana",
    "HANGUL": "Hangul",
    "CYRILLIC": "Cyrillic",
    "ARABIC": "Arabic",
    "DEVANAGARI": "Devanagari",
}
"""The script behind the first word of a letter's name in Unicode."""


@lru_cache(maxsize=1 << 16)
def script_of(character: str) -> str | None:
    """The script of a letter, one of :data:`SCRIPTS`; None where it is no letter."""
    if not unicodedata.category(character).startswith("L"):
        return None
    name = unicodedata.name(character, "other").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
    return _SCRIPT_NAMES.get(name.replace("-", " ").split()[0], "other")


def _script_shares(texts: Any) -> dict[str, float]:
    """Share of the letters by script."""
    counts: Counter[str] = Counter()
    for text in texts:
        for character, count in Counter(text).items():
            if (script := script_of(character)) is not None:
                counts[script] += count
    total = counts.total()
    return {script: counts[script] / total if total else 0.0 for script in SCRIPTS}
