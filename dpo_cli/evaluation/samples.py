"""The prompts of an evaluation as rows: both answers, who wins, rewards, token by token log-ratios, divergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_cli.data.schema import Messages
from dpo_cli.evaluation.kl import SequenceKl
from dpo_cli.evaluation.measurement import Measurement
from dpo_cli.evaluation.model_names import DPO, SFT
from dpo_cli.judging.known_reward import world_task
from dpo_cli.judging.prepare import ReadyJudge
from dpo_cli.judging.templates import transcript
from dpo_cli.judging.votes import item_id
from dpo_cli.judging.win_rate import Answers, ComparisonResult


@dataclass(frozen=True)
class Judged:
    """What a judge says of the answers.

    Attributes:
        judge: Who decides; None where nobody does.
        main: The policy's answers against SFT's.
        against: The policy's answers against the chosen ones.
    """

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
        messages = prompt.messages
        row: dict[str, Any] = {"id": prompt.id, "prompt": messages}
        for name in (SFT, DPO):
            answer = answers[name][prompt.id]
            row[name] = {
                "text": answer.text,
                "num_tokens": answer.num_tokens,
                "finished": answer.finished,
            }
        row[DPO]["heat"] = [list(piece) for piece in log_ratios[prompt.id]]
        row |= {"chosen": chosen[prompt.id].text, "rejected": rejected[prompt.id].text}
        if judged.judge is not None and judged.main is not None:
            _add_judgment(row, judged.judge, judged.main, judged.against, prompt.id)
        if measurement.evaluate.judge == "world":
            _add_form(row, messages)
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
        if result is not None and (win := result.comparisons[id].win) is not None:
            row[name] = win
    if judge.reads and main.comparisons[id].ours_first is not None:
        row["consistent"] = main.comparisons[id].is_consistent


def _add_form(row: dict[str, Any], messages: Messages) -> None:
    task = world_task(transcript(messages))
    for name in (SFT, DPO):
        row[name]["well_formed"] = row[name]["finished"] and task.is_well_formed(row[name]["text"])


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
