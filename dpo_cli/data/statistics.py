"""What data is like before it is used: lengths, turns, languages. Files are read as the conversion reads them.

Of an example only its lengths stay, four bytes each. Languages and scripts are those of a sample,
the examples with the smallest content hash, so neither their order nor a seed decides.
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain, groupby
from typing import Any

import numpy as np
import regex

from dpo_cli.core.data_params import Source
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.convert import convert_aside
from dpo_cli.data.plan import Treatment, by_kind
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.repeats import CHECKS
from dpo_cli.data.schema import Messages, part_id, text_of
from dpo_cli.statistics.intervals import wilson_interval

LIMITS = (512, 1024, 2048, 4096)
"""Numbers of tokens above which examples are counted."""

SAMPLE_SIZE = 2000
"""Examples whose languages and scripts are looked at."""

NO_LETTERS = "none"
"""The language of a text without letters."""

TOO_SHORT = "too_short"
"""The language of a text that is too short, or too much of several languages, to tell it."""

_SAMPLED_CHARACTERS = 1000
_SURE = 0.6
"""The probability from which on a guessed language is named."""


def profile_sources(
    sources: Sequence[Source], params: Params, encoder: ChatEncoder | None, reporter: Reporter
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each kind of data with its figures, as soon as it is read; lengths in the encoder's tokens, or in characters.

    Rows are read and checked as the conversion does it, but for comparing them with each other: those that repeat are
    counted, and so are those that the weight of their source would leave out.

    Raises:
        DataError: A file cannot be read or has no known format.
    """
    treatment = Treatment.of(params.data).without_stops()
    treatment = replace(treatment, policies={**treatment.policies, **dict.fromkeys(CHECKS, "keep")})
    for kind, mine in by_kind(sources):
        mine = [source.model_copy(update={"weight": 1.0}) for source in mine]
        statistics = DataStatistics(encoder, LIMITS if encoder is not None else (), language_of)
        with convert_aside(mine, treatment, reporter, f"reading {kind}", params.runtime.workers) as (report, _):
            left_out = report.rejected.copy()
            with reporter.meter(f"measuring {kind}", report.num_checked, "examples") as meter:
                for block in report.blocks:
                    for example in _examples(block.rows()):
                        try:
                            statistics.add(example)
                        except RowProblem as problem:
                            left_out[problem.reason] += 1
                    meter.advance(block.num)
        formats = sum((account.formats for account in report.files), Counter[str]())
        yield (
            kind,
            {
                "rows": report.num_read,
                "left_out": dict(left_out.most_common()),
                "sources": [
                    {"file": account.path.as_posix(), "rows": account.num_rows, "format": account.why}
                    for account in report.files
                ],
                "formats": dict(formats.most_common()),
                **statistics.summary(),
            },
        )


