"""From canonical tables to token groups, with every row that does not fit accounted for."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_cli.core.artifacts import remove
from dpo_cli.core.errors import DataError, StaleArtifactError
from dpo_cli.core.params import PairTokenChecks
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.schema import (
    PREFERENCE_SCHEMA,
    SFT_SCHEMA,
    PreferenceExample,
    SftExample,
    assistant,
    table_of,
    user,
)
from dpo_cli.data.tokenize import TokenTable, explain_found, explain_rejects, tokenize_table
from dpo_cli.data.tokens import TokenGroup, TokenWriter

REMEDY = "run: dpo-cli convert-sft"
POLICIES = PairTokenChecks().model_dump()


@pytest.fixture(autouse=True)
def in_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def encoder(tokenizer: Any) -> ChatEncoder:
    return ChatEncoder(tokenizer)


def write(path: Path, examples: list[Any], schema: pa.Schema) -> Path:
    pq.write_table(table_of([example.row("rows.json") for example in examples], schema), path)
    return path


def pair(prompt: str, chosen: str = "6 cats", rejected: str = "5") -> PreferenceExample:
    return PreferenceExample([user(prompt)], [assistant(chosen)], [assistant(rejected)])


def test_a_pair_becomes_a_group_of_two_completions(tmp_path: Path, encoder: ChatEncoder) -> None:
    example = pair("5 cats")
    path = write(tmp_path / "a.parquet", [example], PREFERENCE_SCHEMA)
    table = tokenize_table(path, ("chosen", "rejected"), encoder, 99, POLICIES, REMEDY)
    (group,) = table.groups
    row = example.row("")
    assert (group.id, group.group) == (row["id"], row["group"])
    assert list(group.prompt) == encoder.encode_prompt(example.prompt)
    assert [list(completion) for completion in group.completions] == [
        encoder.encode_completion(example.prompt, example.chosen),
        encoder.encode_completion(example.prompt, example.rejected),
    ]
    assert table.prompts == {row["group"]: example.prompt}


def test_an_instruction_becomes_a_group_of_one_completion_under_its_own_id(
    tmp_path: Path, encoder: ChatEncoder
) -> None:
    example = SftExample([user("q")], [assistant("a")])
    path = write(tmp_path / "a.parquet", [example], SFT_SCHEMA)
    (group,) = tokenize_table(path, ("completion",), encoder, 99, POLICIES, REMEDY).groups
    assert group.id == group.group == example.row("")["id"]
    assert len(group.completions) == 1


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_an_over_long_row_is_left_out_and_listed_with_its_length(
    tmp_path: Path, encoder: ChatEncoder, longer: str
) -> None:
    long = pair("q", **{longer: "cats " * 40})
    path = write(tmp_path / "a.parquet", [pair("one"), long, pair("two")], PREFERENCE_SCHEMA)
    table = tokenize_table(path, ("chosen", "rejected"), encoder, 30, POLICIES, REMEDY)
    assert [group.id for group in table.groups] == [pair("one").row("")["id"], pair("two").row("")["id"]]
    length = len(encoder.encode_prompt(long.prompt)) + len(
        encoder.encode_completion(long.prompt, getattr(long, longer))
    )
    assert table.rejects == [
        {
            "file": path.as_posix(),
            "row": 1,
            "reason": "over_long",
            "detail": f"has {length} tokens, more than 30",
        }
    ]
    assert set(table.prompts) == {group.group for group in table.groups}


def test_a_row_of_exactly_the_longest_length_is_kept(tmp_path: Path, encoder: ChatEncoder) -> None:
    path = write(tmp_path / "a.parquet", [pair("one")], PREFERENCE_SCHEMA)
    columns = ("chosen", "rejected")
    longest = tokenize_table(path, columns, encoder, 99, POLICIES, REMEDY).groups[0].longest
    assert len(tokenize_table(path, columns, encoder, longest, POLICIES, REMEDY).groups) == 1
    assert len(tokenize_table(path, columns, encoder, longest - 1, POLICIES, REMEDY).rejects) == 1


def test_a_missing_table_says_which_stage_to_run(tmp_path: Path, encoder: ChatEncoder) -> None:
    with pytest.raises(StaleArtifactError, match=rf"a.parquet is missing; {REMEDY}$"):
        tokenize_table(tmp_path / "a.parquet", ("completion",), encoder, 9, POLICIES, REMEDY)


@pytest.mark.parametrize("keep", [0, -1])
def test_a_damaged_table_says_which_stage_to_run(tmp_path: Path, encoder: ChatEncoder, keep: int) -> None:
    path = write(tmp_path / "a.parquet", [pair("one")], PREFERENCE_SCHEMA)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StaleArtifactError, match=rf"(?s)a.parquet is damaged .*{REMEDY}$"):
        tokenize_table(path, ("chosen", "rejected"), encoder, 9, POLICIES, REMEDY)


@pytest.mark.parametrize(("num_long", "said"), [(0, False), (1, False), (3, True)])
def test_many_rows_left_out_are_worth_a_warning(num_long: int, said: bool) -> None:
    group = TokenGroup("a", "a", (1,), ((2,),))
    rejects = [{"reason": "over_long"}] * num_long
    warning = explain_rejects([TokenTable([group] * 30, rejects)], "sft.max_length", 16)
    assert (warning is not None) == said
    if warning:
        assert warning == (
            "3 of 33 rows (9%) are left out: 3 over long; sft.max_length is 16, raise it to keep long ones"
        )


def test_what_is_left_out_for_another_reason_is_said_of_the_first_row() -> None:
    rejects = [{"reason": "template_refused", "row": row, "detail": f"is refused: words {row}"} for row in (3, 5)]
    warning = explain_rejects([TokenTable([], rejects)], "sft.max_length", 16)
    assert warning == "2 of 2 rows (100%) are left out: 2 template refused; row 3 is refused: words 3"


# --- what is kept on disk -----------------------------------------------------------------


def stores() -> list[Path]:
    return sorted(path for path in Path(".scratch/tokens").iterdir() if path.is_dir())


def test_a_table_is_tokenized_once(tmp_path: Path, encoder: ChatEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [pair(f"q {number}", chosen="cats " * number) for number in range(1, 40)]
    path = write(tmp_path / "a.parquet", examples, PREFERENCE_SCHEMA)
    policies = POLICIES | {"double_eos": "keep"}
    first = tokenize_table(path, ("chosen", "rejected"), encoder, 30, policies, REMEDY)
    monkeypatch.setattr(ChatEncoder, "encode", None)
    again = tokenize_table(path, ("chosen", "rejected"), encoder, 30, policies, REMEDY)
    assert list(again.groups) == list(first.groups)
    assert (again.rejects, again.found, again.prompts) == (first.rejects, first.found, first.prompts)
    assert len(first.rejects) > 0
    moved = path.rename(tmp_path / "b.parquet")
    assert tokenize_table(moved, ("chosen", "rejected"), encoder, 30, policies, REMEDY).rejects[0]["file"] == str(moved)


def test_whatever_decides_tokens_makes_a_store_of_its_own(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.parquet", [pair("one"), pair("two")], PREFERENCE_SCHEMA)
    other = write(tmp_path / "b.parquet", [pair("one"), pair("three")], PREFERENCE_SCHEMA)
    plain, folded = ChatEncoder(tokenizer), ChatEncoder(tokenizer, system="fold")
    alpaca, more_ends = ChatEncoder(tokenizer, "alpaca"), ChatEncoder(tokenizer, end_ids=[5])
    narrow = ChatEncoder(tokenizer)
    narrow.num_rows = 10_000
    changes: list[tuple[Path, tuple[str, ...], ChatEncoder, int, dict[str, str]]] = [
        (path, ("chosen", "rejected"), plain, 30, POLICIES),
        (other, ("chosen", "rejected"), plain, 30, POLICIES),
        (path, ("chosen",), plain, 30, POLICIES),
        (path, ("chosen", "rejected"), folded, 30, POLICIES),
        (path, ("chosen", "rejected"), alpaca, 60, POLICIES),
        (path, ("chosen", "rejected"), more_ends, 30, POLICIES),
        (path, ("chosen", "rejected"), narrow, 30, POLICIES),
        (path, ("chosen", "rejected"), plain, 31, POLICIES),
        (path, ("chosen", "rejected"), plain, 30, POLICIES | {"double_bos": "drop"}),
    ]
    for number, change in enumerate(changes, start=1):
        tokenize_table(*change, REMEDY)
        assert len(stores()) == number


def of_several_arrays(file: Path) -> None:
    with file.open("wb") as opened:
        np.savez(opened, a=np.arange(3))


HARMS: dict[str, Callable[[Path], Any]] = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "empty": lambda file: file.write_bytes(b""),
    "of floats": lambda file: np.save(file, np.load(file).astype("f4")),
    "without rows": lambda file: np.save(file, np.load(file)[:0]),
    "without a shape": lambda file: np.save(file, np.int64(3)),
    "of several arrays": of_several_arrays,
    "a list": lambda file: file.write_text("[]", encoding="utf-8"),
    "of nothing": lambda file: file.write_text('{"rejects": null, "found": {}}', encoding="utf-8"),
}
DAMAGES = [
    *((name, "cut off") for name in ("tokens.i32", "ends.npy", "firsts.npy", "ids.npy", "keys.npy", "others.json")),
    *((name, "without rows") for name in ("ends.npy", "firsts.npy", "ids.npy", "keys.npy")),
    *(("ends.npy", harm) for harm in ("empty", "of floats", "without a shape", "of several arrays")),
    *(("others.json", harm) for harm in ("a list", "of nothing")),
]


@pytest.mark.parametrize(("name", "harm"), DAMAGES)
def test_a_damaged_store_is_written_anew(tmp_path: Path, encoder: ChatEncoder, name: str, harm: str) -> None:
    path = write(tmp_path / "a.parquet", [pair("one"), pair("two")], PREFERENCE_SCHEMA)
    first = list(tokenize_table(path, ("chosen", "rejected"), encoder, 30, POLICIES, REMEDY).groups)
    contents = [TokenGroup(group.id, group.group, group.prompt, group.completions) for group in first]
    (store,) = stores()
    HARMS[harm](store / name)
    again = tokenize_table(path, ("chosen", "rejected"), encoder, 30, POLICIES, REMEDY).groups
    assert again == contents


def test_a_file_in_place_of_a_store_gives_way(tmp_path: Path, encoder: ChatEncoder) -> None:
    path = write(tmp_path / "a.parquet", [pair("one")], PREFERENCE_SCHEMA)
    tokenize_table(path, ("chosen", "rejected"), encoder, 30, POLICIES, REMEDY)
    (store,) = stores()
    remove(store)
    store.touch()
    assert len(tokenize_table(path, ("chosen", "rejected"), encoder, 30, POLICIES, REMEDY).groups) == 1


def test_a_full_disk_is_no_damage_of_the_table(
    tmp_path: Path, encoder: ChatEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet", [pair("one")], PREFERENCE_SCHEMA)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TokenWriter, "add", full)
    with pytest.raises(OSError, match="No space left"):
        tokenize_table(path, ("chosen", "rejected"), encoder, 30, POLICIES, REMEDY)
    assert [store.name for store in stores()] == ["new.tmp"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert len(tokenize_table(path, ("chosen", "rejected"), encoder, 30, POLICIES, REMEDY).groups) == 1


def test_old_stores_are_forgotten(tmp_path: Path, encoder: ChatEncoder) -> None:
    path = write(tmp_path / "a.parquet", [pair("one")], PREFERENCE_SCHEMA)
    for length in range(30, 45):
        tokenize_table(path, ("chosen", "rejected"), encoder, length, POLICIES, REMEDY)
    assert len(stores()) == 9


# --- checks of tokens ---------------------------------------------------------------------


def odd_encoder(tokenizer: Any, template: str) -> ChatEncoder:
    import copy

    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    own.bos_token = own.eos_token
    return ChatEncoder(own)


_DOUBLE_BOS = (
    "{{ bos_token }}{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_a_prompt_with_two_bos_tokens_is_counted_or_left_out(tmp_path: Path, tokenizer: Any) -> None:
    template = _DOUBLE_BOS.replace("m.role + ' ' + m.content", "m.content")
    encoder = odd_encoder(tokenizer, template)
    path = write(tmp_path / "a.parquet", [pair("one"), pair(tokenizer.eos_token + "two")], PREFERENCE_SCHEMA)
    columns = ("chosen", "rejected")
    kept = tokenize_table(path, columns, encoder, 99, POLICIES, REMEDY)
    assert (len(kept.groups), kept.found) == (2, {"double_bos": [1]})
    left = tokenize_table(path, columns, encoder, 99, POLICIES | {"double_bos": "drop"}, REMEDY)
    assert [(reject["row"], reject["reason"]) for reject in left.rejects] == [(1, "double_bos")]
    with pytest.raises(DataError, match=r"1 rows fail the check double_bos \(rows 1\)"):
        tokenize_table(path, columns, encoder, 99, POLICIES | {"double_bos": "error"}, REMEDY)


def test_an_answer_that_writes_its_own_end_is_counted_and_ends_once(tmp_path: Path, encoder: ChatEncoder) -> None:
    end = encoder.tokenizer.decode([encoder.end_id])
    path = write(tmp_path / "a.parquet", [pair("one"), pair("two", chosen=f"6 cats{end}")], PREFERENCE_SCHEMA)
    table = tokenize_table(path, ("chosen", "rejected"), encoder, 99, POLICIES, REMEDY)
    assert table.found == {"double_eos": [1]}
    assert table.groups[0].completions[0] == table.groups[1].completions[0]
    assert explain_found([table, table]) == "kept, though their tokens are odd: 2 rows with double eos"
    assert explain_found([TokenTable([], [])]) is None
