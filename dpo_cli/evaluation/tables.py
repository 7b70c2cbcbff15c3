"""What an evaluation found, as files: answers as rows, tables in CSV for the report's figures, sheets to vote on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dpo_cli.core import paths
from dpo_cli.core.artifacts import read_json, write_csv_table
from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.evaluation import DPO, SFT
from dpo_cli.evaluation.experiments import rows_of_answers
from dpo_cli.judging.known_reward import world_task
from dpo_cli.judging.templates import transcript
from dpo_cli.judging.votes import item_id, rating_sheet
from dpo_cli.judging.win_rate import Answers, ComparisonResult
from dpo_cli.statistics.calibration import Bin, half_ties
from dpo_cli.statistics.intervals import Estimate, Sampling

if TYPE_CHECKING:  # what computes is imported where there is something to compute
    from dpo_cli.evaluation.kl import SequenceKl
    from dpo_cli.evaluation.measurement import Measurement
    from dpo_cli.evaluation.rewards import ScoredGroup
    from dpo_cli.judging.prepare import ReadyJudge

PAIRS = (
    "id", "prompt", "chosen_reward", "rejected_reward", "margin", "loss", "chosen_tokens", "rejected_tokens", "source",
)  # fmt: skip
MARGINS = ("margin", "share")
RELIABILITY = ("low", "high", "num_pairs", "probability", "accuracy", "accuracy_low", "accuracy_high")
ACCURACY_BY = ("kind", "label", "num_pairs", "accuracy", "low", "high")
TEMPERATURES = (
    "temperature", "opponent", "num_prompts", "win_rate", "low", "high", "tie_rate", "policy_tokens", "opponent_tokens",
)  # fmt: skip
FRONTIER = ("scale", "kl", "kl_low", "kl_high", "win_rate", "low", "high", "reward_gain")
LENGTH = ("length_difference", "num_prompts", "win_rate", "low", "high")

_MARGIN_BINS = 40
_LENGTH_BINS = 5
_MOST_SOURCES = 12


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows as CSV under a header; numbers to 9 digits, None and NaN empty."""
    short = ([f"{cell:.9g}" if isinstance(cell, float) and cell == cell else cell for cell in row] for row in rows)
    write_csv_table(path, columns, short)


def pair_rows(
    pairs: Sequence[ScoredGroup], losses: Sequence[float], sources: Mapping[str, str]
) -> list[tuple[Any, ...]]:
    """Every held-out pair with its loss and, by its id, its source (:data:`PAIRS`)."""
    return [
        (pair.id, pair.group, *pair.rewards, pair.margin, loss, *pair.num_tokens, sources[pair.id])
        for pair, loss in zip(pairs, losses, strict=True)
    ]


def margin_rows(margins: Sequence[float]) -> list[tuple[Any, ...]]:
    """The distribution of margins: middle of the bin, share of the pairs."""
    counts, edges = np.histogram(margins, bins=_MARGIN_BINS)
    middles = (edges[:-1] + edges[1:]) / 2
    return [(f"{middle:.6g}", f"{count / len(margins):.6g}") for middle, count in zip(middles, counts, strict=True)]


def reliability_rows(bins: Sequence[Bin]) -> list[tuple[Any, ...]]:
    """How sure the implicit reward is, and how often it is right (:data:`RELIABILITY`)."""
    return [(each.low, each.high, each.num_pairs, each.probability, *vars(each.accuracy).values()) for each in bins]


def accuracy_rows(
    pairs: Sequence[ScoredGroup], sources: Mapping[str, str], sampling: Sampling
) -> list[tuple[Any, ...]]:
    """Reward accuracy by the difference in length, chosen less rejected, and by source (:data:`ACCURACY_BY`)."""
    differences = np.array([pair.num_tokens[0] - pair.num_tokens[1] for pair in pairs])
    right = half_ties(np.array([pair.margin for pair in pairs]))
    groups = [pair.group for pair in pairs]

    def row(kind: str, label: str, places: Sequence[int]) -> tuple[Any, ...]:
        found = sampling.rate([float(right[place]) for place in places], [groups[place] for place in places])
        return kind, label, len(places), *vars(found).values()

    rows = [row("length", _range(differences[places]), places) for places in quantile_bins(differences)]
    by_source: dict[str, list[int]] = {}
    for place, pair in enumerate(pairs):
        by_source.setdefault(sources[pair.id], []).append(place)
    largest = sorted(by_source, key=lambda name: (-len(by_source[name]), name))[:_MOST_SOURCES]
    return rows + [row("source", name, by_source[name]) for name in largest]


