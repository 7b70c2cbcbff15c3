"""Digests, and files and folders that are either whole or not there.

A file is written beside its place and renamed onto it. A folder is built in the scratch
area, its manifest last, and renamed onto its place: a manifest that exists means complete.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo_cli.core.errors import StaleArtifactError

_CHUNK = 1 << 20


def digest_bytes(*parts: bytes) -> str:
    """128-bit BLAKE2b over length-prefixed parts, as 32 hexadecimal digits."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()


def digest_json(value: Any) -> str:
    """Digest of a JSON value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return digest_bytes(text.encode())


def sha256_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's content; ``on_bytes`` is called with every chunk that was read."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    return state.hexdigest()


def digest_files(folder: Path, names: Iterable[str]) -> str:
    """One digest over the named files of a folder: their names and contents."""
    return digest_json({name: sha256_file(folder / name) for name in sorted(names)})


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name to write to; it becomes ``path`` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with line feeds, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, whole or not at all. NaN and infinity are refused: JSON has none."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all; no row makes a blank line, since DVC warns of empty files."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        if not file.tell():
            file.write("\n")


def write_json_array(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON array, one object a line, whole or not at all."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    write_text(path, f"[\n{lines}\n]\n")


def write_csv_table(path: Path, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write CSV with a header, whole or not at all; None and NaN are empty cells."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if cell is None or cell != cell else cell for cell in row] for row in rows)
    write_text(path, stream.getvalue())


def read_json(path: Path, remedy: str) -> Any:
    """Read a JSON file that an earlier stage made.

    Raises:
        StaleArtifactError: It is missing or damaged; the message ends with ``remedy``.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StaleArtifactError(f"{path} is missing; {remedy}") from None
    except ValueError as error:
        raise StaleArtifactError(f"{path} is damaged ({error}); {remedy}") from None


def give_usual_mode(path: Path) -> None:
    """Give a file or folder the mode that open() and mkdir() give: safetensors writes files that only we can read."""
    if path.is_symlink():
        return
    umask = os.umask(0o077)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def publish_folder(built: Path, place: Path) -> None:
    """Move a finished folder onto its place; what stood there goes only when the new one is in.

    The two may lie on different disks.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    new, old = (place.with_name(f".{place.name}.{word}.tmp") for word in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.move(built, new)
    for path in (new, *new.rglob("*")):
        give_usual_mode(path)
    if place.exists():
        os.replace(place, old)
    os.replace(new, place)
    shutil.rmtree(old, ignore_errors=True)
