"""Stage evaluate: is the tuned model better, by how much, how surely, and at what cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch

from dpo_cli.core import paths
from dpo_cli.core.artifacts import read_json, write_json, write_json_lines, write_text
from dpo_cli.core.errors import DataError, StaleArtifactError
from dpo_cli.core.params import EvaluateParams, Params, RuntimeParams, TrainParams
from dpo_cli.core.progress import Reporter
from dpo_cli.core.scratch import stage_scratch
from dpo_cli.data.schema import Messages, content_id
from dpo_cli.data.tokenise import TokenGroup, TokenTable, explain_rejects
from dpo_cli.evaluation.bootstrap import Estimate, cluster_bootstrap
from dpo_cli.evaluation.generation import Answer, PromptTokens, sample_answers
from dpo_cli.evaluation.held_out import HeldOut, HeldOutPair, PairFigures, summarise_held_out
from dpo_cli.evaluation.judges.exact import WorldJudge, world_task
from dpo_cli.evaluation.judges.reward_model import RewardModel, preference
from dpo_cli.evaluation.kl import SequenceKl, estimates_disagree, sequence_kl
from dpo_cli.evaluation.report.page import write_report
from dpo_cli.evaluation.verdict import headline, verdict
from dpo_cli.evaluation.win_rate import compare
from dpo_cli.models.adapters import ModelPair, load_pair
from dpo_cli.models.device import peak_memory_gib, token_budget
from dpo_cli.models.load import quiet_libraries
from dpo_cli.models.reward import check_reward_model
from dpo_cli.objectives.pairwise import sigmoid
from dpo_cli.reference.cache import read_cache, reference_logps
from dpo_cli.reference.graph import Graph, check_context, open_graph, table_digests
from dpo_cli.scoring.budget import TokenBudget, in_micro_batches
from dpo_cli.scoring.probe import open_scorer
from dpo_cli.scoring.scorer import Scorer

_SFT, _DPO = "sft", "dpo"
_TRAIN_REMEDY = "run: dpo-cli train"
_MARGIN_BINS = 40


def run(params: Params, reporter: Reporter) -> dict[str, Any]:
    """Write reports/evaluate and reports/report.html.

    Raises:
        StaleArtifactError: Something an earlier stage made is missing, damaged or of another graph.
        DataError: A held-out prompt is in the training data, or the judge does not know a prompt.
    """
    quiet_libraries()
    knobs, runtime = params.evaluate, params.runtime
    graph = open_graph(params.model, params.reference, runtime)
    provenance = read_json(paths.DPO_MODEL / "provenance.json", _TRAIN_REMEDY)
    if provenance["graph"] != graph.identity:
        raise StaleArtifactError(f"{paths.DPO_MODEL}: trained on another graph than models/sft is now; {_TRAIN_REMEDY}")
    if graph.sft.data is not None and graph.sft.data != table_digests(paths.SFT_DATA):
        raise StaleArtifactError(f"{paths.SFT_MODEL}: trained on other data than data/sft is now; run: dpo-cli sft")
    if provenance["data"] != table_digests(paths.PREFERENCE_DATA):
        raise StaleArtifactError(
            f"{paths.DPO_MODEL}: trained on other data than data/preference is now; {_TRAIN_REMEDY}"
        )
    if knobs.judge == "reward-model":
        check_reward_model(paths.REWARD_MODEL, graph.identity, provenance["data"])
    table = graph.tokenise_pairs("eval")
    if not table.groups:
        raise DataError(
            f"data/preference/eval.parquet: {explain_rejects([table], 'reference.max_length', graph.max_length)}"
        )
    num_leaked = _count_leaked_prompts(table)
    if num_leaked:
        raise DataError(
            f"{num_leaked} held-out prompts are in the training data; run: dpo-cli convert-sft, convert-preferences"
        )
    cache = read_cache(paths.REFERENCE, graph.identity)
    with stage_scratch("evaluate", "run"):
        pair = load_pair(graph.base, graph.sft, graph.machine, graph.quantization)
        scorer, _ = open_scorer(pair.use_policy(), graph.machine.compute_dtype, runtime, reporter, "evaluate")
        held_out = _held_out(
            pair, scorer, table, cache, provenance["params"]["train"]["beta"], knobs, runtime, reporter
        )
        prompts = _prompts(table, knobs.num_prompts)
        longest = max(len(prompt.tokens) for prompt in prompts)
        check_context(graph.base, longest + knobs.max_new_tokens, "evaluate.max_new_tokens + the longest prompt")
        answers = _answers(pair, graph, prompts, knobs, runtime, reporter)
        kls = _kls(pair, scorer, graph, prompts, answers[_DPO], knobs, runtime, reporter)
        del pair, scorer  # their memory is the judge's
        samples = _judge(knobs, graph, table, prompts, answers, kls, runtime, reporter)
        metrics = _metrics(knobs, held_out, samples, kls, answers)
        metrics |= {"num_leaked_prompts": num_leaked, "peak_mem_gib": peak_memory_gib(graph.machine)}
        metrics["learns_log_ratio"] = TrainParams.model_validate(provenance["params"]["train"]).learns_log_ratio
        folder = paths.report_dir("evaluate")
        write_json_lines(folder / "samples.jsonl", samples)
        write_text(folder / "pairs.csv", _pairs_csv(held_out.rows))
        write_text(folder / "margins.csv", _histogram(held_out.margins))
        write_json(paths.metrics_file("evaluate"), {"evaluate": metrics})
        write_report(paths.REPORT_HTML)
    rows = [(finding.name, f"{finding.value}  ({finding.meaning})") for finding in verdict(metrics)]
    reporter.table(f"evaluate: {headline(metrics)[0]}", [*rows, ("report", paths.REPORT_HTML.as_posix())])
    return metrics


def _count_leaked_prompts(held_out: TokenTable) -> int:
    """Held-out prompts that are in any training data."""
    seen: set[str] = set()
    for path in (paths.SFT_DATA / "train.parquet", paths.PREFERENCE_DATA / "train.parquet"):
        if not path.is_file():
            raise StaleArtifactError(f"{path} is missing; run: dpo-cli repro")
        for (prompt,) in pl.read_parquet(path, columns=["prompt"], glob=False).iter_rows():
            seen.add(content_id(prompt))
    return sum(group in seen for group in held_out.prompts)


def _held_out(
    pair: ModelPair,
    scorer: Scorer,
    table: TokenTable,
    cache: Mapping[str, float],
    beta: float,
    knobs: EvaluateParams,
    runtime: RuntimeParams,
    reporter: Reporter,
) -> HeldOut:
    """Score the held-out pairs with the policy and compare with the cached reference."""
    reference = reference_logps(cache, table.groups)
    pair.use_policy()
    budget = TokenBudget(token_budget(runtime, scorer.device), "evaluate", reporter)
    pairs = []
    label = "evaluate: scoring held-out pairs"
    with scorer, torch.no_grad(), reporter.meter(label, len(table.groups), "pairs") as meter:
        for batch, scores in in_micro_batches(table.groups, budget, scorer.split, scorer.score):
            logps = scores.logps_BK.tolist()
            pairs += [_held_out_pair(group, row, reference[group.id]) for group, row in zip(batch, logps, strict=True)]
            meter.advance(len(batch))
    return summarise_held_out(
        pairs,
        sigmoid(beta),
        beta,
        draws=knobs.bootstrap_draws,
        confidence=knobs.confidence,
        seed=knobs.seed,
    )


def _held_out_pair(group: TokenGroup, policy: Sequence[float], reference: Sequence[float]) -> HeldOutPair:
    chosen, rejected = group.completions
    return HeldOutPair(
        id=group.id,
        group=group.group,
        policy=(policy[0], policy[1]),
        reference=(reference[0], reference[1]),
        num_tokens=(len(chosen), len(rejected)),
    )


def _prompts(table: TokenTable, limit: int) -> list[PromptTokens]:
    """The held-out prompts to answer, each once, in the order of their ids, which is random."""
    tokens = {group.group: group.prompt for group in table.groups}
    chosen = sorted(tokens)[: limit or None]
    return [PromptTokens(group, tokens[group]) for group in chosen]


@dataclass(frozen=True)
class _Speaker:
    """A model that answers, and the random stream it answers from."""

    name: str
    model: Any


def _answers(
    pair: ModelPair,
    graph: Graph,
    prompts: Sequence[PromptTokens],
    knobs: EvaluateParams,
    runtime: RuntimeParams,
    reporter: Reporter,
) -> dict[str, dict[str, Answer]]:
    """Answers of both models by name and prompt."""
    answers = {}
    for name, use in ((_SFT, pair.use_reference), (_DPO, pair.use_policy)):
        speaker = _Speaker(name, use())
        answers[name] = _sample(speaker, graph, prompts, knobs.temperature, knobs, runtime, reporter)
    return answers


def _sample(
    speaker: _Speaker,
    graph: Graph,
    prompts: Sequence[PromptTokens],
    temperature: float,
    knobs: EvaluateParams,
    runtime: RuntimeParams,
    reporter: Reporter,
) -> dict[str, Answer]:
    label = f"evaluate: {speaker.name} answers at T = {temperature:g}"
    with reporter.meter(label, len(prompts), "prompts") as meter:
        return sample_answers(
            speaker.model,
            prompts,
            stop_ids=graph.encoder.stop_ids,
            temperature=temperature,
            max_new_tokens=knobs.max_new_tokens,
            max_tokens=token_budget(runtime, graph.machine.device),
            seed=knobs.seed,
            stream=speaker.name,
            autocast_dtype=graph.machine.compute_dtype,
            meter=meter,
        )


def _kls(
    pair: ModelPair,
    scorer: Scorer,
    graph: Graph,
    prompts: Sequence[PromptTokens],
    answers: Mapping[str, Answer],
    knobs: EvaluateParams,
    runtime: RuntimeParams,
    reporter: Reporter,
) -> dict[str, SequenceKl]:
    """KL along samples of the policy at temperature 1, by prompt."""
    if knobs.temperature != 1:
        speaker = _Speaker(_DPO, pair.use_policy())
        answers = _sample(speaker, graph, prompts, 1.0, knobs, runtime, reporter)
    groups = [TokenGroup(prompt.id, prompt.id, prompt.tokens, (answers[prompt.id].tokens,)) for prompt in prompts]
    max_tokens = min(token_budget(runtime, scorer.device), scorer.max_distribution_tokens)
    budget = TokenBudget(max_tokens, "evaluate", reporter)

    def both(batch: Sequence[TokenGroup]) -> list[SequenceKl]:
        pair.use_policy()
        policy = scorer.next_token_logps(batch)
        pair.use_reference()
        reference = scorer.next_token_logps(batch)
        rows = zip(batch, policy, reference, strict=True)
        return [sequence_kl(ours, theirs, group.completions[0]) for group, ours, theirs in rows]

    kls: dict[str, SequenceKl] = {}
    with scorer, reporter.meter("evaluate: KL along the answers", len(prompts), "prompts") as meter:
        for batch, found in in_micro_batches(groups, budget, scorer.split, both):
            kls.update(zip((group.id for group in batch), found, strict=True))
            meter.advance(len(batch))
    return kls


def _judge(
    knobs: EvaluateParams,
    graph: Graph,
    table: TokenTable,
    prompts: Sequence[PromptTokens],
    answers: Mapping[str, Mapping[str, Answer]],
    kls: Mapping[str, SequenceKl],
    runtime: RuntimeParams,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """One row a prompt: both answers, where there is a judge who wins, and the KL in nats."""
    judge = WorldJudge() if knobs.judge == "world" else None
    rewards = _rewards(graph, prompts, answers, runtime, reporter) if knobs.judge == "reward-model" else {}
    rows = []
    for prompt in prompts:
        messages = table.prompts[prompt.id]
        row: dict[str, Any] = {"id": prompt.id, "prompt": messages}
        for name in (_SFT, _DPO):
            answer = answers[name][prompt.id]
            row[name] = {
                "text": graph.encoder.decode(list(answer.tokens)),
                "num_tokens": len(answer.tokens),
                "finished": answer.finished,
            }
        if judge is not None:
            _add_judgment(row, judge, messages)
        row["kl"] = kls[prompt.id].exact
        if prompt.id in rewards:
            _add_rewards(row, rewards[prompt.id])
        rows.append(row)
    return rows


def _add_judgment(row: dict[str, Any], judge: WorldJudge, messages: Messages) -> None:
    text = messages[-1]["content"]
    task = world_task(text)
    for name in (_SFT, _DPO):
        row[name]["reward"] = task.reward(row[name]["text"])
        row[name]["well_formed"] = row[name]["finished"] and task.is_well_formed(row[name]["text"])
    row["win"] = compare(judge, text, row[_DPO]["text"], row[_SFT]["text"])


def _rewards(
    graph: Graph,
    prompts: Sequence[PromptTokens],
    answers: Mapping[str, Mapping[str, Answer]],
    runtime: RuntimeParams,
    reporter: Reporter,
) -> dict[str, list[float]]:
    """The reward model's rewards of both answers, as they were sampled, by prompt."""
    judge = RewardModel.load(
        paths.REWARD_MODEL,
        graph.base,
        graph.sft,
        graph.machine,
        graph.quantization,
        graph.encoder,
        runtime,
        reporter,
        "evaluate",
    )
    groups = [
        TokenGroup(
            prompt.id, prompt.id, prompt.tokens, (answers[_SFT][prompt.id].tokens, answers[_DPO][prompt.id].tokens)
        )
        for prompt in prompts
    ]
    return dict(zip((prompt.id for prompt in prompts), judge.rewards(groups), strict=True))