def _examples(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rows of a block by example: the pairs of a ranking together, others alone."""
    numbered = groupby(enumerate(rows), lambda row: (row[1]["ranking"], row[1]["ranking"] < 0 and row[0]))
    for _, example in numbered:
        yield [row for _, row in example]


def language_of(text: str) -> str:
    """The language of a text as two letters: a guess, or TOO_SHORT where it would be a poor one."""
    language, probability = _identifier().classify(text)
    return str(language) if probability >= _SURE else TOO_SHORT


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # here: it takes half a second

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def distribution(values: Sequence[int]) -> dict[str, Any]:
    """How whole numbers from 0 are spread: mean, quantiles, maximum, and a histogram.

    A quantile is the smallest value that so many percent of the values do not exceed. The histogram has bins
    [smallest value, largest value, count], each twice as wide as the one before it.
    """
    if not values:
        return {"count": 0, "mean": 0.0, "median": 0, "p95": 0, "p99": 0, "max": 0, "histogram": []}
    _, widths = np.frexp(np.array(values))  # in bits
    counts = np.bincount(widths).tolist()
    median, p95, p99 = np.quantile(values, (0.5, 0.95, 0.99), method="inverted_cdf").tolist()
    return {
        "count": len(values),
        "mean": sum(values) / len(values),
        "median": median,
        "p95": p95,
        "p99": p99,
        "max": max(values),
        "histogram": [[1 << bits >> 1, (1 << bits) - 1, counts[bits]] for bits in range(widths.min(), len(counts))],
    }


def _lengths() -> array[int]:
    return array("i")  # four bytes each


class DataStatistics:
    """Statistics of examples of one kind.

    A ranking is one example, whose prompt counts once; its answers count as chosen and rejected
    once for every pair that is made of it, as training sees them.

    Args:
        encoder: Lengths are counted in its tokens, with all that the chat template adds; None: in characters.
        limits: Lengths of the prompt with its longest answer above which examples are counted.
        language_of: The language of a text, where languages are wanted.
        sample_size: Examples whose languages and scripts are looked at.
    """

    def __init__(
        self,
        encoder: ChatEncoder | None = None,
        limits: Sequence[int] = (),
        language_of: Callable[[str], str] | None = None,
        sample_size: int = SAMPLE_SIZE,
    ) -> None:
        self._encoder = encoder
        self._language_of = language_of
        self._sample_size = sample_size
        self._sample: list[tuple[int, str, str]] = []  # a heap: negative hash, prompt, answer
        self._lengths: defaultdict[str, array[int]] = defaultdict(_lengths, prompt=_lengths())
        self._whole, self._turns = _lengths(), _lengths()
        self._over = dict.fromkeys(limits, 0)
        self._multi_turn = self._with_system = 0
        self._rankings = self._pairs = self._longer = self._equal = 0

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Count an example: an instruction, a pair, or the pairs of a ranking, as canonical rows.

        Raises:
            RowProblem: It cannot be measured; then nothing of it is counted.
        """
        prompt = rows[0]["prompt"]
        sides = [name for name in ("completion", "chosen", "rejected") if rows[0].get(name)]
        prompt_length = len(text_of(prompt) if self._encoder is None else self._encoder.encode_prompt(prompt))
        lengths: dict[str, int] = {}  # of each answer, which several pairs may have
        measured = [[self._length(prompt, row[side], lengths) for side in sides] for row in rows]

        self._lengths["prompt"].append(prompt_length)
        for pair in measured:
            for side, length in zip(sides, pair, strict=True):
                self._lengths[side].append(length)
            self._pairs += len(pair) == 2
            self._longer += pair[0] > pair[-1]
            self._equal += len(pair) == 2 and pair[0] == pair[1]
        self._rankings += rows[0]["ranking"] >= 0
        whole = prompt_length + max(lengths.values())
        self._whole.append(whole)
        for limit in self._over:
            self._over[limit] += whole > limit
        roles = [message["role"] for message in prompt]
        self._turns.append(roles.count("user"))
        self._multi_turn += roles.count("user") > 1
        self._with_system += "system" in roles
        self._add_to_sample(rows[0]["id"], prompt, rows[0][sides[0]])

    def _length(self, prompt: Messages, answer: Messages, known: dict[str, int]) -> int:
        key = part_id(answer)
        if key not in known:
            encoder = self._encoder
            known[key] = len(text_of(answer) if encoder is None else encoder.encode_completion(prompt, answer))
        return known[key]

    def summary(self) -> dict[str, Any]:
        """All figures, as JSON has them."""
        num = len(self._whole)
        found: dict[str, Any] = {
            "examples": num,
            "turns": distribution(self._turns),
            "multi_turn": _share(self._multi_turn, num),
            "system_prompt": _share(self._with_system, num),
            "unit": "characters" if self._encoder is None else "tokens",
            "lengths": {
                **{name: distribution(lengths) for name, lengths in self._lengths.items()},
                "prompt_and_longest_answer": distribution(self._whole),
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
            "prompts": _ordered(prompts),
            "answers": _ordered(answers),
            "answer_in_another": _share(different, len(self._sample)),
        }


def _share(count: int, total: int) -> dict[str, Any]:
    return {"count": count, "share": count / total if total else 0.0}


def _ordered(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def _asked(prompt: Messages) -> str:
    """What the user says; where no user speaks, all of it."""
    texts = [message["content"] for message in prompt if message["role"] == "user"]
    return "\n".join(texts) if texts else text_of(prompt)


_SCRIPTS = {
    "Latin": r"\p{scx=Latin}",
    "Han": r"\p{scx=Han}",
    "Kana": r"\p{scx=Hiragana}\p{scx=Katakana}",
    "Hangul": r"\p{scx=Hangul}",
    "Cyrillic": r"\p{scx=Cyrillic}",
    "Arabic": r"\p{scx=Arabic}",
    "Devanagari": r"\p{scx=Devanagari}",
    "other": r"\p{L}",
}
"""The scripts that are told apart, by what their letters are in Unicode."""

_LETTER = regex.compile(
    "(?V1)" + "|".join(rf"(?P<{name}>[\p{{L}}&&[{letters}]])" for name, letters in _SCRIPTS.items())
)


def _script_shares(texts: Iterable[str]) -> dict[str, float]:
    """Share of the letters by script."""
    counts: Counter[str | None] = Counter()
    for character, count in Counter(chain.from_iterable(texts)).items():
        if letter := _LETTER.match(character):
            counts[letter.lastgroup] += count
    total = counts.total()
    return {script: counts[script] / total if total else 0.0 for script in _SCRIPTS}
