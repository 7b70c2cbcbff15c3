"""Data, whatever is thrown at it: what goes in comes out, and damage is named, never guessed at."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_cli.core.errors import DataError
from dpo_cli.data.formats import PREFERENCE_FORMATS, SFT_FORMATS
from dpo_cli.data.formats.base import RowProblem
from dpo_cli.data.reading import read_records
from dpo_cli.data.schema import Messages, PreferenceExample, SftExample, assistant, content_id, user
from dpo_cli.data.splits import is_held_out, split_position

TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40)
VISIBLE = TEXT.filter(lambda text: bool(text.strip()))
in_a_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def conversations(draw: st.DrawFn) -> Messages:
    """A prompt: perhaps a system turn, turns in alternation, the user's last."""
    system = [{"role": "system", "content": draw(VISIBLE)}] if draw(st.booleans()) else []
    turns = draw(st.lists(st.tuples(VISIBLE, VISIBLE), max_size=3))
    before = [message for question, answer in turns for message in (user(question), assistant(answer))]
    return [*system, *before, user(draw(VISIBLE))]


# --- formats: a canonical example in any format reads back as it was ----------------------------------------------


def as_alpaca(prompt: Messages, answer: str) -> dict[str, Any]:
    system = prompt[0]["content"] if prompt[0]["role"] == "system" else ""
    turns = [message["content"] for message in prompt if message["role"] != "system"]
    history = [list(pair) for pair in zip(turns[:-1:2], turns[1::2], strict=True)]
    return {"system": system, "history": history, "instruction": turns[-1], "input": "", "output": answer}


def as_sharegpt(prompt: Messages, chosen: str, rejected: str) -> dict[str, Any]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[message["role"]], "value": message["content"]} for message in prompt]
    return {
        "conversations": turns,
        "chosen": {"from": "gpt", "value": chosen},
        "rejected": {"from": "gpt", "value": rejected},
    }


def as_pairs(prompt: Messages, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def as_whole_conversations(prompt: Messages, chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "chosen": [*prompt, assistant(chosen)],
        "rejected": [*prompt, assistant(rejected)],
    }


def detect(formats: Any, row: dict[str, Any]) -> Any:
    """The first format that knows the row, as ``format: auto`` takes it."""
    return next(reader for reader in formats if reader.matches(row))


@given(conversations(), VISIBLE)
def test_alpaca_reads_back(prompt: Messages, answer: str) -> None:
    row = json.loads(json.dumps(as_alpaca(prompt, answer)))
    assert detect(SFT_FORMATS, row).read(row) == SftExample(prompt, [assistant(answer)])


@pytest.mark.parametrize("write", [as_sharegpt, as_pairs, as_whole_conversations])
@given(prompt=conversations(), chosen=VISIBLE, rejected=VISIBLE)
def test_preferences_read_back(write: Any, prompt: Messages, chosen: str, rejected: str) -> None:
    row = json.loads(json.dumps(write(prompt, chosen, rejected)))
    expected = PreferenceExample(prompt, [assistant(chosen)], [assistant(rejected)])
    assert detect(PREFERENCE_FORMATS, row).read(row) == expected


PLAIN = st.text(st.sampled_from("abc 你好.?\n"), min_size=1, max_size=12).filter(lambda text: text == text.strip())


@given(st.lists(st.tuples(PLAIN, PLAIN), max_size=3), PLAIN, PLAIN, PLAIN)
def test_a_transcript_reads_back(turns: list[tuple[str, str]], question: str, chosen: str, rejected: str) -> None:
    shared = "".join(f"\n\nHuman: {asked}\n\nAssistant: {answered}" for asked, answered in turns)
    shared += f"\n\nHuman: {question}\n\nAssistant:"
    row = {"chosen": f"{shared} {chosen}", "rejected": f"{shared} {rejected}"}
    prompt = [message for asked, answered in turns for message in (user(asked), assistant(answered))]
    expected = PreferenceExample([*prompt, user(question)], [assistant(chosen)], [assistant(rejected)])
    assert detect(PREFERENCE_FORMATS, row).read(row) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("instruction", "input", "output", "history", "system", "prompt", "conversations", "chosen", "rejected")


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6))
def test_any_object_is_read_or_refused_with_a_reason(row: dict[str, Any]) -> None:
    for reader in (*SFT_FORMATS, *PREFERENCE_FORMATS):
        try:
            example = reader.read(row)
        except RowProblem as problem:
            assert problem.reason
            assert str(problem)
        else:
            assert all(isinstance(message["content"], str) for message in example.prompt)


# --- files ----------------------------------------------------------------------------------------------------------


ROWS = st.lists(st.dictionaries(TEXT, JSON, max_size=3), min_size=1, max_size=6)


def render(rows: list[dict[str, Any]], form: str, ascii_only: bool) -> bytes:
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    if form == "array":
        return f"[{','.join(lines)}]".encode()
    if form == "indented":
        return json.dumps(rows, ensure_ascii=ascii_only, indent=2).encode()
    return ("\r\n" if form == "crlf" else "\n").join([*lines, ""]).encode()


@in_a_folder
@given(
    rows=ROWS,
    form=st.sampled_from(["array", "indented", "lines", "crlf"]),
    ascii_only=st.booleans(),
    mark=st.booleans(),
    compress=st.booleans(),
)
def test_a_file_in_any_form_gives_its_rows(
    rows: list[dict[str, Any]], form: str, ascii_only: bool, mark: bool, compress: bool, tmp_path: Path
) -> None:
    data = (b"\xef\xbb\xbf" if mark else b"") + render(rows, form, ascii_only)
    path = tmp_path / "rows"
    path.write_bytes(gzip.compress(data) if compress else data)
    records = list(read_records(path))
    assert [record.value for record in records] == rows
    assert [record.row for record in records] == list(range(len(rows)))


@in_a_folder
@given(
    rows=ROWS,
    form=st.sampled_from(["array", "indented", "lines"]),
    compress=st.booleans(),
    data=st.data(),
)
def test_a_damaged_file_is_named_or_read_but_never_a_traceback(
    rows: list[dict[str, Any]], form: str, compress: bool, data: st.DataObject, tmp_path: Path
) -> None:
    whole = render(rows, form, ascii_only=False)
    whole = gzip.compress(whole) if compress else whole
    place = data.draw(st.integers(0, len(whole) - 1))
    damaged = data.draw(
        st.sampled_from([whole[:place], whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]])
    )
    path = tmp_path / "damaged"
    path.write_bytes(damaged)
    try:
        list(read_records(path))
    except DataError as error:
        assert "damaged" in str(error)


@in_a_folder
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(data)
    try:
        list(read_records(path))
    except DataError as error:
        assert str(error).startswith(str(path))


# --- identity and split ---------------------------------------------------------------------------------------------


@given(conversations(), conversations())
def test_equal_content_has_equal_identity_and_other_content_another(first: Messages, second: Messages) -> None:
    copy = [{"content": message["content"], "role": message["role"]} for message in first]
    assert content_id(copy) == content_id(first)
    assert (content_id(first) == content_id(second)) == (first == second)


@given(conversations(), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_a_larger_held_out_share_takes_nothing_back(prompt: Messages, one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert 0 <= split_position(prompt) < 1
    assert is_held_out(prompt, small) <= is_held_out(prompt, large)
