"""Stage evaluate: is the tuned model better, by how much, how surely, and at what cost.

Steps follow one another, each keyed by what it depends on: log-probabilities, answers, divergences
(:mod:`dpo_cli.evaluation.steps`), judgments (:mod:`dpo_cli.judging.cache`), then metrics and
tables, which are functions of them. Stage report draws the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.core import paths
from dpo_cli.core.artifacts import read_json, write_json, write_json_array, write_text
from dpo_cli.core.errors import DataError, ParamsError, StaleArtifactError
from dpo_cli.core.params import EvaluateParams, Params, RuntimeParams, TrainParams
from dpo_cli.core.progress import Reporter
from dpo_cli.core.scratch import stage_scratch
from dpo_cli.data.pieces import pieces_of
from dpo_cli.data.schema import Messages, text_of
from dpo_cli.data.tokenise import TokenGroup, TokenTable, explain_rejects, prompt_ids
from dpo_cli.evaluation import tables
from dpo_cli.evaluation.generation import Answer, PromptTokens
from dpo_cli.evaluation.held_out import HeldOut, HeldOutPair, summarize_held_out
from dpo_cli.evaluation.kl import SequenceKl
from dpo_cli.evaluation.metrics import (
    against_chosen_metrics,
    answer_metrics,
    cheaper_step,
    correlation,
    divergence_metrics,
    form_metrics,
    held_out_metrics,
    judge_metrics,
    perplexity,
    win_metrics,
)
from dpo_cli.evaluation.model_names import DPO, SFT
from dpo_cli.evaluation.models import EvaluatedModel, EvaluatedModels, open_models
from dpo_cli.evaluation.steps import Steps, logp_sums
from dpo_cli.evaluation.verdict import report_verdict
from dpo_cli.judging.comparisons import Answers, ComparisonResult, compare_models
from dpo_cli.judging.human import item_id
from dpo_cli.judging.known_reward import ExactJudge, world_task
from dpo_cli.judging.prepare import JudgedAnswer, LoadJudge, ReadyJudge, prepare_judge
from dpo_cli.judging.templates import transcript
from dpo_cli.judging.votes import COLUMNS as VOTE_COLUMNS
from dpo_cli.models.device import memory_metrics
from dpo_cli.models.load import quiet_libraries
from dpo_cli.reference.cache import completion_key, group_keys, read_cache, reference_logps
from dpo_cli.reference.graph import Graph, check_context, open_graph, read_columns, table_digests
from dpo_cli.statistics.bootstrap import Estimate, Sampling
from dpo_cli.statistics.calibration import reliability_table

_TRAIN_REMEDY = "run: dpo-cli train"


@dataclass(frozen=True)
class Judged:
    """What is judged, and what is known of it.

    Attributes:
        folder: An adapter for the project's SFT model, or a whole model.
        name: Of the policy as a method in a votes file.
        train: The settings of its training: beta, and whether a log-ratio was learned.
        out: Where its files go.
        is_of_this_data: Whether it is known to have been trained on this project's data.
        trained: How long it was trained; None where nothing is known of its training.
    """

    folder: Path
    name: str
    train: TrainParams
    out: Path
    is_of_this_data: bool = True
    trained: Mapping[str, int] | None = None


def run(params: Params, reporter: Reporter) -> dict[str, Any]:
    """Write reports/evaluate.

    Raises:
        StaleArtifactError: Something an earlier stage made is missing, damaged or of another graph.
        DataError: A held-out prompt is in the training data, or the judge has no verdict on too many answers.
        Interrupted: The user asked to stop; what was computed is kept.
    """
    quiet_libraries()
    graph = open_graph(params.model, params.reference, params.runtime)
    provenance = read_json(paths.DPO_MODEL / "provenance.json", _TRAIN_REMEDY)
    if provenance["graph"] != graph.identity:
        raise StaleArtifactError(f"{paths.DPO_MODEL}: trained on another graph than models/sft is now; {_TRAIN_REMEDY}")
    if graph.sft.data is not None and graph.sft.data != table_digests(paths.SFT_DATA):
        raise StaleArtifactError(f"{paths.SFT_MODEL}: trained on other data than data/sft is now; run: dpo-cli sft")
    if provenance["data"] != table_digests(paths.PREFERENCE_DATA):
        raise StaleArtifactError(
            f"{paths.DPO_MODEL}: trained on other data than data/preference is now; {_TRAIN_REMEDY}"
        )
    train = TrainParams.model_validate(provenance["params"]["train"])
    trained = provenance.get("trained", {})
    judged = Judged(paths.DPO_MODEL, DPO, train, paths.report_dir("evaluate"), trained=trained)
    metrics = evaluate(params, graph, judged, reporter)
    report_verdict(metrics, reporter, of="evaluate")
    return metrics


def evaluate_model(
    params: Params, folder: Path, out: Path, reporter: Reporter, *, beta_given: bool = False
) -> dict[str, Any]:
    """Judge an adapter or a whole model that need not be this project's, and write its files to a folder.

    Its beta is that of its provenance.json, else of section train.

    Args:
        params: Settings.
        folder: The model.
        out: Where its files go.
        reporter: Shows progress.
        beta_given: Whether settings of section train were given on the command line.

    Raises:
        ParamsError: The files would take the place of others, or settings of section train have no effect.
        StaleArtifactError: There is no model in the folder, or an earlier stage's result is missing.
        MachineError: The model cannot be loaded, or is for another one than the project's.
        DataError: See :func:`run`.
        Interrupted: The user asked to stop; what was computed is kept.
    """
    quiet_libraries()
    if paths.REPORTS.resolve() in (out.resolve(), *out.resolve().parents):
        raise ParamsError(f"--out {out} is where stages report to; name a folder outside {paths.REPORTS}")
    if out.is_dir() and any(out.iterdir()) and not (out / paths.MODEL_SETTINGS).is_file():
        raise ParamsError(f"{out} holds other files, and no evaluation of a model; name a folder of its own: --out")
    graph = open_graph(params.model, params.reference, params.runtime)
    models = open_models(graph, folder, params.runtime, reporter, "evaluate")
    known = read_json(out / paths.MODEL_SETTINGS, "") if (out / paths.MODEL_SETTINGS).is_file() else {}
    if known and known.get("policy") != models.policy.digest:
        raise ParamsError(f"{out} holds the evaluation of another model; name another folder: --out")
    settings: dict[str, Any] = {name: getattr(params, name).model_dump() for name in ("model", "reference", "evaluate")}
    settings |= {"name": folder.resolve().name, "policy": models.policy.digest}
    train, trained, is_ours = _training_of(folder, params.train, graph, reporter)
    if trained is not None:
        if beta_given:
            raise ParamsError(f"--set train.* has no effect on {folder}: its provenance.json says how it was trained")
        settings["train"] = train.model_dump()
    judged = Judged(folder, settings["name"], train, out, is_ours, trained)
    metrics = evaluate(params, graph, judged, reporter)
    write_json(out / paths.MODEL_SETTINGS, settings)
    report_verdict(metrics, reporter, of=str(folder), also=[("files", out.as_posix())])
    return metrics


def _training_of(
    folder: Path, default: TrainParams, graph: Graph, reporter: Reporter
) -> tuple[TrainParams, Mapping[str, int] | None, bool]:
    """How a model was trained, how long (None: not known), and whether on this project's graph and data."""
    path = folder / "provenance.json"
    if not path.is_file():
        reporter.warn(
            f"evaluate: {folder} does not say what it was trained on; its held-out figures mean nothing if it has read"
            " the held-out prompts"
        )
        return default, None, False
    try:
        provenance = read_json(path, "")
        train = TrainParams.model_validate(provenance["params"]["train"])
        is_ours = provenance["graph"] == graph.identity and provenance["data"] == table_digests(paths.PREFERENCE_DATA)
    except (StaleArtifactError, ValueError, KeyError, TypeError):
        reporter.warn(f"evaluate: {path} is not one of this version, and is not read; beta is train.beta's")
        return default, None, False
    if not is_ours:
        reporter.warn(
            f"evaluate: {folder} was trained on another graph or other data than the project's: it may have read the"
            " held-out prompts"
        )
    return train, provenance.get("trained", {}), is_ours


