"""Stage base: lock the identity of the base model; build it where it is the embedded one."""

from __future__ import annotations

from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_json, publish_folder, write_json
from dpo_cli.core.params import EMBEDDED, Params
from dpo_cli.core.progress import Reporter
from dpo_cli.core.scratch import stage_scratch
from dpo_cli.models.device import prepare_machine
from dpo_cli.models.embedded import build_embedded
from dpo_cli.models.folder import base_folder
from dpo_cli.models.identity import LOCK_NAME, library_versions, lock_model, model_files
from dpo_cli.models.load import quiet_libraries


def run(params: Params, reporter: Reporter) -> dict[str, Any]:
    """Write models/base: model.lock.json, and for the embedded model its weights and tokenizer.

    Raises:
        MachineError: The named model directory is missing or cannot be loaded safely.
    """
    quiet_libraries()
    model = params.model
    embedded = model.name == EMBEDDED
    folder = base_folder(model, params.runtime)
    prepare_machine(params.runtime)
    fingerprint = digest_json({"model": model.model_dump(), **library_versions()})
    with stage_scratch("base", fingerprint) as scratch:
        built = scratch.build_folder()
        if embedded:
            build_embedded(
                built,
                scratch.folder,
                model.seed,
                model.pretrain_steps,
                params.runtime.checkpoint_minutes * 60,
                reporter,
            )
            folder = built
        size = sum((folder / name).stat().st_size for name in model_files(folder))
        with reporter.meter("base: reading the model's files", size, "bytes") as meter:
            lock = lock_model(folder, model.name, model.revision, meter.advance)
        write_json(built / LOCK_NAME, lock)
        publish_folder(built, paths.BASE)
        scratch.clear()
    metrics = {"num_files": len(lock["files"]), "size_gib": size / 2**30}
    reporter.table(
        "base",
        [
            ("model", model.name),
            ("files", str(metrics["num_files"])),
            ("size", f"{metrics['size_gib']:.3f} GiB"),
            ("identity", (paths.BASE / LOCK_NAME).as_posix()),
        ],
    )
    return metrics
