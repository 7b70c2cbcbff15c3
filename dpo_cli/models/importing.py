"""Import a model: from GGUF, the Hub's cache, pickled weights or a multimodal checkpoint to an ordinary folder.

Whatever the source, what is written is config.json, safetensors weights, a tokenizer and the license, and it is loaded
and asked a question before it is put in its place. No code of the source is run and nothing is fetched.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from dpo_cli.core.artifacts import publish_folder, sha256_file
from dpo_cli.core.errors import MachineError, ParamsError
from dpo_cli.core.progress import Reporter
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.models.describe import ModelDescription, describe_model, license_files
from dpo_cli.models.folder import (
    INDEX,
    check_model_folder,
    copy_bytes,
    refuse_pointer,
    total_size,
    weight_files,
)
from dpo_cli.models.gguf_file import GgufFile, find_pieces, is_gguf, read_pieces
from dpo_cli.models.gguf_model import model_of_gguf, tokenizer_of_gguf
from dpo_cli.models.identity import model_files
from dpo_cli.models.load import in_words, load_as_it_is, load_config, load_tokenizer
from dpo_cli.models.rebuild import TOKENIZER_FILES, build_text_part, pickles_of, save_checked_tokenizer, unpickle
from dpo_cli.models.verify import verify_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FOREIGN = {
    "params.json": "Meta's or Mistral's own",
    "model.ckpt.index": "TensorFlow's",
    "flax_model.msgpack": "Flax's",
}


@dataclass(frozen=True)
class Source:
    """Where a model is imported from.

    Attributes:
        name: What it is called in messages and in the table.
        kind: What it was found to be, in words.
        pieces: Its GGUF files, if it is of that kind; else its ``folder`` is given.
        revision: Where the Hub's cache names one.
    """

    name: Path
    kind: str
    pieces: tuple[Path, ...] = ()
    folder: Path | None = None
    revision: str | None = None


@dataclass(frozen=True)
class GgufOptions:
    """What is chosen for a GGUF file alone.

    Attributes:
        dtype: Of the dequantized weights, a name in :data:`DTYPES`; None: float32, which is exact.
        tokenizer: The folder of a tokenizer to take in place of the file's.
    """

    dtype: str | None = None
    tokenizer: Path | None = None


def import_model(
    given: Sequence[Path], out: Path, options: GgufOptions, reporter: Reporter
) -> tuple[Source, ModelDescription]:
    """Make an ordinary model folder, whole or not at all.

    ``given`` is a file or folder, or the pieces of a GGUF file in their order.

    Raises:
        MachineError: The source is no model that can be imported, damaged, or another model than it says.
        ParamsError: ``out`` is in use, or an option is unknown or has no effect.
    """
    if options.dtype is not None and options.dtype not in DTYPES:
        raise ParamsError(f"--dtype must be one of {', '.join(DTYPES)}, got {options.dtype!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ParamsError(f"--out {out} exists already; name a folder that does not, or delete it first")
    source = find_source(given)
    if not source.pieces and (options.dtype or options.tokenizer):
        option = "--dtype" if options.dtype else "--tokenizer"
        raise ParamsError(f"{option} has no effect on {source.kind}: it is for GGUF files")
    work = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.tmp")
    built = work / "model"
    try:
        built.mkdir(parents=True)
        if source.pieces:
            notes = _build_from_gguf(source, built, work, options, reporter)
        else:
            notes = _build_from_folder(source, built, work, reporter)
        description = describe_model(built, reporter, "import")
        publish_folder(built, out)
    except MachineError as error:
        problems = [each.replace(str(built), str(source.name)) for each in error.problems]
        raise MachineError([each.replace(str(work), str(source.name)) for each in problems]) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return source, ModelDescription(description.table, description.figures, (*notes, *description.notes))


# --- what it is ---------------------------------------------------------------------------


def find_source(given: Sequence[Path]) -> Source:
    """What was given.

    Raises:
        MachineError: It is missing, or nothing that is known.
    """
    for path in given:
        if not path.exists():
            raise MachineError(f"{path} is missing")
    path = given[0]
    if len(given) > 1:
        if folder := next((each for each in given if each.is_dir()), None):
            raise MachineError(
                f"{folder} is a folder: several sources are the pieces of one GGUF file; give one folder"
            )
        return Source(path, f"a GGUF file in {len(given)} pieces", tuple(given))
    if path.is_file():
        return _source_of_file(path)
    snapshot = _snapshot(path)
    if snapshot != path:
        return _source_of_folder(path, snapshot, "the Hub's cache")
    in_cache = path.absolute().parent.name == "snapshots"
    return _source_of_folder(path, path, "the Hub's cache" if in_cache else "a folder")


def _source_of_file(path: Path) -> Source:
    pieces = find_pieces(path)
    if not is_gguf(pieces[0]):
        refuse_pointer(path)
        hint = "; give the folder that it lies in" if path.suffix in (".safetensors", ".bin", ".pt", ".pth") else ""
        raise MachineError(f"{path} is no GGUF file: it does not begin with the letters GGUF{hint}")
    more = f" in {len(pieces)} pieces" if len(pieces) > 1 else ""
    return Source(path, f"a GGUF file{more}", tuple(pieces))


def _snapshot(folder: Path) -> Path:
    """The snapshot in a folder of the Hub's cache; any other folder is itself.

    Raises:
        MachineError: There is none, or one of several would have to be chosen.
    """
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return folder
    found = sorted(path for path in snapshots.iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    if main.is_file() and (named := snapshots / main.read_text(encoding="utf-8").strip()) in found:
        return named
    if len(found) == 1:
        return found[0]
    names = ", ".join(str(path) for path in found[:5])
    raise MachineError(
        f"{folder} holds {len(found)} snapshots and refs/main names none of them; give one"
        + (f": {names}" if found else ", or fetch the model again")
    )


def _source_of_folder(name: Path, folder: Path, kind: str) -> Source:
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists():
            raise MachineError(f"{path} points to {path.readlink()}, which is missing: the download is not complete")
    revision = folder.absolute().name if kind != "a folder" else None
    if (folder / "config.json").is_file():
        return Source(name, kind, folder=folder, revision=revision)
    gguf = sorted(path for path in folder.iterdir() if path.is_file() and path.stat().st_size and is_gguf(path))
    models = [path for path in gguf if not path.name.startswith("mmproj")]
    if models and all(path in find_pieces(models[0]) for path in models):
        return Source(name, f"a GGUF file in {kind}", tuple(find_pieces(models[0])), revision=revision)
    if models:
        raise MachineError(
            f"{name} holds {len(models)} GGUF files; give one of them: {', '.join(path.name for path in models[:10])}"
        )
    for file, whose in _FOREIGN.items():
        if (folder / file).is_file():
            raise MachineError(
                f"{name} is in {whose} format ({file}), which is not read; fetch the model in Hugging Face's layout"
            )
    raise MachineError(f"{name} has no config.json and no GGUF file: it holds no model that can be imported")


# --- GGUF ---------------------------------------------------------------------------------


def _build_from_gguf(
    source: Source, built: Path, work: Path, options: GgufOptions, reporter: Reporter
) -> tuple[str, ...]:
    dtype = options.dtype or "float32"
    joined = work / "joined.gguf"
    file = read_pieces(source.pieces, joined, reporter)
    full = joined if joined.is_file() else source.pieces[0]
    if options.tokenizer is None:
        tokenizer = tokenizer_of_gguf(file, full)
    else:
        tokenizer = load_tokenizer(options.tokenizer)
        _refuse_other_tokenizer(file, tokenizer, options.tokenizer)
    config_files = work / "weights"
    config_files.mkdir()
    made, notes = model_of_gguf(file, config_files, DTYPES[dtype], reporter)
    joined.unlink(missing_ok=True)
    made.generation_config = _generation_config(made.config, tokenizer, file)
    made.save_pretrained(built)
    save_checked_tokenizer(tokenizer, built, made.config)
    _keep_license_of_gguf(source, file, built, dtype)
    return notes


def _generation_config(config: Any, tokenizer: Any, file: GgufFile) -> GenerationConfig:
    """Where generation stops: at the end of a text or a turn, by the file and by its template."""
    ends = {tokenizer.eos_token_id, file.metadata.get("tokenizer.ggml.eot_token_id")} - {None}
    if tokenizer.chat_template:
        with suppress(MachineError):  # told with the description
            ends |= set(ChatEncoder(tokenizer).stop_ids)
    found = sorted(ends)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=found[0] if len(found) == 1 else found or None,
        pad_token_id=tokenizer.pad_token_id,
    )


def _refuse_other_tokenizer(file: GgufFile, tokenizer: Any, folder: Path) -> None:
    """Refuse a tokenizer whose tokens have other numbers than the file's."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    vocabulary = tokenizer.get_vocab()
    if not isinstance(tokens, list):
        return
    known = {token: number for number, token in enumerate(tokens)}
    moved = next((token for token, number in vocabulary.items() if known.get(token, number) != number), None)
    if moved is not None or len(vocabulary.keys() & known.keys()) < 0.9 * len(known):
        what = f"{moved!r} has the number {vocabulary[moved]}, not {known[moved]}" if moved else "it has other tokens"
        raise MachineError(f"--tokenizer {folder}: it is not the tokenizer of {file.path}: {what}")