def _add_rewards(row: dict[str, Any], rewards: Sequence[float]) -> None:
    """Rewards less their mean, since they are fixed up to a constant a prompt, and Bradley-Terry's probability."""
    theirs, ours = rewards
    row[_SFT]["reward"], row[_DPO]["reward"] = (theirs - ours) / 2, (ours - theirs) / 2
    row["win"] = 0.5 if row[_SFT]["text"] == row[_DPO]["text"] else preference(ours, theirs)


def _metrics(
    knobs: EvaluateParams,
    held_out: HeldOut,
    samples: Sequence[Mapping[str, Any]],
    kls: Mapping[str, SequenceKl],
    answers: Mapping[str, Mapping[str, Answer]],
) -> dict[str, Any]:
    prompts = [sample["id"] for sample in samples]

    def interval(values: Sequence[float]) -> Estimate:
        return cluster_bootstrap(
            values, prompts, draws=knobs.bootstrap_draws, confidence=knobs.confidence, seed=knobs.seed
        )

    kl = interval([kls[prompt].exact for prompt in prompts])
    metrics: dict[str, Any] = {
        "reward_accuracy": held_out.reward_accuracy.value,
        "reward_accuracy_ci": _ends(held_out.reward_accuracy),
        "loss": held_out.loss.value,
        "loss_ci": _ends(held_out.loss),
        "loss_at_reference": math.log(2),
        "margin": held_out.margin.value,
        "margin_ci": _ends(held_out.margin),
        "chosen_reward": held_out.chosen_reward,
        "rejected_reward": held_out.rejected_reward,
        "reference_accuracy": held_out.reference_accuracy,
        "longer_accuracy": held_out.longer_accuracy,
        "num_ties": held_out.num_ties,
        "num_pairs": held_out.num_pairs,
        "num_prompts": held_out.num_prompts,
        "num_generated_prompts": len(prompts),
        "temperature": knobs.temperature,
        "kl": kl.value,
        "kl_ci": _ends(kl),
        "kl_k1": float(np.mean([kls[prompt].k1 for prompt in prompts])),
        "kl_estimates_disagree": estimates_disagree([kls[prompt] for prompt in prompts]),
    }
    for name in (_SFT, _DPO):
        metrics[f"finished_{name}"] = float(np.mean([answers[name][prompt].finished for prompt in prompts]))
        metrics[f"answer_tokens_{name}"] = float(np.mean([len(answers[name][prompt].tokens) for prompt in prompts]))
    if knobs.judge != "none":
        win_rate = interval([sample["win"] for sample in samples])
        metrics |= {"win_rate": win_rate.value, "win_rate_ci": _ends(win_rate)}
        metrics["tie_rate"] = float(np.mean([sample["win"] == 0.5 for sample in samples]))
        for name in (_SFT, _DPO):
            metrics[f"reward_{name}"] = float(np.mean([sample[name]["reward"] for sample in samples]))
    if knobs.judge == "world":
        for name in (_SFT, _DPO):
            metrics[f"well_formed_{name}"] = float(np.mean([sample[name]["well_formed"] for sample in samples]))
        metrics["win_rate_ceiling"] = 1 - metrics["reward_sft"] / 2
    return metrics


def _ends(estimate: Estimate) -> list[float]:
    return [estimate.low, estimate.high]


def _pairs_csv(rows: Sequence[PairFigures]) -> str:
    """Every held-out pair as CSV, in the order of the ids; rewards, margin and loss to 9 digits."""
    lines = [
        f"{row.id},{row.group},{row.chosen_reward:.9g},{row.rejected_reward:.9g},{row.margin:.9g},{row.loss:.9g}"
        for row in rows
    ]
    return "\n".join(["id,prompt,chosen_reward,rejected_reward,margin,loss", *lines]) + "\n"


def _histogram(margins: Sequence[float]) -> str:
    """The distribution of margins as CSV: middle of the bin, share of the pairs."""
    counts, edges = np.histogram(margins, bins=_MARGIN_BINS)
    rows = [
        f"{(low + high) / 2:.6g},{count / len(margins):.6g}"
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    return "\n".join(["margin,share", *rows]) + "\n"
