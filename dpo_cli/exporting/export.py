"""Export the trained model: every form is built aside, reloaded, held against what was trained, and moved whole."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import publish_folder, read_json, write_json, write_text
from dpo_cli.core.errors import MachineError, ParamsError
from dpo_cli.core.manifest import DPO
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter
from dpo_cli.core.scratch import stage_scratch
from dpo_cli.exporting.cards import card_of, recommend
from dpo_cli.exporting.gguf_model import KINDS
from dpo_cli.exporting.gguf_targets import K_QUANTS, Gguf, GgufLora, find_quantizer
from dpo_cli.exporting.held_out import in_percent, open_held_out
from dpo_cli.exporting.targets import Adapter, Found, Merged, Target, Trained
from dpo_cli.exporting.vllm import problems_for_vllm, vllm_command
from dpo_cli.models.folder import total_size
from dpo_cli.models.importing import DTYPES
from dpo_cli.models.load import load_config, quiet_libraries
from dpo_cli.models.project import open_project

FIGURES = "export.json"
TARGETS: dict[str, type[Target]] = {
    "adapter": Adapter,
    "merged-nf4": Merged,
    "merged": Merged,
    **{f"gguf-{kind}": Gguf for kind in (*KINDS, *K_QUANTS)},
    "gguf-lora": GgufLora,
}
"""Every form, by its name."""


@dataclass(frozen=True)
class ExportOptions:
    """What is exported, and what is asked of it.

    Attributes:
        adapter: Folder of the adapter.
        to: Names in TARGETS; empty: the adapter, and the whole model merged into the weights that it was trained on.
        num_pairs: Held-out pairs to score.
        max_nats: Nats a token that an export may be away from the trained model, on average.
        min_kept: Share of the tuned margin that an export must keep.
        dtype: Of merged weights, a name in DTYPES; None: the base model's where it has 16 bits, else float16.
        serve_with: ``vllm``: whether that takes the adapter.
    """

    adapter: Path = paths.DPO_MODEL
    to: tuple[str, ...] = ()
    num_pairs: int = 64
    max_nats: float = 0.25
    min_kept: float = 0.8
    dtype: str | None = None
    serve_with: str | None = None


@dataclass(frozen=True)
class Exported:
    """A form that was built.

    Attributes:
        name: Of the form.
        what: What it is, one sentence.
        folder: Where it is; None where it was refused.
        size: Bytes.
        found: What was found of it.
    """

    name: str
    what: str
    folder: Path | None
    size: int
    found: Found

    def figures(self) -> dict[str, Any]:
        """As JSON."""
        found = self.found
        survival = found.survival.figures() if found.survival else {}
        done = {"done": self.folder is not None, "what": self.what, "size_bytes": self.size}
        return done | survival | {"problems": found.problems, "notes": found.notes}

    def rows(self) -> list[tuple[str, str]]:
        """As a table."""
        rows = [("what", self.what), ("size", f"{self.size / 2**20:.1f} MiB")]
        rows += self.found.survival.rows() if self.found.survival else []
        rows += [("REFUSED", problem) for problem in self.found.problems]
        return rows + ([("folder", self.folder.as_posix())] if self.folder else [])


def export_model(
    out: Path, options: ExportOptions, params: Params, reporter: Reporter
) -> tuple[list[Exported], str | None]:
    """Export the trained model.

    Returns:
        Every form that was asked for, and the sentence that recommends one; None where none was made.

    Raises:
        ParamsError: An option is unknown or has no effect, or a form is in ``out`` already.
        StaleArtifactError: There is no trained model, or it was trained on another base model or another graph.
        DataError: No pair is held out.
        Interrupted: The user asked to stop; what was scored is kept.
    """
    _refuse_unknown(out, options)
    with open_trained(options, params, reporter) as trained:
        names = options.to or ("adapter", "merged-nf4" if trained.is_4bit else "merged")
        if "merged-nf4" in names and not trained.is_4bit:
            raise ParamsError(
                "--to merged-nf4 has no effect: the model was trained on plain weights (reference.quantization); say"
                " --to merged, which is what was trained"
            )
        exported = [_export(TARGETS[name](trained, name), out / name, options) for name in dict.fromkeys(names)]
    recommended = recommend(exported)
    _write_figures(out, exported, recommended, options)
    return exported, recommended


@contextmanager
def open_trained(options: ExportOptions, params: Params, reporter: Reporter) -> Iterator[Trained]:
    """The trained model, scored on held-out pairs; see :func:`export_model` for what is raised."""
    quiet_libraries()
    project = open_project(params, reporter, "export")
    DPO.check({"graph": project.identity}, options.adapter)
    with stage_scratch("export", "run") as scratch:
        rows = scratch.folder.parent / "models"
        held_out = open_held_out(project, options.adapter, options.num_pairs, params.evaluate, rows)
        dtype = options.dtype or _dtype_of(project.base)
        yield Trained(project, params.model.name, options.adapter, held_out, dtype, scratch.build_folder())
        scratch.clear()


def _refuse_unknown(out: Path, options: ExportOptions) -> None:
    problems = [
        f"--to {name} is not known; there are {', '.join(TARGETS)}" for name in options.to if name not in TARGETS
    ]
    problems += [
        f"{out / name} is there already; name another folder (--out), or delete it"
        for name in options.to
        if (out / name).exists()
    ]
    if options.dtype is not None and options.dtype not in DTYPES:
        problems.append(f"--dtype must be one of {', '.join(DTYPES)}, got {options.dtype!r}")
    if options.dtype is not None and options.to and not {"merged", "merged-nf4"} & {*options.to}:
        problems.append("--dtype has no effect: it is of merged weights (--to merged, merged-nf4)")
    if options.serve_with not in (None, "vllm"):
        problems.append(f"--for must be vllm, got {options.serve_with!r}")
    if options.serve_with and options.to and "adapter" not in options.to:
        problems.append("--for vllm has no effect: it checks the adapter (--to adapter)")
    if out.exists() and not out.is_dir():
        problems.append(f"--out {out} is a file; name a folder")
    if problems:
        raise ParamsError(problems)
    if wanted := [name for name in options.to if name.removeprefix("gguf-") in K_QUANTS and not find_quantizer()]:
        raise MachineError(
            f"--to {wanted[0]}: no llama-quantize is on the PATH, which makes K-quants; build llama.cpp and put it"
            " there, or take gguf-q4_1 or gguf-q8_0"
        )


def _dtype_of(base: Path) -> str:
    named = str(getattr(load_config(base), "dtype", None)).removeprefix("torch.")
    return named if named in ("bfloat16", "float16") else "float16"


def _export(target: Target, place: Path, options: ExportOptions) -> Exported:
    """Build one form, check it, and move it onto its place if it is right."""
    if place.exists():
        raise ParamsError(f"{place} is there already; name another folder (--out), or delete it")
    reporter = target.trained.project.reporter
    built = target.trained.work / target.name
    built.mkdir()
    reporter.say(f"export: {target.name}: {target.what}")
    try:
        notes = target.build(built)
        found = judge(target, built, options)
        found.notes[:0] = notes
    except MachineError as error:
        found = Found(problems=error.problems)
    size = total_size([path for path in built.rglob("*") if path.is_file()])
    for note in found.notes:
        reporter.warn(f"export: {target.name}: {note}")
    if found.problems:
        shutil.rmtree(built)
        return Exported(target.name, target.what, None, size, found)
    exported = Exported(target.name, target.what, place, size, found)
    write_text(built / "README.md", card_of(exported, target.trained.name, built))
    publish_folder(built, place)
    return exported


def judge(target: Target, built: Path, options: ExportOptions) -> Found:
    """Reload what was built, and say by its numbers and by name whether it is the trained model."""
    found = target.check(built)
    if target.name == "adapter" and options.serve_with:
        problems = problems_for_vllm(built)
        found.problems += [f"vLLM would not serve it: {problem}" for problem in problems]
        if not problems:
            found.notes.append(f"vLLM takes it: {vllm_command(built)}")
    survival = found.survival
    if survival is None:
        return found
    kept, numbers = survival.margin_kept, []
    if not survival.mean_nats <= options.max_nats:
        numbers.append(
            f"its log-probabilities are {survival.mean_nats:.3g} nats a token away from the trained model's, more than"
            f" --max-nats {options.max_nats:g}"
        )
    if math.isnan(kept.value):
        found.notes.append("all of the trained model's margins are 0, so nothing says how much of them is kept")
    elif not options.min_kept <= kept.value <= 1 / options.min_kept:
        side = "more" if kept.value > 1 else "less"
        bound = 1 / options.min_kept if kept.value > 1 else options.min_kept
        doubt = "; more --pairs would tell, the interval holds the bound" if kept.low < bound < kept.high else ""
        numbers.append(f"it has {in_percent(kept)} of the tuned margin, {side} than {bound:.0%} (--min-kept){doubt}")
    if numbers:
        found.problems += target.name_weights(built)
    found.problems += numbers
    return found


def _write_figures(out: Path, exported: Sequence[Exported], recommended: str | None, options: ExportOptions) -> None:
    """Add what was found to what is known of other forms in the folder."""
    out.mkdir(parents=True, exist_ok=True)
    place = out / FIGURES
    known = read_json(place, "delete it").get("targets", {}) if place.is_file() else {}
    bounds = {"max_nats": options.max_nats, "min_kept": options.min_kept}
    targets = known | {each.name: each.figures() for each in exported}
    write_json(place, {"bounds": bounds, "targets": targets, "recommended": recommended})
