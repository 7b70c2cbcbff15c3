"""GGUF files: the header, read with every length held against the file; and a model's pieces put together.

The package gguf reads files of good faith, and slowly: an element of the vocabulary at a time, and for ever where an
array claims 2^60 of them. So the header is read here, and the file that transformers is given to read is written anew,
without the vocabulary.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.core.errors import MachineError
from dpo_cli.core.progress import Reporter
from dpo_cli.models.folder import copy_bytes, total_size

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_PART = re.compile(r"(?P<stem>.+\.gguf[._-](?:part|split)?[._-]?)(?P<number>\d+)(?P<rest>of\d+)?")

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the header has it.

    Attributes:
        name: llama.cpp's name, such as ``blk.0.attn_q.weight``.
        shape: The largest stride first, as torch has it.
        kind: The number of its ggml type.
        file: Where its bytes lie, ``num_bytes`` from ``offset`` on.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    file: Path
    offset: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """The header of a file, or of several that make one model.

    Attributes:
        path: The file, or the first of them.
        version: The format's.
        metadata: What the file says of its model, by key; ``entries`` are the bytes of that.
        tensors: In the file's order.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    entries: dict[str, bytes]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """The family, in llama.cpp's words."""
        return str(self.metadata["general.architecture"])

    def of_architecture(self, key: str) -> Any:
        """A value under the architecture's own name, or None."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, or None where there is none of this name."""
        return next((tensor.shape for tensor in self.tensors if tensor.name == name), None)


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


# --- the pieces of a model ----------------------------------------------------------------


