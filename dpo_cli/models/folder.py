"""The directory of a model: where it lies, and whether its files are whole; no torch, and nothing of it is run.

All that is read of the weights are the headers of the safetensors files, which name tensors, shapes and dtypes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open

from dpo_cli.core import paths
from dpo_cli.core.errors import MachineError, ParamsError
from dpo_cli.core.params import EMBEDDED, ModelParams, RuntimeParams
from dpo_cli.core.text import in_one_line

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_LFS_POINTER = b"version https://git-lfs"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
"""Names of files that may hold pickled weights."""
_CHUNK = 1 << 22
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What PEFT saves of an adapter."""


@dataclass(frozen=True)
class Tensor:
    """What a safetensors header says of a tensor.

    Attributes:
        file: Where it lies.
        shape: Its shape.
        dtype: As safetensors names it: F32, BF16.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


def base_folder(model: ModelParams, runtime: RuntimeParams) -> Path:
    """The directory that holds the base model, absolute where it is not models/base.

    Raises:
        ParamsError: A model of one's own was named but no directory was given, or the other way round.
        MachineError: The directory is missing or holds no model that can be loaded.
    """
    given = os.environ.get("DPO_MODEL_PATH") or runtime.model_path
    if model.name == EMBEDDED:
        if given:
            raise ParamsError(
                f"DPO_MODEL_PATH is set but params.yaml: model.name is {EMBEDDED}, which reads no directory;"
                " give the model a name of its own"
            )
        return paths.BASE
    if not given:
        raise ParamsError(
            f"params.yaml: runtime.model_path (or DPO_MODEL_PATH) must be the directory of model {model.name!r}"
        )
    folder = paths.from_root(given)
    check_model_folder(folder)
    return folder


def adapter_folder(runtime: RuntimeParams) -> Path:
    """The directory of the adapter that sft.method adapter goes on with, absolute.

    Raises:
        ParamsError: None was given.
        MachineError: It is missing, or holds no adapter as PEFT saves it.
    """
    given = os.environ.get("DPO_ADAPTER_PATH") or runtime.adapter_path
    if not given:
        raise ParamsError(
            "params.yaml: sft.method adapter needs runtime.adapter_path (or DPO_ADAPTER_PATH), the adapter's directory"
        )
    folder = paths.from_root(given)
    if not folder.is_dir():
        raise MachineError(f"adapter directory {folder} is missing; check runtime.adapter_path or DPO_ADAPTER_PATH")
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            pickled = "; pickled weights can run code when loaded" if (folder / "adapter_model.bin").is_file() else ""
            raise MachineError(f"{folder} has no {name}: not an adapter as PEFT saves it{pickled}")
    return folder


def check_model_folder(folder: Path) -> None:
    """Refuse a directory that cannot be loaded safely, with the reason.

    Raises:
        MachineError: It is missing, has no configuration, no safetensors weights, only pickles,
            Git LFS pointers in place of weights, an adapter, or an index of other files than it holds.
    """
    if not folder.is_dir():
        raise MachineError(
            f"model directory {folder} is missing; name a folder (--model, runtime.model_path or DPO_MODEL_PATH):"
            " nothing is fetched by a name on the Hub; that is done by: hf download NAME --local-dir DIR"
        )
    if (folder / ADAPTER_FILES[0]).is_file():
        raise MachineError(
            f"{folder} holds an adapter ({ADAPTER_FILES[0]}); give the directory of a whole model, and the adapter as"
            " runtime.adapter_path with sft.method adapter"
        )
    if not (folder / "config.json").is_file():
        raise MachineError(f"{folder} has no config.json: not a model in Hugging Face layout")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise MachineError(
                f"{folder} has only pickled weights ({pickles[0]}), which can run code when loaded; convert them with:"
                " dpo-cli model import"
            )
        raise MachineError(f"{folder} has no weights: no *.safetensors file is there")
    for path in weights:
        refuse_pointer(path)
    weight_files(folder)


def refuse_pointer(path: Path) -> None:
    """Refuse a file that Git LFS put in place of weights.

    Raises:
        MachineError: With what fetches them.
    """
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise MachineError(f"{path} is a Git LFS pointer, not weights; fetch them with: git lfs pull")


def holds_weights(folder: Path) -> bool:
    """Whether a directory holds weights of a model, of whatever kind, and not a tokenizer with an adapter at most."""
    kinds = ("*.safetensors", INDEX, *PICKLES)
    return not (folder / ADAPTER_FILES[0]).is_file() and any(next(folder.glob(kind), None) for kind in kinds)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model is loaded from.

    Raises:
        MachineError: The index is damaged, or names files that are not there or outside of the directory.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        raise MachineError(f"{folder} has neither {WEIGHTS} nor {INDEX}: which of its files are the weights?")
    found = read_object(index)
    entries: Any = found.get("weight_map")
    named = isinstance(entries, dict) and entries and all(isinstance(name, str) for name in entries.values())
    if not named or not isinstance(found.get("metadata"), dict):
        raise MachineError(f"{index} must hold metadata, and under weight_map the file of each tensor; fetch it again")
    names = sorted(set(entries.values()))
    for name in names:
        if Path(name).name != name or name in (".", "..") or "\\" in name or "\0" in name:
            raise MachineError(f"{index} names the file {name!r}, which is not in {folder}; fetch it again")
        if not (folder / name).is_file():
            raise MachineError(f"{index} names {name}, which is missing; fetch the whole model")
    tensors = read_tensors([folder / name for name in names])
    for tensor, name in entries.items():
        if tensor not in tensors:
            raise MachineError(f"{folder / name} has no tensor {tensor}, which {INDEX} says is there; fetch it again")
    return [folder / name for name in names]


def read_tensors(files: Collection[Path]) -> dict[str, Tensor]:
    """The tensors of safetensors files, by name.

    Raises:
        MachineError: A file is damaged or no safetensors file.
    """
    found: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    part = opened.get_slice(name)
                    found[name] = Tensor(path, tuple(part.get_shape()), str(part.get_dtype()))
        except Exception as error:  # its own error, and whatever reading a header of garbage raises
            raise MachineError(
                f"{path} is damaged or not in safetensors format ({words_of(error)}); fetch it again"
            ) from None
    return found


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file of a model that must hold an object.

    Raises:
        MachineError: It is not UTF-8, not JSON, nested too deeply, or no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise MachineError(f"{path} is not UTF-8 text (byte {error.start}); fetch it again") from None
    except RecursionError:
        raise MachineError(f"{path} is nested too deeply; fetch it again") from None
    except ValueError as error:
        raise MachineError(f"{path} is not JSON ({words_of(error)}); fetch it again") from None
    if not isinstance(found, dict):
        raise MachineError(f"{path} must hold a JSON object, got {_kind(found)}; fetch it again")
    return found


_LONGEST = 300


def words_of(error: BaseException) -> str:
    """What an error of a library says, on one line of bounded length."""
    kind = type(error).__name__
    text = " ".join(str(error).split())
    if not text or isinstance(error, LookupError | AttributeError):  # whose words alone say little
        text = f"{kind}: {text}" if text else kind
    text = in_one_line(text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    names = {list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def total_size(files: Collection[Path]) -> int:
    """Bytes of some files together."""
    return sum(path.stat().st_size for path in files)


def copy_bytes(source: BinaryIO, target: BinaryIO, num_bytes: int, on_bytes: Callable[[int], None]) -> None:
    """Copy so many bytes, a few MiB at a time.

    Raises:
        MachineError: The source ends before.
    """
    while num_bytes:
        chunk = source.read(min(num_bytes, _CHUNK))
        if not chunk:
            raise MachineError(f"{source.name} became shorter while it was read")
        target.write(chunk)
        num_bytes -= len(chunk)
        on_bytes(len(chunk))