def quantile_bins(values: np.ndarray, number: int = _LENGTH_BINS) -> list[list[int]]:
    """Places of values in bins of about equal numbers, ascending; equal values lie in one bin."""
    edges = np.unique(np.quantile(values, np.arange(1, number) / number))
    bins = np.searchsorted(edges, values, side="left")
    return [np.flatnonzero(bins == each).tolist() for each in sorted(set(bins.tolist()))]


def _range(values: np.ndarray) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:+d}" if low == high else f"{low:+d} to {high:+d}"


def temperature_row(temperature: float, opponent: str, result: ComparisonResult) -> tuple[Any, ...]:
    """A point of the curve of win rates (:data:`TEMPERATURES`)."""
    tokens = (
        float(np.mean([answers[id].num_tokens for id in result.comparisons]))
        for answers in (result.ours, result.theirs)
    )
    return temperature, opponent, len(result.wins), *vars(result.win_rate).values(), result.tie_rate, *tokens


def frontier_row(
    scale: float, kl: Estimate, result: ComparisonResult | None, reward_gain: float | None
) -> tuple[Any, ...]:
    """A point of the frontier (:data:`FRONTIER`); the SFT model itself has no result."""
    rate = result.win_rate if result else Estimate(0.5, 0.5, 0.5)
    return scale, *vars(kl).values(), *vars(rate).values(), reward_gain


def length_rows(result: ComparisonResult, sampling: Sampling) -> list[tuple[Any, ...]]:
    """Win rate by how much longer the policy's answer is, tokens (:data:`LENGTH`)."""
    wins = result.wins
    ids = list(wins)
    differences = np.array([result.ours[id].num_tokens - result.theirs[id].num_tokens for id in ids])
    rows: list[tuple[Any, ...]] = []
    for places in quantile_bins(differences):
        inside = [ids[place] for place in places]
        found = sampling.rate([wins[id] for id in inside], [result.ours[id].group for id in inside])
        rows.append((float(differences[places].mean()), len(inside), *vars(found).values()))
    return rows


# --- answers --------------------------------------------------------------------------------


class Judged(NamedTuple):
    """What a judge, where there is one, says of the policy's answers against SFT's and against the chosen ones."""

    judge: ReadyJudge | None
    main: ComparisonResult | None
    against: ComparisonResult | None


def sample_rows(
    measurement: Measurement,
    answers: Mapping[str, Answers],
    data: tuple[Answers, Answers],
    kls: Mapping[str, SequenceKl],
    log_ratios: Mapping[str, Sequence[tuple[str, float]]],
    judged: Judged,
) -> list[dict[str, Any]]:
    """One row a prompt.

    Args:
        measurement: Has the prompts.
        answers: Of SFT and of the policy, by prompt id.
        data: The data's chosen and rejected answers.
        kls: Along the policy's answers at temperature 1, nats.
        log_ratios: Of every piece of the policy's answers.
        judged: Who wins.
    """
    chosen, rejected = data
    rows = []
    for prompt in measurement.prompts:
        row: dict[str, Any] = {"id": prompt.id, "prompt": prompt.messages}
        for name in (SFT, DPO):
            answer = answers[name][prompt.id]
            row[name] = {"text": answer.text, "num_tokens": answer.num_tokens, "finished": answer.finished}
        row[DPO]["heat"] = [list(piece) for piece in log_ratios[prompt.id]]
        of_data = {"chosen": chosen, "rejected": rejected}
        row |= {side: found[prompt.id].text for side, found in of_data.items() if prompt.id in found}
        if judged.judge is not None and judged.main is not None:
            _add_judgment(row, judged.judge, judged.main, judged.against, prompt.id)
        if measurement.evaluate.judge == "world":
            task = world_task(transcript(prompt.messages))
            for name in (SFT, DPO):
                row[name]["well_formed"] = row[name]["finished"] and task.is_well_formed(row[name]["text"])
        row["kl"] = kls[prompt.id].exact
        rows.append(row)
    return rows


