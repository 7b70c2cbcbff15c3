"""One row as the conversion reads it and, with a model, the tokens that the model sees."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from dpo_cli.core.data_params import DataParams, Source
from dpo_cli.core.errors import DataError
from dpo_cli.data.block_files import examples_file
from dpo_cli.data.blocks import SAMPLED_OUT, convert_block, fit_answers
from dpo_cli.data.chat import ChatEncoder, Encoding
from dpo_cli.data.checks import check_preference, check_sft
from dpo_cli.data.pieces import pieces_of
from dpo_cli.data.plan import BlockPlan, Treatment, find_files, plan_of
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.reading.base import Record
from dpo_cli.data.reading.files import read_records
from dpo_cli.data.schema import Messages, PreferenceExample, RankingExample, SftExample, content_id
from dpo_cli.data.splits import is_held_out
from dpo_cli.data.token_checks import TOKEN_DETAILS, check_tokens

AnyExample = SftExample | PreferenceExample | RankingExample


# --- tokens -------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenView:
    """How a model sees text.

    Attributes:
        model: The model's folder, or ``embedded``.
        tokenizer: Its tokenizer.
        encoder: The tokenizer with the chat template.
        max_length: Tokens a prompt with one answer may have; longer rows are left out.
        policies: What is done with what each check of tokens finds.
    """

    model: str
    tokenizer: Any
    encoder: ChatEncoder
    max_length: int
    policies: Mapping[str, str]


# --- what there is to say of a row ----------------------------------------------------------------


def describe_row(source: Source, row: int, view: TokenView | None, data: DataParams | None = None) -> dict[str, Any]:
    """All that is known of one row, as JSON has it.

    Its ``left_out`` says for the row and each of its parts what would be left out, by which
    stage and why; rows are not compared with each other, so it names no repeats.

    Args:
        source: The file, with how it is read.
        row: The number of the row, from 0.
        view: How the model sees it, where that is wanted.
        data: Section data of the project; None: the defaults.

    Raises:
        DataError: The file cannot be read, or has no such row.
    """
    path = _only_file(source)
    data = data or DataParams()
    plan, why = plan_of(source, path, Treatment.of(data), before_broken=True)
    record = _record_at(path, source.records, row)
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
        found["left_out"].append(_left_out("", stage, "max_rows", f"lies behind the first {source.max_rows} rows"))
    describing = _Describing(plan, view, stage, _Fate.of(plan, record))
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
        found["raw"] = _as_json(record.value)
    return found


def _only_file(source: Source) -> Path:
    files = find_files(source)
    if len(files) > 1:
        raise DataError(f"{source.path} stands for {len(files)} files; name one of them, such as {files[0]}")
    return files[0]


def _record_at(path: Path, within: str, row: int) -> Record:
    count = 0
    for record in read_records(path, within=within):
        if record.row == row:
            return record
        count = record.row + 1
    raise DataError(f"{path}: --row {row} is beyond its {count} rows, which are counted from 0 to {count - 1}")


def _left_out(part: str, stage: str, reason: str, detail: str) -> dict[str, str]:
    return {"part": part, "by": stage, "reason": reason, "detail": detail}


def _describe_view(view: TokenView) -> dict[str, Any]:
    def name(token_id: int | None) -> str | None:
        return None if token_id is None else view.tokenizer.convert_ids_to_tokens(token_id)

    return {
        "path": view.model,
        "max_length": view.max_length,
        "bos": name(view.tokenizer.bos_token_id),
        "eos": name(view.tokenizer.eos_token_id),
        "end_of_turn": name(view.encoder.end_id),
        "stops_at": [name(token_id) for token_id in view.encoder.stop_ids],
        "opener": view.encoder.opener,
        "warnings": view.encoder.warnings,
    }


@dataclass(frozen=True)
class _Fate:
    """What the conversion makes of a row, asked of the conversion itself.

    Attributes:
        copies: How often each part is written.
        rejects: Reason and detail of each part that is left out.
    """

    copies: Mapping[str, int]
    rejects: Mapping[str, tuple[str, str]]

    @staticmethod
    def of(plan: BlockPlan, record: Record) -> _Fate:
        """Convert one row in a folder that does not last."""
        with tempfile.TemporaryDirectory(prefix="dpo-cli-") as folder:
            result = convert_block(plan, [record], Path(folder), 0)
            rows: list[dict[str, Any]] = []
            if result.num_examples:
                with pa.OSFile(str(examples_file(Path(folder), 0))) as file:
                    rows = pa.ipc.open_file(file).read_all().select(["part", "copies"]).to_pylist()
        return _Fate(
            {row["part"]: row["copies"] for row in rows},
            {reject.part: (reject.reason, reject.detail) for reject in result.rejects},
        )

    def reason(self, part: str) -> tuple[str, str] | None:
        """Why a part is left out, if it is."""
        if part in self.copies:
            return None if self.copies[part] else (SAMPLED_OUT, "is left out by the weight of its source")
        return self.rejects.get(part)


class _Describing:
    """Describes the parts of a row, and keeps what is left out of it."""

    def __init__(self, plan: BlockPlan, view: TokenView | None, stage: str, fate: _Fate) -> None:
        self.left_out: list[dict[str, str]] = []
        self._plan = plan
        self._view = view
        self._stage = stage
        self._fate = fate

    def part(self, part: str, example: AnyExample | RowProblem) -> dict[str, Any]:
        """A part of the row: an example, or what is wrong with it."""
        if isinstance(example, RowProblem):
            return {"part": part, "left_out": self._drop(part, self._stage, example.reason, example.detail)}
        pairs = self._pairs_of(example, part) if isinstance(example, RankingExample) else []
        answers = _answers_of(example)
        found: dict[str, Any] = {
            "part": part,
            "kind": _KINDS[type(example)],
            **_identity(example.prompt, [answer["messages"] for answer in answers], self._plan),
            "prompt": example.prompt,
            "answers": answers,
        }
        tokens: _Tokens | RowProblem | None = None
        if self._view is not None and found["id"] is not None:
            tokens = _Tokens.of(self._view, example.prompt, [answer["messages"] for answer in answers])
        if isinstance(tokens, _Tokens):
            found["tokens"] = tokens.describe([answer["name"] for answer in answers])
        elif tokens is not None:
            found["tokens"] = {"problem": str(tokens)}
        if isinstance(example, RankingExample) and pairs:
            found["pairs"] = [
                self._outcome(
                    f"{part}, {name}" if part else name,
                    {"name": name, "better": better, "worse": worse},
                    example.pair(better, worse),
                    tokens,
                    (better, worse),
                )
                for better, worse in pairs
                for name in [f"answers {better + 1} > {worse + 1}"]
            ]
            found["left_out"] = None
            return found
        return self._outcome(part, found, example, tokens, range(len(answers)))

    def _pairs_of(self, example: RankingExample, part: str) -> list[tuple[int, int]]:
        """The pairs of the answers that are fit, by their places; of the others it is said what they lack."""
        places, unfit = fit_answers(example, self._plan.treatment.policies)
        for place, check, detail in unfit:
            self._drop(f"{part}, answer {place + 1}" if part else f"answer {place + 1}", self._stage, check, detail)
        pairs = example.only(places).pairs(self._plan.reading.pairs) if len(places) > 1 else []
        return [(places[better], places[worse]) for better, worse in pairs]

    def _outcome(
        self,
        part: str,
        found: dict[str, Any],
        example: AnyExample,
        tokens: _Tokens | RowProblem | None,
        places: Iterable[int],
    ) -> dict[str, Any]:
        """Add what checks find in an example, and whether it is left out."""
        if isinstance(example, RankingExample):
            failed = []  # a ranking without pairs: a tie
        else:
            failed = check_sft(example) if isinstance(example, SftExample) else check_preference(example)
        found["checks"] = {name: self._plan.treatment.policies[name] for name in failed}
        reason, stage = self._fate.reason(part), self._stage
        if isinstance(tokens, _Tokens):
            found["token_checks"], token_reason = tokens.judge(places)
        else:
            token_reason = None if tokens is None else (tokens.reason, tokens.detail)
        if reason is None and token_reason is not None:
            reason, stage = token_reason, "sft" if self._plan.kind == "sft" else "precompute-ref"
        found["left_out"] = None if reason is None else self._drop(part, stage, *reason)
        if self._fate.copies.get(part, 1) > 1:
            found["copies"] = self._fate.copies[part]
        return found

    def _drop(self, part: str, stage: str, reason: str, detail: str) -> dict[str, str]:
        dropped = _left_out(part, stage, reason, detail)
        self.left_out.append(dropped)
        return dropped


_KINDS = {SftExample: "instruction", PreferenceExample: "pair", RankingExample: "ranking"}


def _answers_of(example: AnyExample) -> list[dict[str, Any]]:
    if isinstance(example, SftExample):
        return [{"name": "completion", "messages": example.completion}]
    if isinstance(example, PreferenceExample):
        return [
            {"name": "chosen", "messages": example.chosen, "score": example.chosen_score},
            {"name": "rejected", "messages": example.rejected, "score": example.rejected_score},
        ]
    scores = example.scores or [None] * len(example.ranks)
    return [
        {"name": f"answer {place}", "messages": messages, "rank": rank, "score": score}
        for place, (messages, rank, score) in enumerate(
            zip(example.completions, example.ranks, scores, strict=True), start=1
        )
    ]


def _identity(prompt: Messages, answers: Sequence[Messages], plan: BlockPlan) -> dict[str, Any]:
    try:
        return {
            "id": content_id(prompt, *answers),
            "split": "eval" if is_held_out(prompt, plan.treatment.eval_fraction, plan.treatment.split_by) else "train",
        }
    except UnicodeEncodeError:  # half of a surrogate pair, for which the row is left out
        return {"id": None, "split": None}


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a prompt and its answers."""

    view: TokenView
    prompt: Messages
    messages: Sequence[Messages]
    encoding: Encoding

    @staticmethod
    def of(view: TokenView, prompt: Messages, answers: Sequence[Messages]) -> _Tokens | RowProblem:
        """Apply the chat template; the problem, where it refuses the messages."""
        try:
            return _Tokens(view, prompt, answers, view.encoder.encode(prompt, answers))
        except RowProblem as problem:
            return problem

    def describe(self, names: Sequence[str]) -> dict[str, Any]:
        """Counts and texts."""
        limit, prompt = self.view.max_length, self.encoding.prompt
        return {
            "max_length": limit,
            "prompt": {"count": len(prompt), "pieces": self._pieces(prompt)},
            "answers": [
                {
                    "name": name,
                    "count": len(ids),
                    "with_prompt": len(prompt) + len(ids),
                    "over_long": len(prompt) + len(ids) > limit,
                    "pieces": self._pieces(ids),
                }
                for name, ids in zip(names, self.encoding.completions, strict=True)
            ],
        }

    def judge(self, places: Iterable[int]) -> tuple[dict[str, str], tuple[str, str] | None]:
        """The checks that some of the answers fail, with their policies, and why they are left out, if they are."""
        places = list(places)
        view, encoding = self.view, self.encoding.only(places)
        found = check_tokens(view.encoder, self.prompt, [self.messages[place] for place in places], encoding)
        longest = len(encoding.prompt) + max(map(len, encoding.completions))
        if longest > view.max_length:
            found = ["over_long", *found]
        failed = {name: view.policies[name] for name in found}
        if "over_long" in failed:
            return failed, ("over_long", f"has {longest} tokens, more than {view.max_length}")
        dropped = next((name for name, policy in failed.items() if policy != "keep"), None)
        return failed, None if dropped is None else (dropped, TOKEN_DETAILS[dropped])

    def _pieces(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {"text": piece.text, "ids": list(piece.ids), "special": piece.special}
            for piece in pieces_of(self.view.tokenizer, ids)
        ]


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
