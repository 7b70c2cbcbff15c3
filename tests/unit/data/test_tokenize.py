"""From canonical tables to token groups, with every row that does not fit accounted for."""

from __future__ import annotations

import copy
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dpo_cli.core.artifacts import remove
from dpo_cli.core.errors import DataError, StaleArtifactError
from dpo_cli.core.params import PairTokenChecks
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.checks import TokenView
from dpo_cli.data.schema import (
    PreferenceExample,
    SftExample,
    assistant,
    table_of,
    user,
)
from dpo_cli.data.tokenize import TokenTable, explain_found, explain_rejects, tokenize_table
from dpo_cli.data.tokens import TokenGroup, TokenWriter

POLICIES = PairTokenChecks().model_dump()


@pytest.fixture(autouse=True)
def in_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def encoder(tokenizer: Any) -> ChatEncoder:
    return ChatEncoder(tokenizer)


def write(examples: list[Any], name: str = "a.parquet") -> Path:
    rows = [example.row("rows.json") for example in examples]
    pq.write_table(table_of(rows, examples[0].schema), name)
    return Path(name)


def tokenized(path: Path, encoder: ChatEncoder, max_length: int = 99, *columns: str, **policies: str) -> TokenTable:
    return tokenize_table(
        path,
        columns or ("chosen", "rejected"),
        TokenView(encoder, max_length, POLICIES | policies),
        "run: dpo-cli convert-sft",
    )


def pair(prompt: str, chosen: str = "6 cats", rejected: str = "5") -> PreferenceExample:
    return PreferenceExample([user(prompt)], [assistant(chosen)], [assistant(rejected)])


def test_a_pair_becomes_a_group_of_two_completions(encoder: ChatEncoder) -> None:
    example = pair("5 cats")
    table = tokenized(write([example]), encoder)
    (group,) = table.groups
    row = example.row("")
    assert (group.id, group.group) == (row["id"], row["group"])
    assert list(group.prompt) == encoder.encode_prompt(example.prompt)
    assert [list(completion) for completion in group.completions] == [
        encoder.encode_completion(example.prompt, example.chosen),
        encoder.encode_completion(example.prompt, example.rejected),
    ]
    assert table.prompts == {row["group"]: example.prompt}


def test_an_instruction_becomes_a_group_of_one_completion_under_its_own_id(encoder: ChatEncoder) -> None:
    example = SftExample([user("q")], [assistant("a")])
    (group,) = tokenized(write([example]), encoder, 99, "completion").groups
    assert group.id == group.group == example.row("")["id"]
    assert len(group.completions) == 1


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_an_over_long_row_is_left_out_and_listed_with_its_length(encoder: ChatEncoder, longer: str) -> None:
    long = pair("q", **{longer: "cats " * 40})
    path = write([pair("one"), long, pair("two")])
    (length,) = (group.longest for group in tokenized(path, encoder).groups if group.id == long.row("")["id"])
    table = tokenized(path, encoder, length - 1)
    assert [group.id for group in table.groups] == [pair("one").row("")["id"], pair("two").row("")["id"]]
    detail = f"has {length} tokens, more than {length - 1}"
    assert table.rejects == [{"file": path.as_posix(), "row": 1, "reason": "over_long", "detail": detail}]
    assert set(table.prompts) == {group.group for group in table.groups}
    assert len(tokenized(path, encoder, length).groups) == 3


def test_a_missing_or_damaged_table_says_which_stage_to_run(encoder: ChatEncoder) -> None:
    with pytest.raises(StaleArtifactError, match=r"a.parquet is missing; run: dpo-cli convert-sft$"):
        tokenized(Path("a.parquet"), encoder)
    path = write([pair("one")])
    for keep in (-1, 0):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(StaleArtifactError, match=r"(?s)a.parquet is damaged .*run: dpo-cli convert-sft$"):
            tokenized(path, encoder)


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