def evaluate(params: Params, graph: Graph, judged: Judged, reporter: Reporter) -> dict[str, Any]:
    """All steps of one model, and the files that they make."""
    evaluate = params.evaluate
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
    with stage_scratch("evaluate", "run") as scratch:
        root = scratch.folder.parent
        steps = Steps(graph, evaluate, params.runtime, reporter, "evaluate", root / "models")
        models = open_models(graph, judged.folder, params.runtime, reporter, "evaluate")
        load_judge = prepare_judge(
            evaluate, graph, (judged.name, SFT), params.runtime, reporter, "evaluate", root / "judgments"
        )
        work = _Work(params, graph, judged, table, reporter, steps, models, load_judge)
        metrics = work.run(cache)
        metrics["num_leaked_prompts"] = num_leaked if judged.is_of_this_data else None
        metrics |= memory_metrics(graph.machine)
        metrics["learns_log_ratio"] = judged.train.learns_log_ratio
        if judged.trained is not None:
            settings = judged.train.model_dump(include={"learning_rate", "beta", "epochs", "max_steps"})
            metrics["training"] = settings | {name: judged.trained.get(name) for name in ("num_steps", "kept_step")}
        write_json(judged.out / "metrics.json", {"evaluate": metrics})
    return metrics


def _count_leaked_prompts(held_out: TokenTable) -> int:
    """Held-out prompts that are in any training data."""
    seen: set[str] = set()
    for path in (paths.SFT_DATA / "train.parquet", paths.PREFERENCE_DATA / "train.parquet"):
        if not path.is_file():
            raise StaleArtifactError(f"{path} is missing; run: dpo-cli repro")
        seen |= prompt_ids(path)
    return sum(group in seen for group in held_out.prompts)