def _add_judgment(
    row: dict[str, Any], judge: ReadyJudge, main: ComparisonResult, against: ComparisonResult | None, id: str
) -> None:
    """Who wins; rewards of one's own kind are given less their mean, since they are fixed up to a constant a prompt."""
    if judge.reward is not None:
        ours, theirs = (judge.reward(each.asked, each.text) for each in (main.ours[id], main.theirs[id]))
        middle = 0.0 if judge.is_exact else (ours + theirs) / 2
        row[SFT]["reward"], row[DPO]["reward"] = theirs - middle, ours - middle
    for name, result in (("win", main), ("win_chosen", against)):
        if result is not None and id in result.comparisons and (win := result.comparisons[id].win) is not None:
            row[name] = win
    if judge.reads and main.comparisons[id].ours_first is not None:
        row["consistent"] = main.comparisons[id].is_consistent


def sample_means(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of what the judge knows of each answer: its reward, and whether it is well formed."""
    return {
        f"{figure}_{name}": float(np.mean([sample[name][figure] for sample in samples]))
        for figure in ("reward", "well_formed")
        for name in (SFT, DPO)
        if figure in samples[0][name]
    }


def vote_rows(judged: Judged, method: str) -> list[tuple[Any, ...]]:
    """The judge's verdicts as votes, beside which people's can be laid; those of people are votes already.

    Identical answers are left out, as they are in a sheet for people.
    """
    if judged.judge is None or judged.main is None or judged.judge.rater == "votes":
        return []
    main, rater = judged.main, judged.judge.rater
    rows = []
    for id, win in main.wins.items():
        if main.comparisons[id].ours_first is None:
            continue
        ours, theirs = main.ours[id], main.theirs[id]
        vote = "tie" if win == 0.5 else "A" if win > 0.5 else "B"
        rows.append((item_id(ours.asked, ours.text, theirs.text), id, method, SFT, rater, vote, method))
    return rows


def write_rating_sheet(model: Path | None, sheet: Path, rater: str) -> tuple[int, int]:
    """Write a sheet; a file that is there already is not touched, since it may hold votes.

    Args:
        model: A folder that ``evaluate --model`` wrote; None: that of stage evaluate.
        sheet: The CSV file.
        rater: Who fills it in: `kind` or `kind:name`.

    Returns:
        How many items are in it, and how many prompts are not because both answers are identical.

    Raises:
        ParamsError: The sheet is there already, or the rater has no kind.
        DataError: The samples are missing or damaged, or all answers are identical.
    """
    if not rater.partition(":")[0].strip():
        raise ParamsError(f"--rater must be a kind or kind:name, such as human:anna, got {rater!r}")
    samples = (model or paths.report_dir("evaluate")) / paths.SAMPLES
    if sheet.exists():
        raise ParamsError(f"{sheet} already exists and may contain votes; name another file")
    if not samples.is_file():
        raise DataError(f"{samples} is missing; run: dpo-cli evaluate")
    try:
        _, answers = rows_of_answers(samples.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{samples} is damaged ({error}); run: dpo-cli evaluate") from None
    rows = [(id, transcript(texts.prompt), texts.dpo, texts.sft) for id, texts in sorted(answers.items())]
    items = rating_sheet(rows, _method(model), SFT, rater)
    if not items:
        raise DataError(f"{samples}: both models answer all {len(rows)} prompts alike, so there is nothing to vote on")
    write_csv_table(sheet, items[0], [item.values() for item in items])
    return len(items), len(rows) - len(items)


def _method(model: Path | None) -> str:
    """What an evaluation calls its policy in a votes file."""
    if model is None:
        return DPO
    settings = read_json(model / paths.MODEL_SETTINGS, "run: dpo-cli evaluate --model")
    return str(settings.get("name", model.resolve().name))