def test_a_table_is_tokenized_once(encoder: ChatEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write([pair(f"q {number}", chosen="cats " * number) for number in range(1, 40)])
    first = tokenized(path, encoder, 30)
    monkeypatch.setattr(ChatEncoder, "encode", None)
    again = tokenized(path, encoder, 30)
    assert list(again.groups) == list(first.groups)
    assert (again.rejects, again.found, again.prompts) == (first.rejects, first.found, first.prompts)
    assert len(first.rejects) > 0
    moved = path.rename("b.parquet")
    assert tokenized(moved, encoder, 30).rejects[0]["file"] == str(moved)


def test_whatever_decides_tokens_makes_a_store_of_its_own(tokenizer: Any) -> None:
    path, other = write([pair("one"), pair("two")]), write([pair("one"), pair("three")], "b.parquet")
    plain, narrow = ChatEncoder(tokenizer), ChatEncoder(tokenizer)
    narrow.num_rows = 10_000
    changed = (
        ChatEncoder(tokenizer, system="fold"),
        ChatEncoder(tokenizer, "alpaca"),
        ChatEncoder(tokenizer, end_ids=[5]),
    )
    uses: list[Callable[[], TokenTable]] = [
        *(lambda encoder=encoder: tokenized(path, encoder, 60) for encoder in (plain, narrow, *changed)),
        lambda: tokenized(other, plain, 60),
        lambda: tokenized(path, plain, 61),
        lambda: tokenized(path, plain, 60, "chosen"),
        lambda: tokenized(path, plain, 60, double_bos="drop"),
    ]
    for number, use in enumerate(uses, start=1):
        use()
        assert len(stores()) == number


HARMS: dict[str, Callable[[Path], Any]] = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "empty": lambda file: file.write_bytes(b""),
    "a list": lambda file: file.write_text("[]", encoding="utf-8"),
    "of nothing": lambda file: file.write_text('{"rejects": null, "found": {}}', encoding="utf-8"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", ["groups.arrow", "others.json", ""])
def test_a_damaged_store_is_written_anew(encoder: ChatEncoder, name: str, harm: str) -> None:
    path = write([pair("one"), pair("two")])
    groups = tokenized(path, encoder).groups
    contents = [TokenGroup(group.id, group.group, group.prompt, group.completions) for group in groups]
    (store,) = stores()
    if name:
        HARMS[harm](store / name)
    else:  # a file in place of the store
        remove(store)
        store.touch()
    assert tokenized(path, encoder).groups == contents


def test_a_full_disk_is_no_damage_of_the_table(encoder: ChatEncoder) -> None:
    path = write([pair("one")])

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenWriter, "add", full)
        with pytest.raises(OSError, match="No space left"):
            tokenized(path, encoder)
    assert [store.name for store in stores()] == ["new.tmp"]
    assert len(tokenized(path, encoder).groups) == 1


def test_old_stores_are_forgotten(encoder: ChatEncoder) -> None:
    path = write([pair("one")])
    for length in range(30, 45):
        tokenized(path, encoder, length)
    assert len(stores()) == 9


# --- checks of tokens ---------------------------------------------------------------------


def test_a_prompt_with_two_bos_tokens_is_counted_or_left_out(tokenizer: Any) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content + ' ' }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    own.bos_token = own.eos_token
    encoder = ChatEncoder(own)
    path = write([pair("one"), pair(tokenizer.eos_token + "two")])
    kept = tokenized(path, encoder)
    assert (len(kept.groups), kept.found) == (2, {"double_bos": [1]})
    left = tokenized(path, encoder, double_bos="drop")
    assert [(reject["row"], reject["reason"]) for reject in left.rejects] == [(1, "double_bos")]
    with pytest.raises(DataError, match=r"1 rows fail the check double_bos \(rows 1\)"):
        tokenized(path, encoder, double_bos="error")


def test_an_answer_that_writes_its_own_end_is_counted_and_ends_once(encoder: ChatEncoder) -> None:
    end = encoder.tokenizer.decode([encoder.end_id])
    table = tokenized(write([pair("one"), pair("two", chosen=f"6 cats{end}")]), encoder)
    assert table.found == {"double_eos": [1]}
    assert table.groups[0].completions[0] == table.groups[1].completions[0]
    assert explain_found([table, table]) == "kept, though their tokens are odd: 2 rows with double eos"
    assert explain_found([TokenTable([], [])]) is None