class _Work:
    """One evaluation: what it reads, and the steps in their order."""

    def __init__(
        self,
        params: Params,
        graph: Graph,
        judged: Judged,
        table: TokenTable,
        reporter: Reporter,
        steps: Steps,
        models: EvaluatedModels,
        load_judge: LoadJudge | None,
    ) -> None:
        self._params = params
        self._evaluate: EvaluateParams = params.evaluate
        self._runtime: RuntimeParams = params.runtime
        self._graph = graph
        self._judged = judged
        self._table = table
        self._reporter = reporter
        self._steps = steps
        self._models = models
        self._load_judge = load_judge
        evaluate = self._evaluate
        self._sampling = Sampling(evaluate.bootstrap_draws, evaluate.confidence, evaluate.seed)
        self._prompts = _prompts(table, evaluate.num_prompts)
        self._answers: dict[tuple[str, float], dict[str, Answer]] = {}
        longest = max(len(prompt.tokens) for prompt in self._prompts)
        check_context(graph.base, longest + evaluate.max_new_tokens, "evaluate.max_new_tokens + the longest prompt")

    def run(self, cache: Mapping[str, float]) -> dict[str, Any]:
        """All steps; the metrics."""
        evaluate, sampling = self._evaluate, self._sampling
        policy, reference = self._models.policy, self._models.reference
        pairs, held_out = self._held_out(cache)
        metrics = held_out_metrics(held_out, sampling) | self._perplexities()
        answers = {name: self._sample(model, evaluate.temperature) for name, model in ((SFT, reference), (DPO, policy))}
        own = self._sample(policy, 1.0)
        kls = self._steps.divergences(policy, reference, self._prompts, own)
        metrics |= {
            "num_generated_prompts": len(self._prompts),
            "temperature": evaluate.temperature,
            "max_new_tokens": evaluate.max_new_tokens,
        }
        metrics |= divergence_metrics(kls, sampling) | answer_metrics(answers)
        metrics["reward_length_correlation"] = correlation(
            [kl.k1 for kl in kls.values()], [kl.num_tokens for kl in kls.values()]
        )
        heats = self._heats(answers[DPO])
        scaled = self._scaled()
        chosen, rejected = self._data_answers()
        pairings = self._pairings(chosen, rejected, scaled)
        self._models.close()  # its memory is the judge's
        metrics["judge"] = evaluate.judge
        judge, results = self._judge_pairings(pairings)
        sources = {id: row[0] for id, row in read_columns(paths.preference_table("eval"), "source").items()}
        if judge is not None:
            metrics |= self._judged_metrics(judge, results)
        points = self._frontier(judge, results, kls, scaled)
        if points:
            metrics |= cheaper_step([(scale, kl.value, result) for scale, kl, result, _ in points if result], sampling)
        samples = self._samples(answers, kls, heats, judge, results)
        metrics |= _means(samples)
        if samples and "well_formed" in samples[0][DPO]:
            forms = [(sample[SFT]["well_formed"], sample[DPO]["well_formed"]) for sample in samples]
            metrics |= form_metrics(forms, sampling.confidence)
        if judge is not None and isinstance(judge.judge, ExactJudge):  # its rewards are 0 or 1
            metrics["win_rate_ceiling"] = 1 - metrics["reward_sft"] / 2
        curve = [
            tables.temperature_row(temperature, opponent, result)
            for (kind, temperature, opponent), result in results.items()
            if kind == "temperature"
        ]
        main = results.get(("main", evaluate.temperature, SFT))
        bins = reliability_table(np.array(held_out.margins), [row.group for row in held_out.rows], **sampling.keywords)
        out = self._judged.out
        write_json_array(out / paths.SAMPLES, samples)
        for name, columns, rows in (
            ("pairs.csv", tables.PAIRS, tables.pair_rows(held_out.rows, pairs, sources)),
            ("margins.csv", tables.MARGINS, tables.margin_rows(held_out.margins)),
            ("reliability.csv", tables.RELIABILITY, tables.reliability_rows(bins)),
            ("accuracy_by.csv", tables.ACCURACY_BY, tables.accuracy_rows(held_out.rows, pairs, sources, sampling)),
            ("temperatures.csv", tables.TEMPERATURES, curve),
            ("frontier.csv", tables.FRONTIER, [tables.frontier_row(*point) for point in points]),
            ("length.csv", tables.LENGTH, tables.length_rows(main, sampling) if main else []),
            ("votes.csv", VOTE_COLUMNS, self._votes(judge, main)),
        ):
            write_text(out / name, tables.csv_text(columns, rows))
        return metrics

    # --- what needs the models ----------------------------------------------------------------

    def _held_out(self, cache: Mapping[str, float]) -> tuple[dict[str, HeldOutPair], HeldOut]:
        """The held-out pairs under the policy, beside the cached reference."""
        groups = self._table.groups
        reference = reference_logps(cache, groups)
        scored = self._steps.token_logps(self._models.policy, groups, "scoring held-out pairs")
        sums = logp_sums(scored)
        pairs = {}
        for group in groups:
            chosen, rejected = group_keys(group)
            pairs[group.id] = HeldOutPair(
                id=group.id,
                group=group.group,
                policy=(sums[chosen], sums[rejected]),
                reference=(reference[group.id][0], reference[group.id][1]),
                num_tokens=(len(group.completions[0]), len(group.completions[1])),
            )
        beta = self._judged.train.beta
        return pairs, summarize_held_out(list(pairs.values()), beta, **self._sampling.keywords)

    def _perplexities(self) -> dict[str, float]:
        """Perplexity of held-out instruction data under each model, where there is any."""
        table = self._graph.tokenise_instructions("eval")
        if not table.groups:
            return {}
        found = {}
        for model in (self._models.base, self._models.reference, self._models.policy):
            if model is None:
                continue
            scored = self._steps.token_logps(model, table.groups, f"held-out SFT text under {model}")
            keys = [key for group in table.groups for key in group_keys(group)]
            logps = [logp for key in keys for logp in scored[key]]
            found[f"perplexity_{model.name}"] = perplexity(logps, len(logps))
        return found

    def _sample(self, model: EvaluatedModel, temperature: float) -> dict[str, Answer]:
        """A model's answers by prompt id; those that were sampled in this run are not read again."""
        key = (model.digest, temperature)
        if key not in self._answers:
            self._answers[key] = self._steps.answers(model, self._prompts, temperature)
        return self._answers[key]

    def _heats(self, answers: Mapping[str, Answer]) -> dict[str, list[tuple[str, float]]]:
        """Log pi / pi_ref of every piece of the policy's answers by prompt id, nats."""
        groups = [
            TokenGroup(prompt.id, prompt.id, prompt.tokens, (answers[prompt.id].tokens,)) for prompt in self._prompts
        ]
        ours, theirs = (
            self._steps.token_logps(model, groups, f"answers under {model}")
            for model in (self._models.policy, self._models.reference)
        )
        found = {}
        for group in groups:
            key = completion_key(group.prompt, group.completions[0])
            ratios = [a - b for a, b in zip(ours[key], theirs[key], strict=True)]
            heat, place = [], 0
            for piece in pieces_of(self._graph.tokenizer, group.completions[0]):
                end = place + len(piece.ids)
                heat.append((piece.text, round(sum(ratios[place:end]), 3)))
                place = end
            found[group.id] = heat
        return found

    def _scaled(self) -> dict[float, tuple[dict[str, Answer], dict[str, SequenceKl]]]:
        """Answers at temperature 1, and their divergences, of the model at other scales of what training changed."""
        found = {}
        for scale in self._evaluate.scales:
            model = self._models.scaled(scale)
            if model is None:
                raise DataError(
                    f"evaluate.scales has no effect on {self._judged.folder}: it is a whole model, of which it is not"
                    " known what training changed; set it to []"
                )
            answers = self._sample(model, 1.0)
            kls = self._steps.divergences(model, self._models.reference, self._prompts, answers)
            found[scale] = answers, kls
        return found

    # --- who meets whom ---------------------------------------------------------------------

    def _data_answers(self) -> tuple[Answers, Answers]:
        """The chosen and rejected answers of the first pair of each prompt, by prompt id."""
        first: dict[str, TokenGroup] = {}
        for group in sorted(self._table.groups, key=lambda group: group.id):
            first.setdefault(group.group, group)
        texts = _texts_of_pairs()
        wanted = [first[prompt.id] for prompt in self._prompts]
        chosen, rejected = (
            {
                group.group: self._judged_answer(group.group, texts[group.id][side], group.completions[side])
                for group in wanted
            }
            for side in (0, 1)
        )
        return chosen, rejected

    def _judged_answer(self, group: str, text: str, tokens: Sequence[int]) -> JudgedAnswer:
        return JudgedAnswer(group, self._table.prompts[group], text, len(tokens))

    def _candidates(self, answers: Mapping[str, Answer]) -> Answers:
        decode = self._graph.encoder.decode
        return {
            prompt.id: self._judged_answer(
                prompt.id, decode(list(answers[prompt.id].tokens)), answers[prompt.id].tokens
            )
            for prompt in self._prompts
        }

    def _pairings(
        self,
        chosen: Answers,
        rejected: Answers,
        scaled: Mapping[float, tuple[dict[str, Answer], dict[str, SequenceKl]]],
    ) -> dict[_Key, tuple[Answers, Answers]]:
        """All results by what they are for, temperature or scale, and opponent."""
        evaluate = self._evaluate
        if evaluate.judge == "none":
            return {}
        policy, reference = self._models.policy, self._models.reference
        found: dict[_Key, tuple[Answers, Answers]] = {}
        kinds = [("main", evaluate.temperature), *(("temperature", each) for each in evaluate.temperatures)]
        for kind, temperature in kinds:
            ours = self._candidates(self._sample(policy, temperature))
            for opponent in evaluate.opponents:
                theirs = chosen if opponent == "chosen" else self._candidates(self._sample(reference, temperature))
                found[kind, temperature, opponent] = ours, theirs
        if scaled:
            theirs = self._candidates(self._sample(reference, 1.0))
            found["scale", 1.0, SFT] = self._candidates(self._sample(policy, 1.0)), theirs
            for scale, (answers, _) in scaled.items():
                found["scale", scale, SFT] = self._candidates(answers), theirs
        if evaluate.judge_pairs:
            found["data", 0.0, "rejected"] = self._judged_pairs()
        return found

    def _judged_pairs(self) -> tuple[Answers, Answers]:
        """Chosen and rejected answers of the held-out pairs that the judge is tried on, by row id."""
        texts = _texts_of_pairs()
        groups = sorted(self._table.groups, key=lambda group: group.id)
        groups = groups if self._evaluate.judge_pairs < 0 else groups[: self._evaluate.judge_pairs]
        chosen, rejected = (
            {
                group.id: self._judged_answer(group.group, texts[group.id][side], group.completions[side])
                for group in groups
            }
            for side in (0, 1)
        )
        return chosen, rejected

    # --- the judge --------------------------------------------------------------------------

    def _judge_pairings(
        self, pairings: Mapping[_Key, tuple[Answers, Answers]]
    ) -> tuple[ReadyJudge | None, dict[_Key, ComparisonResult]]:
        if self._load_judge is None:
            return None, {}
        judged = [each for pair in pairings.values() for answers in pair for each in answers.values()]
        judge = self._load_judge(judged)
        found = compare_models(judge.judge, list(pairings.values()), self._reporter, "evaluate", self._sampling)
        return judge, dict(zip(pairings, found, strict=True))

    def _judged_metrics(self, judge: ReadyJudge, results: Mapping[_Key, ComparisonResult]) -> dict[str, Any]:
        temperature = self._evaluate.temperature
        main = results["main", temperature, SFT]
        metrics = {"judge_name": judge.name} | win_metrics(main, self._sampling, reads=judge.reads)
        if against := results.get(("main", temperature, "chosen")):
            metrics |= against_chosen_metrics(against)
        if tried := results.get(("data", 0.0, "rejected")):
            metrics |= judge_metrics(tried)
        return metrics

    def _frontier(
        self,
        judge: ReadyJudge | None,
        results: Mapping[_Key, ComparisonResult],
        kls: Mapping[str, SequenceKl],
        scaled: Mapping[float, tuple[dict[str, Answer], dict[str, SequenceKl]]],
    ) -> list[tuple[float, Estimate, ComparisonResult | None, float | None]]:
        """Scale, KL, result against SFT and gain in reward, from the SFT model on; empty without other scales."""
        if judge is None or not scaled:
            return []
        reward = judge.reward
        points: list[tuple[float, Estimate, ComparisonResult | None, float | None]] = [
            (0.0, Estimate(0.0, 0.0, 0.0), None, None if reward is None else 0.0)
        ]
        by_scale = {1.0: kls} | {scale: found for scale, (_, found) in scaled.items()}
        for scale in sorted(by_scale):
            result, found = results["scale", scale, SFT], by_scale[scale]
            kl = self._sampling.interval([each.exact for each in found.values()], list(found))
            gain = None
            if reward is not None:
                ours, theirs = (
                    float(np.mean([reward(each.prompt, each.text) for each in answers.values()]))
                    for answers in (result.ours, result.theirs)
                )
                gain = ours - theirs
            points.append((scale, kl, result, gain))
        return points

    def _votes(self, judge: ReadyJudge | None, main: ComparisonResult | None) -> list[tuple[Any, ...]]:
        """The judge's verdicts as votes, beside which people's can be laid; those of people are votes already.

        Identical answers are left out, as they are in a sheet for people.
        """
        if judge is None or main is None or self._evaluate.judge == "votes":
            return []
        method = self._judged.name
        rows = []
        for id, win in main.wins.items():
            if main.comparisons[id].ours_first is None:
                continue
            ours, theirs = main.ours[id], main.theirs[id]
            vote = "tie" if win == 0.5 else "A" if win > 0.5 else "B"
            rows.append((item_id(ours.prompt, ours.text, theirs.text), id, method, SFT, judge.rater, vote, method))
        return rows

    # --- rows -------------------------------------------------------------------------------

    def _samples(
        self,
        answers: Mapping[str, Mapping[str, Answer]],
        kls: Mapping[str, SequenceKl],
        heats: Mapping[str, list[tuple[str, float]]],
        judge: ReadyJudge | None,
        results: Mapping[_Key, ComparisonResult],
    ) -> list[dict[str, Any]]:
        """One row a prompt: the answers, where there is a judge who wins, and the KL in nats."""
        chosen, rejected = self._data_answers()
        temperature = self._evaluate.temperature
        main, against = (results.get(("main", temperature, opponent)) for opponent in (SFT, "chosen"))
        rows = []
        for prompt in self._prompts:
            messages = self._table.prompts[prompt.id]
            row: dict[str, Any] = {"id": prompt.id, "prompt": messages}
            for name in (SFT, DPO):
                answer = answers[name][prompt.id]
                row[name] = {
                    "text": self._graph.encoder.decode(list(answer.tokens)),
                    "num_tokens": len(answer.tokens),
                    "finished": answer.finished,
                }
            row[DPO]["heat"] = [list(piece) for piece in heats[prompt.id]]
            row |= {"chosen": chosen[prompt.id].text, "rejected": rejected[prompt.id].text}
            if judge is not None and main is not None:
                _add_judgment(row, judge, main, against, prompt.id)
            if self._evaluate.judge == "world":
                _add_form(row, messages)
            row["kl"] = kls[prompt.id].exact
            rows.append(row)
        return rows


