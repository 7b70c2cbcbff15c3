"""Digests, and files and folders that are whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from dpo_cli.core.artifacts import (
    atomic_path,
    digest_bytes,
    digest_files,
    digest_json,
    publish_folder,
    read_json,
    sha256_file,
    write_json,
    write_json_lines,
    write_text,
)
from dpo_cli.core.errors import StaleArtifactError


def names_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# --- digests ------------------------------------------------------------------------------


def test_where_one_part_ends_and_the_next_begins_counts() -> None:
    digests = [digest_bytes(b"ab", b"c"), digest_bytes(b"a", b"bc"), digest_bytes(b"abc"), digest_bytes(b"abc", b"")]
    assert len(set(digests)) == 4


def test_the_order_of_keys_does_not_count_and_the_order_of_a_list_does() -> None:
    assert digest_json({"a": 1, "b": {"c": 2, "d": 3}}) == digest_json({"b": {"d": 3, "c": 2}, "a": 1})
    assert digest_json([1, 2]) != digest_json([2, 1])


@pytest.mark.parametrize("other", ["1", 1.5, True, None, [1], {"a": 1}])
def test_a_value_and_its_look_alike_have_different_digests(other: object) -> None:
    assert digest_json(1) != digest_json(other)


def test_digests_never_change() -> None:
    """They name rows and caches on disk: another digest would forget all of them."""
    state = hashlib.blake2b((3).to_bytes(8, "little") + b"abc", digest_size=16)
    assert digest_bytes(b"abc") == state.hexdigest()
    text = '{"a":"é"}'.encode()
    assert digest_json({"a": "é"}) == digest_bytes(text)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_a_file_is_digested_whole_and_every_byte_is_reported(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\x07" * size)
    heard: list[int] = []
    assert sha256_file(path, heard.append) == hashlib.sha256(b"\x07" * size).hexdigest()
    assert sum(heard) == size


def test_the_digest_of_files_depends_on_names_and_contents_not_on_their_order(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "2")):
        (tmp_path / name).write_text(text)
    before = digest_files(tmp_path, ["a", "b"])
    assert digest_files(tmp_path, ["b", "a"]) == before
    for name, text in (("a", "2"), ("b", "1")):
        (tmp_path / name).write_text(text)
    assert digest_files(tmp_path, ["a", "b"]) != before
    assert digest_files(tmp_path, ["a"]) != digest_files(tmp_path, ["b"])


# --- files --------------------------------------------------------------------------------


def test_a_file_appears_with_its_folder_and_nothing_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "file.txt", "é\n中\n")
    assert names_in(tmp_path) == ["deep", "deep/file.txt"]
    assert (tmp_path / "deep" / "file.txt").read_bytes() == "é\n中\n".encode()


def test_an_error_while_writing_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["file"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_has_no_nan(tmp_path: Path, value: float) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": value})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_lines(tmp_path / "a.json", [{"loss": 1.0}, {"loss": value}])
    assert read_json(tmp_path / "a.json", "") == 1
    assert names_in(tmp_path) == ["a.json"]


def test_json_comes_back_as_it_was_written(tmp_path: Path) -> None:
    value = {"text": 'é\u2028\n"中', "list": [1, 2.5, None, True], "empty": {}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json", "") == value


def test_json_lines_hold_one_object_each(tmp_path: Path) -> None:
    rows = [{"text": "two\nlines"}, {"text": "中"}]
    write_json_lines(tmp_path / "a.jsonl", rows)
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == rows
    assert lines[-1] == ""
    assert lines[1] == '{"text": "中"}'


@pytest.mark.parametrize("data", [None, b"", b'{"a": ', b"\xff\xfe", b"not json"])
def test_a_missing_or_damaged_file_of_an_earlier_stage_says_which_stage_to_run(
    tmp_path: Path, data: bytes | None
) -> None:
    if data is not None:
        (tmp_path / "lock.json").write_bytes(data)
    what = "missing" if data is None else r"damaged \(.+\)"
    with pytest.raises(StaleArtifactError, match=rf"lock.json is {what}; run: dpo-cli base$"):
        read_json(tmp_path / "lock.json", "run: dpo-cli base")


# --- folders ------------------------------------------------------------------------------


def build(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_a_finished_folder_replaces_what_stands_in_its_place_and_what_a_kill_left_there(tmp_path: Path) -> None:
    place = tmp_path / "models" / "sft"
    publish_folder(build(tmp_path / "scratch" / "out", old="1", a="1"), place)
    assert names_in(tmp_path) == ["models", "models/sft", "models/sft/a", "models/sft/old", "scratch"]
    for word in ("old", "new"):
        build(tmp_path / "models" / f".sft.{word}.tmp", leftover="1")
    publish_folder(build(tmp_path / "scratch" / "out", a="2"), place)
    assert names_in(tmp_path) == ["models", "models/sft", "models/sft/a", "scratch"]
    assert (place / "a").read_text() == "2"


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_what_is_published_has_the_mode_that_the_umask_leaves(
    tmp_path: Path, umask: int, file_mode: int, folder_mode: int
) -> None:
    """Safetensors writes files that nobody else can read: vLLM under another user would find no adapter."""
    before = os.umask(umask)
    try:
        built = tmp_path / "built"
        (built / "inner").mkdir(parents=True, mode=0o700)
        for path in (built / "one", built / "inner/two"):
            path.touch(mode=0o600)
        publish_folder(built, tmp_path / "place")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "place").rglob("*")}
    assert modes == {"one": file_mode, "inner": folder_mode, "two": file_mode}
    assert (tmp_path / "place").stat().st_mode & 0o777 == folder_mode
