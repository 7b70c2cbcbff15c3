"""Stage evaluate: is the tuned model better, by how much, how surely, and at what cost.

Steps follow one another, each keyed by what it depends on: log-probabilities, answers, divergences
(:mod:`dpo_cli.evaluation.steps`), judgments (:mod:`dpo_cli.judging.cache`), then metrics and
tables, which are functions of them. Stage report draws the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.core import paths
from dpo_cli.core.artifacts import read_json, write_json, write_json_array
from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.core.manifest import DPO as DPO_MODEL
from dpo_cli.core.manifest import PPO as PPO_MODEL
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter
from dpo_cli.core.scratch import stage_scratch
from dpo_cli.data.tokenize import read_columns
from dpo_cli.evaluation import DPO, SFT, tables
from dpo_cli.evaluation.measurement import (
    Measurement,
    frontier,
    judge_pairings,
    judged_metrics,
    make_pairings,
    read_held_out,
)
from dpo_cli.evaluation.metrics import (
    answer_metrics,
    answer_reward_metrics,
    cheaper_step,
    correlation,
    divergence_metrics,
    form_metrics,
    held_out_metrics,
)
from dpo_cli.evaluation.models import Evaluated, count_leaked_prompts, open_models, settings_of, training_of
from dpo_cli.evaluation.rewards import pair_losses
from dpo_cli.evaluation.verdict import report_verdict
from dpo_cli.judging.prepare import LoadJudge, prepare_judge
from dpo_cli.judging.votes import COLUMNS as VOTE_COLUMNS
from dpo_cli.models.device import memory_metrics
from dpo_cli.models.load import quiet_libraries
from dpo_cli.models.project import Project, open_project
from dpo_cli.scoring.reference import read_cache
from dpo_cli.statistics.calibration import reliability_table
from dpo_cli.statistics.intervals import Sampling


def run(params: Params, reporter: Reporter) -> dict[str, Any]:
    """Write reports/evaluate.

    Raises:
        StaleArtifactError: Something an earlier stage made is missing, damaged or of another graph.
        DataError: A held-out prompt is in the training data, or the judge has no verdict on too many answers.
        Interrupted: The user asked to stop; what was computed is kept.
    """
    quiet_libraries()
    project = open_project(params, reporter, "evaluate")
    manifest = DPO_MODEL.check(project.made_of())
    train = settings_of(manifest, paths.DPO_MODEL)
    evaluated = Evaluated(paths.DPO_MODEL, DPO, train, paths.report_dir("evaluate"), trained=manifest.facts)
    metrics = _evaluate(params, project, evaluated, reporter)
    report_verdict(metrics, reporter, of="evaluate")
    return metrics


def evaluate_model(
    params: Params, folder: Path, out: Path, reporter: Reporter, *, beta_given: bool = False
) -> dict[str, Any]:
    """Judge an adapter or a whole model that need not be this project's, and write its files to a folder.

    Its beta is that of its provenance.json, else of section train; for a policy of stage ppo that is a unit alone.

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
    project = open_project(params, reporter, "evaluate")
    models = open_models(project, folder)
    known = read_json(out / paths.MODEL_SETTINGS, "") if (out / paths.MODEL_SETTINGS).is_file() else {}
    if known and known.get("policy") != models.policy.digest:
        raise ParamsError(f"{out} holds the evaluation of another model; name another folder: --out")
    settings: dict[str, Any] = {name: getattr(params, name).model_dump() for name in ("model", "reference", "evaluate")}
    settings |= {"name": folder.resolve().name, "policy": models.policy.digest}
    train, trained, is_ours = training_of(folder, params.train, project, reporter)
    if trained is not None:
        if beta_given:
            raise ParamsError(f"--set train.* has no effect on {folder}: its provenance.json says how it was trained")
        settings["train"] = train.model_dump()
    has_beta = not (folder / PPO_MODEL.name).is_file()
    evaluated = Evaluated(folder, settings["name"], train, out, is_ours, trained, has_beta)
    metrics = _evaluate(params, project, evaluated, reporter)
    write_json(out / paths.MODEL_SETTINGS, settings)
    report_verdict(metrics, reporter, of=str(folder), also=[("files", out.as_posix())])
    return metrics


def _evaluate(params: Params, project: Project, evaluated: Evaluated, reporter: Reporter) -> dict[str, Any]:
    """All steps of one model, and the files that they make."""
    evaluate = params.evaluate
    held_out = read_held_out(project)
    num_leaked = count_leaked_prompts(held_out.prompts)
    if num_leaked:
        raise DataError(
            f"{num_leaked} held-out prompts are in the training data; run: dpo-cli convert-sft, convert-preferences"
        )
    cache = read_cache(paths.REFERENCE, project.identity)
    with stage_scratch("evaluate", "run") as scratch:
        root = scratch.folder.parent
        models = open_models(project, evaluated.folder)
        load_judge = prepare_judge(evaluate, project, (evaluated.name, SFT), root / "judgments")
        measurement = Measurement(project, held_out, evaluate, models, root / "models")
        metrics = _measure(measurement, cache, evaluated, load_judge, reporter)
        metrics["num_leaked_prompts"] = num_leaked if evaluated.is_of_this_data else None
        metrics |= memory_metrics(project.machine)
        metrics["learns_log_ratio"] = evaluated.has_beta and evaluated.train.learns_log_ratio
        if evaluated.trained is not None:
            settings = evaluated.train.model_dump(include={"learning_rate", "beta", "epochs", "max_steps"})
            metrics["training"] = settings | {name: evaluated.trained.get(name) for name in ("num_steps", "kept_step")}
        write_json(evaluated.out / "metrics.json", {"evaluate": metrics})
    return metrics