_Key = tuple[str, float, str]
"""What a result is for (main, temperature, scale, data), the temperature or scale, and the opponent."""


def _prompts(table: TokenTable, limit: int) -> list[PromptTokens]:
    """The held-out prompts to answer, each once, in the order of their ids, which is random."""
    tokens = {group.group: group.prompt for group in table.groups}
    chosen = sorted(tokens)[: limit or None]
    return [PromptTokens(group, tokens[group]) for group in chosen]


def _texts_of_pairs() -> dict[str, tuple[str, str]]:
    """The texts of chosen and rejected answer of the held-out pairs by row id."""
    rows = read_columns(paths.preference_table("eval"), "chosen", "rejected")
    return {id: (text_of(chosen), text_of(rejected)) for id, (chosen, rejected) in rows.items()}


def _add_judgment(
    row: dict[str, Any], judge: ReadyJudge, main: ComparisonResult, against: ComparisonResult | None, id: str
) -> None:
    """Who wins; rewards of one's own kind are given less their mean, since they are fixed up to a constant a prompt."""
    if judge.reward is not None:
        ours, theirs = (judge.reward(each.prompt, each.text) for each in (main.ours[id], main.theirs[id]))
        middle = 0.0 if isinstance(judge.judge, ExactJudge) else (ours + theirs) / 2
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


def _means(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of what the judge knows of each answer: its reward, and whether it is well formed."""
    return {
        f"{figure}_{name}": float(np.mean([sample[name][figure] for sample in samples]))
        for figure in ("reward", "well_formed")
        for name in (SFT, DPO)
        if figure in samples[0][name]
    }
