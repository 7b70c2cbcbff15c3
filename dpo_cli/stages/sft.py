"""Stage sft: supervised fine-tuning, which gives the model that DPO starts from and refers to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_json, publish_folder
from dpo_cli.core.environment import importing, is_first_process
from dpo_cli.core.errors import DataError, StaleArtifactError
from dpo_cli.core.manifest import SFT, Manifest, library_versions
from dpo_cli.core.params import EMBEDDED, Params
from dpo_cli.core.progress import Reporter
from dpo_cli.core.scratch import Scratch, stage_scratch
from dpo_cli.data.checks import TokenView
from dpo_cli.data.tokenize import TokenTable, explain_found, explain_rejects, tokenize_table
from dpo_cli.models.adapters import (
    ADAPTER_FILES,
    adapter_size,
    add_adapter,
    save_adapter,
    size_in_words,
)
from dpo_cli.models.device import memory_in_words, prepare_machine
from dpo_cli.models.folder import adapter_folder, base_folder
from dpo_cli.models.identity import (
    base_digest,
    changed_files,
    lock_files,
    model_files,
    read_base_lock,
    read_lock,
    refuse_beyond_context,
    verify_model,
)
from dpo_cli.models.load import context_length, keep_weights_unpacked, load_model, quiet_libraries, save_tokenizer
from dpo_cli.models.rounds import figures_behind, rounds_behind
from dpo_cli.training.history import TOKEN_METRICS, write_reports

if TYPE_CHECKING:  # what computes is imported where there is something to compute
    from dpo_cli.training.parallel import Replicas

_COLUMNS = (
    "loss",
    *TOKEN_METRICS,
    "eval_loss",
    *(f"eval_{name}" for name in TOKEN_METRICS),
    "grad_norm",
    "learning_rate",
)


def run(params: Params, reporter: Reporter) -> dict[str, Any]:
    """Write models/sft: an adapter, a whole model, or a marker, as sft.method says.

    Where torchrun started several processes they share the training; the first one writes and
    reports, the others return nothing.

    Raises:
        StaleArtifactError: models/base or data/sft is missing or stale, or the adapter of sft.method adapter is another
            model's.
        DataError: No row of a split is within sft.max_length.
        MachineError: The adapter of sft.method adapter is missing, or does not fit the base model.
        Interrupted: The user asked to stop; a checkpoint is kept.
    """
    method = params.sft.method
    if method in ("none", "adapter"):
        base = base_folder(params.model, params.runtime)
        verify_model(base, read_lock())
        if not is_first_process():
            return {}
        with stage_scratch("sft", method) as scratch:
            return _publish_untrained(params, base, scratch, reporter)
    with importing():
        from dpo_cli.training.parallel import join_replicas

    quiet_libraries()
    with join_replicas(params.runtime, embedded=params.model.name == EMBEDDED) as replicas:
        return _run(params, replicas.reporter(reporter), replicas)


def _run(params: Params, reporter: Reporter, replicas: Replicas) -> dict[str, Any]:
    with importing():
        from dpo_cli.data.tokenize import all_rejects, table_digests
        from dpo_cli.models.project import Workplace, open_base
        from dpo_cli.training.fit import fit
        from dpo_cli.training.objective import SftObjective
        from dpo_cli.training.parallel import Job, shared_scratch
        from dpo_cli.training.protocols import Learner

    sft = params.sft
    base, encoder, tokenizer = open_base(params.model, params.runtime)
    digest = base_digest()
    refuse_beyond_context(context_length(base), sft.max_length, "sft.max_length")
    machine = prepare_machine(params.runtime, embedded=params.model.name == EMBEDDED)
    train, held_out = (
        tokenize_table(
            paths.SFT_DATA / f"{split}.parquet",
            ("completion",),
            TokenView(encoder, sft.max_length, sft.checks.model_dump()),
            "run: dpo-cli convert-sft",
        )
        for split in ("train", "eval")
    )
    _refuse_empty(train, held_out, sft.max_length)
    if warning := explain_rejects([train, held_out], "sft.max_length", sft.max_length):
        reporter.warn(f"sft: {warning}")
    if warning := explain_found([train, held_out]):
        reporter.warn(f"sft: {warning}")
    data = table_digests(paths.SFT_DATA)
    fingerprint = digest_json(
        {
            "base": digest,
            "data": data,
            "model": params.model.model_dump(),
            "sft": sft.model_dump(),
            "compute_dtype": machine.dtype_name,
            **library_versions(),
        }
    )
    with shared_scratch("sft", fingerprint, replicas) as scratch:
        whole = sft.method == "full"
        model = load_model(base, machine, quantization="nf4" if sft.method == "qlora" else "none", trainable=whole)
        if whole:
            model.requires_grad_(True)
        else:
            model = add_adapter(model, sft.lora, sft.seed)
            keep_weights_unpacked(model)
        work = Workplace("sft", reporter, params.runtime, machine)
        scorer, layout = work.scorer(model)
        learner, job = Learner(model, scorer, SftObjective()), Job(work, scratch.folder, replicas)
        result = fit(learner, train.groups, held_out.groups, sft, job)
        scorer.close()
        if not replicas.is_first:
            return {}
        built = scratch.build_folder()
        if whole:
            model.save_pretrained(str(built))
        else:
            save_adapter(model, built, params.model.name)
        save_tokenizer(tokenizer, encoder, built, base)
        files = model_files(built) if whole else list[str](ADAPTER_FILES)
        _write_manifest(params, built, files, {"base": digest, "data/sft": data})
        publish_folder(built, paths.SFT_MODEL)
        metrics = result.metrics("rows", (train, held_out), machine, layout) | adapter_size(model)
        metrics |= {"method": sft.method, "eval_perplexity": math.exp(min(metrics["eval_loss"], 700.0))}
        write_reports("sft", metrics, _COLUMNS, result.history, all_rejects([train, held_out]))
        scratch.clear()
    reporter.table(
        "sft",
        [
            ("method", sft.method),
            ("trained", size_in_words(metrics)),
            ("rows", f"{metrics['num_rows']} train, {metrics['num_eval']} held out"),
            ("left out", f"{metrics['num_rejected']} (listed in {paths.rejects_file('sft').as_posix()})"),
            ("steps", result.steps_in_words),
            ("held-out loss", f"{metrics['eval_loss_start']:.4f} -> {metrics['eval_loss']:.4f} nats a token"),
            *([("speed", f"{metrics['rows_per_s']:.1f} rows/s")] if metrics["rows_per_s"] else []),
            ("peak memory", memory_in_words(metrics)),
        ],
    )
    return metrics


def _publish_untrained(params: Params, base: Path, scratch: Scratch, reporter: Reporter) -> dict[str, Any]:
    """Publish what nothing is trained for: a marker for the base model as it is, or an adapter of the user's own."""
    method, built = params.sft.method, scratch.build_folder()
    metrics: dict[str, Any] = {"method": method}
    rows = [("method", "none: the base model is taken as it is")]
    files: list[str] = []
    lock = read_base_lock()
    made_of: dict[str, Any] = {"base": base_digest()}
    if method == "adapter":
        with importing():
            from dpo_cli.models.verify import copy_adapter

        quiet_libraries()
        source = adapter_folder(params.runtime)
        if changed := changed_files(lock.adapter, lock_files(source, ADAPTER_FILES)):
            raise StaleArtifactError(
                f"{source / changed[0]} is not the file that was locked; set sft.method to"
                " adapter in params.yaml, then run: dpo-cli base"
            )
        rounds = rounds_behind(source, lock, reporter)
        metrics |= copy_adapter(source, base, built, params.model.name)
        files = [*ADAPTER_FILES]
        rows = [("method", f"adapter: {source} is taken as it is"), ("adapter", size_in_words(metrics))]
        if rounds:
            made_of["rounds"], metrics["rounds"] = rounds, figures_behind(source, rounds)
            rows.append(("round", f"{len(rounds) + 1}, after {', '.join(each['project'] for each in rounds)}"))
    _write_manifest(params, built, files, made_of)
    publish_folder(built, paths.SFT_MODEL)
    scratch.clear()
    write_reports("sft", metrics, _COLUMNS)
    reporter.table("sft", rows)
    return metrics


def _write_manifest(params: Params, built: Path, files: list[str], made_of: dict[str, Any]) -> None:
    settings = {"model": params.model.model_dump(), "sft": params.sft.model_dump()}
    SFT.write(built, Manifest(made_of, settings=settings), files)


def _refuse_empty(train: TokenTable, held_out: TokenTable, max_length: int) -> None:
    for split, table in (("train", train), ("eval", held_out)):
        if not table.groups and not table.rejects:
            raise StaleArtifactError(f"data/sft/{split}.parquet has no rows; run: dpo-cli convert-sft")
        if not table.groups:
            raise DataError(f"data/sft/{split}.parquet: {explain_rejects([table], 'sft.max_length', max_length)}")
