"""One row as the conversion reads it and, with a model, the tokens that the model sees."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_cli.core.data_params import DataParams, Source
from dpo_cli.core.errors import DataError
from dpo_cli.data.blocks import convert_block, examples_file, fit_answers, read_arrow
from dpo_cli.data.chat import Encoding
from dpo_cli.data.checks import TokenView, check_example
from dpo_cli.data.formats.votes import VOTES
from dpo_cli.data.plan import BlockPlan, Treatment, find_files, plan_of, tally_of
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.reading.base import Record
from dpo_cli.data.reading.files import read_records
from dpo_cli.data.schema import PreferenceExample, RankingExample, SftExample, content_id, split_position
from dpo_cli.data.tokens import pieces_of

AnyExample = SftExample | PreferenceExample | RankingExample


def describe_row(source: Source, row: int, view: TokenView | None, data: DataParams | None = None) -> dict[str, Any]:
    """All that is known of one row, as JSON has it.

    Its ``left_out`` says for the row and each of its parts what would be left out, by which
    stage and why; rows are not compared with each other, so it names no repeats.

    Args:
        source: The file, with how it is read.
        row: Its number, from 0.
        view: How the model sees it, where that is wanted.
        data: Section data of the project; None: the defaults.

    Raises:
        DataError: The file cannot be read, or has no such row.
    """
    path, *others = find_files(source)
    if others:
        raise DataError(f"{source.path} stands for {1 + len(others)} files; name one of them, such as {path}")
    plan, why = plan_of(source, path, Treatment.of(data or DataParams()), before_broken=True)
    record = raw = _record_at(path, read_records(path, within=source.records), row)
    if plan.fallback == VOTES.name:  # with what the other votes on its item say
        record = _record_at(path, tally_of(source).records(path), row)
    stage = "convert-sft" if plan.kind == "sft" else "convert-preferences"
    found: dict[str, Any] = {
        "file": path.as_posix(),
        "row": record.row,
        "line": record.line,
        "kind": "sft" if plan.kind == "sft" else "preferences",
        "format": None,
        "why": why,
        "unread": [],
        "left_out": [],
        "parts": [],
    }
    if view is not None:
        found["model"] = _describe_view(view)
    if source.max_rows is not None and row >= source.max_rows:
        found["left_out"].append(_left_out("", stage, "max_rows", f"is after the first {source.max_rows} rows"))
    describing = _Describing(plan, view, stage, record)
    try:
        reader = plan.reader()
        fmt, content = reader.read(record.value)
        found |= {"format": fmt.name, "unread": list(reader.take_unread())}
        for part, example in content if isinstance(content, Iterator) else [("", content)]:
            found["parts"].append(describing.part(part, example))
    except RowProblem as problem:
        found["left_out"].append(_left_out("", stage, problem.reason, problem.detail))
    found["left_out"] += describing.left_out
    if not any("prompt" in part for part in found["parts"]):
        found["raw"] = _as_json(raw.value)
    return found


def _record_at(path: Path, records: Iterator[Record], row: int) -> Record:
    count = 0
    for record in records:
        if record.row == row:
            return record
        count = record.row + 1
    raise DataError(f"{path}: --row {row} is beyond its {count} rows, which are counted from 0 to {count - 1}")


def _left_out(part: str, stage: str, reason: str, detail: str) -> dict[str, str]:
    return {"part": part, "by": stage, "reason": reason, "detail": detail}


def _describe_view(view: TokenView) -> dict[str, Any]:
    def name(token_id: int | None) -> str | None:
        return None if token_id is None else view.encoder.tokenizer.convert_ids_to_tokens(token_id)

    return {
        "path": view.model,
        "max_length": view.max_length,
        "bos": name(view.encoder.tokenizer.bos_token_id),
        "eos": name(view.encoder.tokenizer.eos_token_id),
        "end_of_turn": name(view.encoder.end_id),
        "stops_at": [name(token_id) for token_id in view.encoder.stop_ids],
        "opener": view.encoder.opener,
        "warnings": view.encoder.warnings,
    }


class _Describing:
    """Describes the parts of a row, and keeps what is left out of it."""

    def __init__(self, plan: BlockPlan, view: TokenView | None, stage: str, record: Record) -> None:
        self.left_out: list[dict[str, str]] = []
        self._plan = plan
        self._view = view
        self._stage = stage
        self._copies, self._rejects = _convert(plan, record)

    def part(self, part: str, example: AnyExample | RowProblem) -> dict[str, Any]:
        """A part of the row: an example, or what is wrong with it."""
        if isinstance(example, RowProblem):
            return {"part": part, "left_out": self._drop(part, self._stage, example.reason, example.detail)}
        pairs = self._pairs_of(example, part) if isinstance(example, RankingExample) else []
        answers = _answers_of(example)
        found: dict[str, Any] = {
            "part": part,
            "kind": _KINDS[type(example)],
            **_identity(example, self._plan.treatment),
            "prompt": example.prompt,
            "answers": answers,
        }
        tokens: Encoding | RowProblem | None = None
        if self._view is not None and found["id"] is not None:
            try:
                tokens = self._view.encoder.encode(example.prompt, example.answers)
                found["tokens"] = _describe_tokens(self._view, tokens, [answer["name"] for answer in answers])
            except RowProblem as problem:
                tokens = problem
                found["tokens"] = {"problem": str(problem)}
        if isinstance(example, RankingExample) and pairs:
            found["pairs"] = []
            for better, worse in pairs:
                name = f"answers {better + 1} > {worse + 1}"
                pair = {"name": name, "better": better, "worse": worse}
                mine = tokens.only((better, worse)) if isinstance(tokens, Encoding) else tokens
                self._judge(f"{part}, {name}" if part else name, pair, example.pair(better, worse), mine)
                found["pairs"].append(pair)
            found["left_out"] = None
        else:
            self._judge(part, found, example, tokens)
        return found

    def _pairs_of(self, example: RankingExample, part: str) -> list[tuple[int, int]]:
        """The pairs of the answers that are fit, by their places; of the others it is said what they lack."""
        places, unfit = fit_answers(example, self._plan.treatment.policies)
        for place, check, detail in unfit:
            self._drop(f"{part}, answer {place + 1}" if part else f"answer {place + 1}", self._stage, check, detail)
        pairs = example.only(places).pairs(self._plan.reading.pairs) if len(places) > 1 else []
        return [(places[better], places[worse]) for better, worse in pairs]

    def _judge(
        self, part: str, found: dict[str, Any], example: AnyExample, tokens: Encoding | RowProblem | None
    ) -> None:
        """Add what checks find in an example, and whether it is left out."""
        # a ranking that has no pairs is a tie
        failed = [] if isinstance(example, RankingExample) else check_example(example)
        found["checks"] = {name: self._plan.treatment.policies[name] for name in failed}
        reason, stage = self._rejects.get(part), self._stage
        problem, view = tokens if isinstance(tokens, RowProblem) else None, self._view
        if view is not None and isinstance(tokens, Encoding):
            failed, problem = view.judge(example.prompt, example.answers, tokens)
            found["token_checks"] = {name: view.policies[name] for name in failed}
        if reason is None and problem is not None:
            reason, stage = (problem.reason, problem.detail), "sft" if self._plan.kind == "sft" else "precompute-ref"
        found["left_out"] = None if reason is None else self._drop(part, stage, *reason)
        if self._copies.get(part, 1) > 1:
            found["copies"] = self._copies[part]

    def _drop(self, part: str, stage: str, reason: str, detail: str) -> dict[str, str]:
        self.left_out.append(_left_out(part, stage, reason, detail))
        return self.left_out[-1]


def _convert(plan: BlockPlan, record: Record) -> tuple[dict[str, int], dict[str, tuple[str, str]]]:
    """What the conversion makes of a row: how often each part is written, and why each of the others is left out."""
    with tempfile.TemporaryDirectory(prefix="dpo-cli-") as folder:
        result = convert_block(plan, [record], Path(folder), 0)
        rows = read_arrow(examples_file(Path(folder), 0)).to_pylist() if result.num_examples else []
    copies = {row["part"]: row["copies"] for row in rows}
    return copies, {reject.part: (reject.reason, reject.detail) for reject in result.rejects}


_KINDS = {SftExample: "instruction", PreferenceExample: "pair", RankingExample: "ranking"}


def _answers_of(example: AnyExample) -> list[dict[str, Any]]:
    if isinstance(example, SftExample):
        return [{"name": "completion", "messages": example.completion}]
    if isinstance(example, PreferenceExample):
        sides = (
            ("chosen", example.chosen, example.chosen_score),
            ("rejected", example.rejected, example.rejected_score),
        )
        return [{"name": name, "messages": side, "score": score} for name, side, score in sides if side]
    scores = example.scores or [None] * len(example.ranks)
    return [
        {"name": f"answer {place}", "messages": messages, "rank": rank, "score": score}
        for place, (messages, rank, score) in enumerate(
            zip(example.completions, example.ranks, scores, strict=True), start=1
        )
    ]


def _identity(example: AnyExample, treatment: Treatment) -> dict[str, Any]:
    sides = (example.chosen, example.rejected) if isinstance(example, PreferenceExample) else example.answers
    try:
        is_held_out = split_position(example.prompt, treatment.split_by) < treatment.eval_fraction
        return {
            "id": content_id(example.prompt, *sides),
            "split": "eval" if is_held_out else "train",
        }
    except UnicodeEncodeError:  # half of a surrogate pair, for which the row is left out
        return {"id": None, "split": None}


def _describe_tokens(view: TokenView, encoding: Encoding, names: Sequence[str]) -> dict[str, Any]:
    """Counts and texts of the tokens of a prompt and of its answers."""

    def described(ids: Sequence[int]) -> dict[str, Any]:
        return {"count": len(ids), "pieces": [vars(piece) for piece in pieces_of(view.encoder.tokenizer, ids)]}

    before = len(encoding.prompt)
    return {
        "max_length": view.max_length,
        "prompt": described(encoding.prompt),
        "answers": [
            {
                "name": name,
                **described(ids),
                "with_prompt": before + len(ids),
                "over_long": before + len(ids) > view.max_length,
            }
            for name, ids in zip(names, encoding.completions, strict=True)
        ],
    }


# --- as JSON ------------------------------------------------------------------------------


def json_of(found: Mapping[str, Any]) -> str:
    """A description as one line of JSON; half surrogates, which no encoding has, are escaped."""
    text = json.dumps(found, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(found)
    return text


def _as_json(value: Any) -> Any:
    """A raw value, with what JSON has no value for as text."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(inner) for inner in value]
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