def _measure(
    measurement: Measurement,
    cache: Mapping[str, float],
    evaluated: Evaluated,
    load_judge: LoadJudge | None,
    reporter: Reporter,
) -> dict[str, Any]:
    """All steps in their order, the tables that they make, and the metrics."""
    evaluate, models = measurement.evaluate, measurement.models
    sampling = Sampling(evaluate.bootstrap_draws, evaluate.confidence, evaluate.seed)
    # held-out pairs, single answers and text
    pairs = measurement.pairs(cache, evaluated.train.beta)
    losses = pair_losses(pairs, evaluated.train.beta) if pairs else []
    metrics = held_out_metrics(pairs, losses, sampling) if pairs else {}
    single, is_good = measurement.single_answers(cache, evaluated.train.beta)
    if single:
        metrics |= answer_reward_metrics(single, is_good, evaluated.train, sampling)
    metrics |= measurement.perplexities()
    # answers, and how far the policy went
    answers = {
        name: measurement.sampled(model, evaluate.temperature)
        for name, model in ((SFT, models.reference), (DPO, models.policy))
    }
    kls = measurement.divergences(models.policy, models.reference, measurement.sampled(models.policy, 1.0))
    metrics |= {
        "num_generated_prompts": len(measurement.prompts),
        "temperature": evaluate.temperature,
        "max_new_tokens": evaluate.max_new_tokens,
    }
    metrics |= divergence_metrics(kls, sampling) | answer_metrics(answers)
    metrics["reward_length_correlation"] = correlation(
        [kl.k1 for kl in kls.values()], [kl.num_tokens for kl in kls.values()]
    )
    log_ratios = measurement.log_ratios(answers[DPO])
    scaled = measurement.scaled(evaluated.folder)
    # comparisons
    data = measurement.data_answers()
    pairings = make_pairings(measurement, data[0], scaled)
    models.close()  # its memory is the judge's
    metrics["judge"] = evaluate.judge
    judge, results = judge_pairings(load_judge, pairings, reporter, sampling)
    if judge is not None:
        metrics |= judged_metrics(judge, results, evaluate.temperature, sampling)
    points = frontier(judge, results, kls, scaled, sampling)
    if points:
        metrics |= cheaper_step([(scale, kl.value, result) for scale, kl, result, _ in points if result], sampling)
    main, against = (results.get(("main", evaluate.temperature, opponent)) for opponent in (SFT, "chosen"))
    judged = tables.Judged(judge, main, against)
    samples = tables.sample_rows(measurement, answers, data, kls, log_ratios, judged)
    metrics |= tables.sample_means(samples)
    if samples and "well_formed" in samples[0][DPO]:
        forms = [(sample[SFT]["well_formed"], sample[DPO]["well_formed"]) for sample in samples]
        metrics |= form_metrics(forms, sampling.confidence)
    if judge is not None and judge.is_exact:  # its rewards are 0 or 1
        metrics["win_rate_ceiling"] = 1 - metrics["reward_sft"] / 2
    # tables
    sources = {id: row[0] for id, row in read_columns(paths.preference_table("eval"), "source").items()}
    margins = [pair.margin for pair in pairs]
    bins = reliability_table(np.array(margins), [pair.group for pair in pairs], sampling) if pairs else []
    curve = [
        tables.temperature_row(temperature, opponent, result)
        for (kind, temperature, opponent), result in results.items()
        if kind == "temperature"
    ]
    out = evaluated.out
    write_json_array(out / paths.SAMPLES, samples)
    for name, columns, rows in (
        ("pairs.csv", tables.PAIRS, tables.pair_rows(pairs, losses, sources)),
        ("margins.csv", tables.MARGINS, tables.margin_rows(margins) if pairs else []),
        ("reliability.csv", tables.RELIABILITY, tables.reliability_rows(bins)),
        ("accuracy_by.csv", tables.ACCURACY_BY, tables.accuracy_rows(pairs, sources, sampling) if pairs else []),
        ("temperatures.csv", tables.TEMPERATURES, curve),
        ("frontier.csv", tables.FRONTIER, [tables.frontier_row(*point) for point in points]),
        ("length.csv", tables.LENGTH, tables.length_rows(main, sampling) if main else []),
        ("votes.csv", VOTE_COLUMNS, tables.vote_rows(judged, evaluated.name)),
    ):
        tables.write_table(out / name, columns, rows)
    return metrics