def _keep_license_of_gguf(source: Source, file: GgufFile, built: Path, dtype: str) -> None:
    """The license beside the file, and a model card that says what the file does and whence the weights are."""
    for path in license_files(source.pieces[0].parent):
        if path.name != "README.md":
            shutil.copyfile(path, built / path.name)
    named = {key: file.metadata.get(f"general.{key}") for key in ("name", "license", "license.name", "license.link")}
    front = [f"license: {json.dumps(str(named['license']))}"] if named["license"] else []
    for key in ("license.name", "license.link"):
        front += [f"{key.replace('.', '_')}: {json.dumps(str(named[key]))}"] if named[key] else []
    digests = [f"- {path.name}: sha256 {sha256_file(path)}" for path in source.pieces]
    lines = ["---", *front, "---", "", f"# {str(named['name'] or source.name.stem)[:200]}", ""]
    lines += [f"Weights of {dtype}, dequantized by `dpo-cli model import` from", "", *digests, ""]
    (built / "README.md").write_text("\n".join(lines), encoding="utf-8")


# --- folders ------------------------------------------------------------------------------


def _build_from_folder(source: Source, built: Path, work: Path, reporter: Reporter) -> tuple[str, ...]:
    folder = source.folder
    assert folder is not None
    notes: list[str] = []
    weights = folder
    if not any(folder.glob("*.safetensors")) and (pickles := pickles_of(folder)):
        weights = work / "unpickled"
        unpickle(folder, pickles, weights, reporter)
    config = load_config(folder)
    with in_words(f"{folder}: config.json cannot be used"):
        is_nested = config.get_text_config() is not config
    if is_nested:
        check_model_folder(weights)
        build_text_part(weights, config, built, reporter)
    elif weights is not folder:
        notes += _build_from_pickles(weights, built, reporter)
    else:
        verify_weights(folder)
        names = [path.name for path in weight_files(folder)]
        names += [INDEX] if (folder / INDEX).is_file() and len(names) > 1 else []
        others = [name for name in model_files(folder) if not name.endswith((".safetensors", INDEX))]
        _copy([folder / name for name in (*names, *others)], built, reporter)
    kept = license_files(folder)
    for path in kept:
        shutil.copyfile(path, built / path.name)
    taken = {path.name for path in (*built.iterdir(), *kept)}
    left = sorted(path.name for path in folder.iterdir() if path.name not in taken and not path.name.startswith("."))
    if left:
        more = f" and {len(left) - 8} more" if len(left) > 8 else ""
        notes.append(f"left behind, as no part of the model as it is written: {', '.join(left[:8])}{more}")
    return tuple(notes)


def _copy(files: Sequence[Path], built: Path, reporter: Reporter) -> None:
    """Copy files, whatever their links point to."""
    with reporter.meter("import: copying", total_size(files), "bytes") as meter:
        for path in files:
            with path.open("rb") as source, (built / path.name).open("wb") as target:
                copy_bytes(source, target, path.stat().st_size, meter.advance)


def _build_from_pickles(weights: Path, built: Path, reporter: Reporter) -> list[str]:
    """Load what was unpickled as a model of text and save it."""
    verified = verify_weights(weights)
    with in_words(f"{weights}: the model cannot be loaded"):
        load_as_it_is(weights, dtype="auto").save_pretrained(built)
    _copy([path for name in TOKENIZER_FILES if (path := weights / name).is_file()], built, reporter)
    unused = list(verified.unused)
    return [f"{len(unused)} tensors that are no part of the model were left out: {unused[0]}"] if unused else []