def find_pieces(path: Path) -> list[Path]:
    """The files that a model's first one belongs to, by their names; mostly it is the only one.

    llama.cpp splits a model into ``NAME-00001-of-00003.gguf`` and so on; others cut the file into ``NAME.gguf.part00``,
    ``NAME.gguf.part1of3`` or the like.

    Raises:
        MachineError: It is not the first one, or one of them is missing.
    """
    if split := _SPLIT.fullmatch(path.name):
        count = int(split["count"])
        names = [f"{split['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
        return _present(path, names)
    if part := _PART.fullmatch(path.name):
        width, last = len(part["number"]), int(part["number"])
        rest = part["rest"] or ""

        def name(number: int) -> str:
            return f"{part['stem']}{number:0{width}}{rest}"

        first = 0 if (path.parent / name(0)).is_file() else 1
        last = min(max(last, int(rest[2:] or 0)), 10_000)
        while (path.parent / name(last + 1)).is_file():
            last += 1
        return _present(path, [name(number) for number in range(first, last + 1)])
    return [path]


def _present(path: Path, names: Sequence[str]) -> list[Path]:
    pieces = [path.parent / name for name in names]
    missing = [piece.name for piece in pieces if not piece.is_file()]
    if missing or path not in pieces:
        raise MachineError(
            f"{path} is one of {len(pieces)} pieces, and {missing[0] if missing else path.name} is missing"
            f" ({len(missing)} in all); fetch every piece into {path.parent}"
        )
    return pieces


def read_pieces(pieces: Sequence[Path], joined: Path, reporter: Reporter) -> GgufFile:
    """The header of a model in one file or in pieces.

    Args:
        pieces: Files, each with a header of its own, or cut out of one file, in their order.
        joined: Where pieces without a header are put together, should there be any.
        reporter: Shows progress.

    Raises:
        MachineError: One is no GGUF file, damaged or cut off, or the pieces do not fit each other.
    """
    if len(pieces) == 1:
        return read_header(pieces[0])
    if not all(is_gguf(piece) for piece in pieces[1:]):
        with (
            joined.open("wb") as target,
            reporter.meter("import: joining the pieces", total_size(pieces), "bytes") as meter,
        ):
            for piece in pieces:
                with piece.open("rb") as source:
                    copy_bytes(source, target, piece.stat().st_size, meter.advance)
        return read_header(joined, named=pieces[0])
    files = [read_header(piece) for piece in pieces]
    first, tensors = files[0], [tensor for file in files for tensor in file.tensors]
    count, numbers = first.metadata.get("split.count"), [file.metadata.get("split.no") for file in files]
    if count != len(files) or numbers != list(range(len(files))):
        raise MachineError(
            f"{pieces[0]}: it says that it is the first of {count} pieces; {len(files)} were given, which say that they"
            f" are numbers {', '.join(str(number) for number in numbers)} counted from 0"
        )
    expected = first.metadata.get("split.tensors.count")
    if len({tensor.name for tensor in tensors}) != len(tensors) or expected not in (None, len(tensors)):
        raise MachineError(
            f"{pieces[0]}: its pieces hold {len(tensors)} tensors, and should hold {expected}; fetch them again"
        )
    return GgufFile(first.path, first.version, first.metadata, first.entries, tuple(tensors))


# --- the header ---------------------------------------------------------------------------


class _Cursor:
    """Reads a mapped file from front to back, and never beyond its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, num_bytes: int) -> bytes:
        """The next bytes.

        Raises:
            MachineError: The file ends before.
        """
        if num_bytes > len(self.data) - self.at:
            raise MachineError(
                f"{self.path} is cut off or damaged: at byte {self.at} it announces {num_bytes} bytes more, and"
                f" {len(self.data) - self.at} are there; fetch it again"
            )
        self.at += num_bytes
        return self.data[self.at - num_bytes : self.at]

    def number(self, form: str) -> Any:
        """The next number."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        """The next text, after its length."""
        return self.take(self.number("<Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        """The next value of the metadata.

        Raises:
            MachineError: Its kind is unknown, or an array within an array.
        """
        if kind in _SCALARS:
            number = self.number(_SCALARS[kind])
            # 1e-6 of 32 bits is 9.999999974752427e-07 of 64
            return float(str(np.float32(number))) if _SCALARS[kind] == "<f" else number
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise MachineError(f"{self.path} is damaged: at byte {self.at} the metadata holds a value of kind {kind}")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _SCALARS:
            form = _SCALARS[inner]
            return list(struct.unpack(f"<{count}{form[1]}", self.take(count * struct.calcsize(form))))
        if inner != _STRING:
            raise MachineError(f"{self.path} is damaged: at byte {self.at} the metadata holds an array of kind {inner}")
        return [self.text() for _ in range(count)]


def read_header(path: Path, named: Path | None = None) -> GgufFile:
    """The header of one file; errors name another one in its place where that is given.

    Raises:
        MachineError: It is no GGUF file, of a version or byte order that is not read, damaged or cut off.
    """
    named = named or path
    with path.open("rb") as file:
        start = file.read(8)
        if start[:4] != MAGIC:
            raise MachineError(f"{named} is no GGUF file: it does not begin with the letters GGUF")
        if len(start) < 8:
            raise MachineError(f"{named} is cut off after {len(start)} bytes; fetch it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_mapped(_Cursor(data, named), path)


def _read_mapped(cursor: _Cursor, path: Path) -> GgufFile:
    named = cursor.path
    cursor.take(4)
    version = cursor.number("<I")
    if version not in _VERSIONS:
        kind = "of big-endian byte order" if version and not version & 0xFFFF else f"of GGUF version {version}"
        raise MachineError(f"{named} is {kind}; versions {_VERSIONS[0]} and {_VERSIONS[1]}, little-endian, can be read")
    num_tensors, num_entries = cursor.number("<Q"), cursor.number("<Q")
    metadata: dict[str, Any] = {}
    entries: dict[str, bytes] = {}
    for _ in range(num_entries):
        begin = cursor.at
        key = cursor.text()
        if key in metadata:
            raise MachineError(f"{named} is damaged: its metadata has {key[:80]!r} twice")
        metadata[key] = cursor.value(cursor.number("<I"))
        entries[key] = cursor.data[begin : cursor.at]
    infos = []
    for _ in range(num_tensors):
        name, num_dims = cursor.text(), cursor.number("<I")
        if num_dims > 8:
            raise MachineError(f"{named} is damaged: tensor {name[:80]!r} has {num_dims} dimensions")
        dims = [cursor.number("<Q") for _ in range(num_dims)]
        infos.append((name, tuple(reversed(dims)), cursor.number("<I"), cursor.number("<Q")))
    alignment = metadata.get(_ALIGNMENT, 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise MachineError(f"{named} is damaged: {_ALIGNMENT} is {str(alignment)[:40]}")
    start = -(-cursor.at // alignment) * alignment
    tensors = []
    for name, shape, kind, offset in infos:
        tensor = GgufTensor(name, shape, kind, path, start + offset, _num_bytes(named, name, shape, kind))
        if (end := tensor.offset + tensor.num_bytes) > len(cursor.data):
            raise MachineError(
                f"{named} is cut off: tensor {name[:80]!r} ends at byte {end}, and the file has {len(cursor.data)};"
                " fetch it again"
            )
        tensors.append(tensor)
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise MachineError(f"{named} is damaged: two of its tensors have the same name")
    if not isinstance(metadata.get("general.architecture"), str):
        raise MachineError(f"{named} does not say which architecture its model is of (general.architecture)")
    return GgufFile(named, version, metadata, entries, tuple(tensors))


def _num_bytes(path: Path, name: str, shape: tuple[int, ...], kind: int) -> int:
    block_sizes = _block_sizes()
    if kind not in block_sizes:
        raise MachineError(f"{path}: tensor {name[:80]!r} is of ggml type {kind}, which the package gguf does not know")
    num_elements, num_bytes = block_sizes[kind]
    if not shape or shape[-1] % num_elements:
        raise MachineError(
            f"{path} is damaged: tensor {name[:80]!r} of shape {list(shape)} does not fit blocks of {num_elements}"
        )
    return prod(shape) // num_elements * num_bytes


def _block_sizes() -> dict[int, tuple[int, int]]:
    """Elements and bytes of a block, by the number of the ggml type."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        raise MachineError("GGUF files need the package gguf: pip install 'dpo-cli[gguf]'") from None
    return {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}


# --- writing ------------------------------------------------------------------------------


def write_gguf(file: GgufFile, target: Path, without: Collection[str], on_bytes: Callable[[int], None]) -> None:
    """Write one file of all tensors and the metadata, but for the entries of some keys."""
    kept = [entry for key, entry in file.entries.items() if key not in without and not key.startswith("split.")]
    alignment = file.metadata.get(_ALIGNMENT, 32)
    infos, offset = [], 0
    for tensor in file.tensors:
        name = tensor.name.encode()
        dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        infos.append(struct.pack("<Q", len(name)) + name + dims + struct.pack("<IQ", tensor.kind, offset))
        offset += -(-tensor.num_bytes // alignment) * alignment
    header = MAGIC + struct.pack("<IQQ", file.version, len(infos), len(kept)) + b"".join((*kept, *infos))
    with target.open("wb") as out:
        out.write(header)
        out.write(bytes(-len(header) % alignment))
        for tensor in file.tensors:
            with tensor.file.open("rb") as source:
                source.seek(tensor.offset)
                copy_bytes(source, out, tensor.num_bytes, on_bytes)
            out.write(bytes(-tensor.num_bytes % alignment))
