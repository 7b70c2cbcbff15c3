"""Stage base: verify the base model and lock its identity; build it where it is the embedded one.

It runs at every repro, before anything else, since DVC cannot see a model outside of the project. So a run that finds
all as it was writes nothing and imports no torch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_json, publish_folder
from dpo_cli.core.environment import refuse_several_processes
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.manifest import BASE, library_versions
from dpo_cli.core.params import EMBEDDED, ModelParams, Params
from dpo_cli.core.progress import Reporter
from dpo_cli.core.scratch import Scratch, stage_scratch
from dpo_cli.models.adapters import refuse_targets, without_numbers
from dpo_cli.models.folder import ADAPTER_FILES, adapter_folder, base_folder, total_size, weight_files
from dpo_cli.models.identity import (
    BaseLock,
    ModelFacts,
    changed_files,
    lock_files,
    lock_model,
    model_files,
    read_base_lock,
    refuse_beyond_context,
    verify_model,
)


def run(params: Params, reporter: Reporter) -> dict[str, Any]:
    """Write models/base: model.lock.json, and for the embedded model its weights and tokenizer.

    Raises:
        MachineError: The named model directory is missing, or holds no model that can be tuned; or several
            processes were started.
        ParamsError: A setting does not go with the model.
    """
    refuse_several_processes()
    model = params.model
    folder = base_folder(model, params.runtime)
    with stage_scratch("base", digest_json({"model": model.model_dump(), **library_versions()})) as scratch:
        before = _locked()
        if model.name == EMBEDDED:
            lock = _unchanged(before, model, reporter) or _build_embedded(params, scratch, reporter)
        else:
            lock = _verify_folder(folder, before, model, scratch, reporter)
        # not of the base model, but from outside of the project, too: so repro sees it change
        adapter = lock_files(adapter_folder(params.runtime), ADAPTER_FILES) if params.sft.method == "adapter" else {}
        if adapter != lock.adapter:
            lock = replace(lock, adapter=adapter)
            lock.write(paths.BASE)
        scratch.clear()
    _refuse_misfits(params, lock.facts)
    metrics = {
        "num_files": len(lock.files),
        "size_gib": sum((folder / name).stat().st_size for name in lock.files) / 2**30,
    }
    reporter.table(
        "base",
        [
            ("model", model.name),
            ("files", str(metrics["num_files"])),
            ("size", f"{metrics['size_gib']:.3f} GiB"),
            ("identity", (paths.BASE / BASE.name).as_posix()),
        ],
    )
    return metrics


def _locked() -> BaseLock | None:
    """What models/base holds, where it holds anything that can be read."""
    try:
        return read_base_lock()
    except StaleArtifactError:
        return None


def _publish(lock: BaseLock, built: Path) -> BaseLock:
    lock.write(built)
    publish_folder(built, paths.BASE)
    return lock


# --- a directory of the user's ------------------------------------------------------------


def _verify_folder(
    folder: Path, before: BaseLock | None, model: ModelParams, scratch: Scratch, reporter: Reporter
) -> BaseLock:
    """Lock a model directory, verified where anything about it is new."""
    settings = model.model_dump()
    size = sum((folder / name).stat().st_size for name in model_files(folder))
    with reporter.meter("base: reading the model's files", size, "bytes") as meter:
        identity = lock_model(folder, model.name, model.revision, meter.advance)
    if before is not None and (before.identity, before.settings) == (identity, settings):
        return before
    # here: they take seconds, and only a model that is new or changed needs them
    from dpo_cli.models.load import quiet_libraries
    from dpo_cli.models.verify import verify_model_folder, verify_numbers

    quiet_libraries()
    found = verify_model_folder(folder, model)
    known = before.files if before is not None else {}
    changed = changed_files(known, identity["files"])
    files = [path for path in weight_files(folder) if path.name not in known.keys() - changed]
    with reporter.meter("base: looking for NaN and infinity", total_size(files), "bytes") as meter:
        verify_numbers(files, meter.advance)
    for note in found.notes:
        reporter.warn(f"base: {note}")
    if changed and before is not None and (before.name, before.revision) == (model.name, model.revision):
        more = f" and {len(changed) - 1} more files" if len(changed) > 1 else ""
        reporter.warn(
            f"base: {folder / changed[0]}{more} changed since the model was locked; what was made of it is stale, and"
            " repro makes it again"
        )
    return _publish(BaseLock(identity, settings, found.weights.facts), scratch.build_folder())


# --- the embedded model -------------------------------------------------------------------


def _unchanged(before: BaseLock | None, model: ModelParams, reporter: Reporter) -> BaseLock | None:
    """The lock of the embedded model, where models/base holds the very one that is asked for."""
    if before is None or before.settings != model.model_dump():
        return None
    try:
        verify_model(paths.BASE, before.identity)
    except StaleArtifactError as error:
        reporter.warn(f"base: {str(error).partition(';')[0]}; it is built again")
        return None
    return before


def _build_embedded(params: Params, scratch: Scratch, reporter: Reporter) -> BaseLock:
    # here: they take seconds, and only a model that is to be built needs them
    from dpo_cli.models.device import prepare_machine
    from dpo_cli.models.load import quiet_libraries
    from dpo_cli.models.project import Workplace
    from dpo_cli.models.verify import verify_model_folder
    from dpo_cli.training.parallel import Job
    from dpo_cli.training.pretraining import build_embedded

    quiet_libraries()
    machine = prepare_machine(params.runtime, embedded=True)
    model, built = params.model, scratch.build_folder()
    quiet = params.runtime.model_copy(update={"tensorboard": False})
    job = Job(Workplace("base", reporter, quiet, machine), scratch.folder)
    build_embedded(built, model.seed, model.pretrain_steps, job)
    identity = lock_model(built, model.name, model.revision, lambda _: None)
    return _publish(BaseLock(identity, model.model_dump(), verify_model_folder(built).weights.facts), built)


def _refuse_misfits(params: Params, facts: ModelFacts) -> None:
    """Refuse settings of later stages that this model cannot serve."""
    if params.sft.method not in ("none", "adapter"):
        refuse_beyond_context(facts.context_length, params.sft.max_length, "sft.max_length")
    refuse_beyond_context(facts.context_length, params.reference.max_length, "reference.max_length")
    made_by_sft = params.sft.method in ("lora", "qlora")
    adapters = {
        "sft.lora": params.sft.lora if made_by_sft else None,
        "train.lora": params.train.lora,
        "reward.lora": params.reward.lora if params.reward.loss != "none" else None,
    }
    for setting, lora in adapters.items():
        if lora is not None:
            names = [without_numbers(name) for name in lora.target_modules]
            refuse_targets(names, facts.layers, facts.tied_layers, setting)
