"""``dpo-cli data show``: one row as the conversion reads it and, with a model, the tokens that the model sees."""

from __future__ import annotations

import json
import math
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.text import Text

from dpo_cli.cli.sources import policies_of, project_params
from dpo_cli.core.errors import DataError, MachineError, ParamsError
from dpo_cli.core.params import EMBEDDED, DataParams, ReferenceParams, SftParams, SftSource, Source
from dpo_cli.data.blocks import SAMPLED_OUT, BlockPlan, convert_block, examples_file, fit_answers
from dpo_cli.data.chat import NAMED_TEMPLATES, ChatEncoder
from dpo_cli.data.checks import check_preference, check_sft
from dpo_cli.data.convert import find_files, plan_of
from dpo_cli.data.formats.base import RowProblem
from dpo_cli.data.reading.base import Record
from dpo_cli.data.reading.files import read_records
from dpo_cli.data.schema import Messages, PreferenceExample, RankingExample, SftExample, content_id
from dpo_cli.data.splits import is_held_out

AnyExample = SftExample | PreferenceExample | RankingExample

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")


# --- tokens -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Tokens that are shown together: one, or the several that a character is split over.

    Attributes:
        text: Their text, or the name of a special token.
        ids: Their ids.
        special: Whether it is a special token, such as the one that ends a turn.
    """

    text: str
    ids: tuple[int, ...]
    special: bool = False


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


def encoder_of(model: str, template: str | None) -> tuple[Any, ChatEncoder]:
    """A model's tokenizer, and with it the chat template; no weights are read.

    Args:
        model: The model's folder, or ``embedded``.
        template: ``auto`` or a template's name; None: what the project's params.yaml says.

    Raises:
        ParamsError: There is no template of that name.
        MachineError: The folder is missing, or its tokenizer cannot be used.
    """
    names = ("auto", *NAMED_TEMPLATES)
    if template is not None and template not in names:
        raise ParamsError(f"--template must be one of {', '.join(names)}, got {template!r}")
    if template is None:
        params = project_params()
        template = params.model.chat_template if params is not None and model != EMBEDDED else "auto"
    folder = Path(model).expanduser()
    if model != EMBEDDED and not folder.is_dir():
        raise MachineError(
            f"--model {model}: there is no such folder; name a model in Hugging Face layout, or embedded"
        )
    if model != EMBEDDED and not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_FILES):
        raise MachineError(f"--model {model}: no tokenizer is there, such as tokenizer.json; fetch the whole model")
    from dpo_cli.models.load import load_tokenizer, quiet_libraries  # here: it takes seconds, and only --model needs it

    quiet_libraries()
    if model == EMBEDDED:
        from dpo_cli.models.embedded import build_tokenizer

        tokenizer: Any = build_tokenizer()
    else:
        tokenizer = load_tokenizer(folder)
    try:
        return tokenizer, ChatEncoder(tokenizer, template)
    except MachineError as error:
        raise MachineError(
            [f"--model {model}: {problem}; here with --template" for problem in error.problems]
        ) from None


def token_view(model: str, template: str | None, max_length: int | None, source: Source) -> TokenView:
    """How a model sees the rows of a source, with the limits of the project or the defaults.

    Raises:
        ParamsError: There is no template of that name.
        MachineError: The folder is missing, or its tokenizer cannot be used.
    """
    params = project_params()
    if isinstance(source, SftSource):
        section: SftParams | ReferenceParams = params.sft if params else SftParams()
    else:
        section = params.reference if params else ReferenceParams()
    tokenizer, encoder = encoder_of(model, template)
    return TokenView(model, tokenizer, encoder, max_length or section.max_length, section.checks.model_dump())


def pieces_of(tokenizer: Any, ids: Sequence[int]) -> list[Piece]:
    """Token ids as texts that can be read; special tokens by their names.

    A character that is split over several tokens is one piece, so that no half of it is shown.
    """
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    real = tuple(
        tokenizer("\ufffd", add_special_tokens=False)["input_ids"]
    )  # this character itself, which halves look like
    pieces: list[Piece] = []
    before: tuple[int, ...] = ()  # some decoders leave out the space at the very start
    waiting: tuple[int, ...] = ()
    for token_id in ids:
        if token_id in special:
            if waiting:
                pieces.append(_piece(tokenizer, before, waiting))
            pieces.append(Piece(str(tokenizer.convert_ids_to_tokens(token_id)), (token_id,), special=True))
            before, waiting = (token_id,), ()
            continue
        waiting = (*waiting, token_id)
        piece = _piece(tokenizer, before, waiting)
        if piece.text and (not piece.text.endswith("\ufffd") or waiting[-len(real) :] == real):
            pieces.append(piece)
            before, waiting = waiting, ()
    if waiting:
        pieces.append(_piece(tokenizer, before, waiting))
    return pieces


def _piece(tokenizer: Any, before: tuple[int, ...], ids: tuple[int, ...]) -> Piece:
    """Some tokens as a piece, decoded behind those that stand before them."""
    start, whole = _decode(tokenizer, before), _decode(tokenizer, before + ids)
    return Piece(whole[len(start) :] if whole.startswith(start) else _decode(tokenizer, ids), ids)


def _decode(tokenizer: Any, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""


# --- what there is to say of a row ----------------------------------------------------------------


def describe_row(source: Source, row: int, view: TokenView | None) -> dict[str, Any]:
    """All that is known of one row, as JSON has it.

    Its ``left_out`` says for the row and each of its parts what would be left out, by which
    stage and why; rows are not compared with each other, so it names no repeats.

    Args:
        source: The file, with how it is read.
        row: The number of the row, from 0.
        view: How the model sees it, where that is wanted.

    Raises:
        DataError: The file cannot be read, or has no such row.
    """
    path = _only_file(source)
    params = project_params()
    plan, why = plan_of(source, path, policies_of(), (params.data if params else DataParams()).eval_fraction)
    record = _record_at(path, source.records, row)
    stage = "convert-sft" if plan.kind == "sft" else "convert-preferences"
    found: dict[str, Any] = {
        "file": path.as_posix(),
        "row": record.row,
        "line": record.line,
        "kind": "sft" if plan.kind == "sft" else "preferences",
        "format": None,
        "why": why,
        "left_out": [],
        "parts": [],
    }
    if view is not None:
        found["model"] = _describe_view(view)
    if source.max_rows is not None and row >= source.max_rows:
        found["left_out"].append(_left_out("", stage, "max_rows", f"lies behind the first {source.max_rows} rows"))
    describing = _Describing(plan, view, stage, _Fate.of(plan, record))
    try:
        fmt, content = plan.reader().read(record.value)
        found["format"] = fmt.name
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
            **_identity(example.prompt, [answer["messages"] for answer in answers], self._plan.eval_fraction),
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
        places, unfit = fit_answers(example, self._plan.policies)
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
        found["checks"] = {name: self._plan.policies[name] for name in failed}
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


def _identity(prompt: Messages, answers: Sequence[Messages], eval_fraction: float) -> dict[str, Any]:
    try:
        return {
            "id": content_id(prompt, *answers),
            "split": "eval" if is_held_out(prompt, eval_fraction) else "train",
        }
    except UnicodeEncodeError:  # half of a surrogate pair, for which the row is left out
        return {"id": None, "split": None}


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a prompt and its answers."""

    view: TokenView
    prompt: list[int]
    messages: Sequence[Messages]
    answers: Sequence[list[int]]

    @staticmethod
    def of(view: TokenView, prompt: Messages, answers: Sequence[Messages]) -> _Tokens | RowProblem:
        """Apply the chat template; the problem, where it refuses the messages."""
        try:
            return _Tokens(
                view,
                view.encoder.encode_prompt(prompt),
                answers,
                [view.encoder.encode_completion(prompt, answer) for answer in answers],
            )
        except RowProblem as problem:
            return problem

    def describe(self, names: Sequence[str]) -> dict[str, Any]:
        """Counts and texts."""
        limit = self.view.max_length
        return {
            "max_length": limit,
            "prompt": {"count": len(self.prompt), "pieces": self._pieces(self.prompt)},
            "answers": [
                {
                    "name": name,
                    "count": len(ids),
                    "with_prompt": len(self.prompt) + len(ids),
                    "over_long": len(self.prompt) + len(ids) > limit,
                    "pieces": self._pieces(ids),
                }
                for name, ids in zip(names, self.answers, strict=True)
            ],
        }

    def judge(self, places: Iterable[int]) -> tuple[dict[str, str], tuple[str, str] | None]:
        """The checks that some of the answers fail, with their policies, and why they are left out, if they are."""
        places = list(places)
        view, ids = self.view, [self.answers[place] for place in places]
        found = view.encoder.check_tokens(self.prompt, [self.messages[place] for place in places], ids)
        longest = len(self.prompt) + max(map(len, ids))
        if longest > view.max_length:
            found = ["over_long", *found]
        failed = {name: view.policies[name] for name in found}
        if "over_long" in failed:
            return failed, ("over_long", f"has {longest} tokens, more than {view.max_length}")
        dropped = next((name for name, policy in failed.items() if policy != "keep"), None)
        return failed, None if dropped is None else (dropped, f"its tokens fail the check {dropped}")

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


_LONG_TEXT, _LONG_LIST, _LONG_ROW = 240, 8, 60


def _shortened(value: Any) -> Any:
    """A raw value with its long texts and lists cut; each cut says how much there was."""
    if isinstance(value, str) and len(value) > _LONG_TEXT:
        return f"{value[:_LONG_TEXT]}… ({len(value)} characters)"
    if isinstance(value, list):
        more = [f"… ({len(value)} in all)"] if len(value) > _LONG_LIST else []
        return [*map(_shortened, value[:_LONG_LIST]), *more]
    if isinstance(value, dict):
        shown = {key: _shortened(inner) for key, inner in islice(value.items(), _LONG_LIST * 3)}
        return {**shown, "…": f"({len(value)} fields in all)"} if len(value) > len(shown) else shown
    return value


# --- on the terminal ----------------------------------------------------------------------

_CONTEXT, _SCORED = "cyan", "green"
_SEPARATOR = "│"
_WIDTH = 80
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_SHOWN = {"\n": "\n", "\t": "\t", "\x7f": "␡"}
_JOINERS = "\u200c\u200d"
"""Characters without a shape of their own that emoji and some scripts need between others."""


def print_row(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what :func:`describe_row` found."""
    _Page(console or Console(highlight=False)).row(found)


def visible(text: str) -> str:
    """A text of which nothing is hidden and nothing steers the terminal: control characters as signs."""
    return "".join(map(_visible_character, text)) if not text.isprintable() else text


def _visible_character(character: str) -> str:
    if character in _SHOWN:
        return _SHOWN[character]
    if character < " ":
        return chr(0x2400 + ord(character))
    if unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in _JOINERS:
        return f"\\u{ord(character):04x}"
    return character


class _Page:
    """Prints a row. Long lines are left to the terminal, so that a pipe gets the texts as they are."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._width = min(console.width, _WIDTH)

    def row(self, found: Mapping[str, Any]) -> None:
        """Print all of it."""
        parts = found["parts"]
        dropped = found["left_out"]
        if len(dropped) == 1:
            part = f", {dropped[0]['part']}," if dropped[0]["part"] else ""
            self._print_left_out(f"row {found['row']}{part}", dropped[0])
        elif dropped:
            reasons = Counter(f"{one['reason']} ({one['by']})" for one in dropped)
            named = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            self._line(f"row {found['row']}: {len(dropped)} parts are left out: {named}; see below", "bold red")
        line = "" if found["line"] is None else f" (line {found['line']})"
        self._fact("file", found["file"])
        self._fact("row", f"{found['row']}{line}")
        self._fact("read as", f"{found['kind']}; {found['why']}")
        if found.get("model"):
            model = found["model"]
            self._fact("model", model["path"])
            self._fact(
                "special", f"BOS {model['bos'] or 'none'}, EOS {model['eos']}; a turn ends with {model['end_of_turn']}"
            )
        if len(parts) > 1:
            self._fact("parts", str(len(parts)))
        for part in parts:
            self._part(part)
        if "raw" in found:
            self._raw(found["raw"])

    def _part(self, part: Mapping[str, Any]) -> None:
        if part["part"]:
            self._line("")
            self._rule(f"part {part['part']}", "═", "bold")
        if "prompt" not in part:
            self._print_left_out("", part["left_out"])
            return
        if part["left_out"] and part["part"]:
            self._print_left_out("", part["left_out"])
        self._facts(part)
        for message in part["prompt"]:
            self._message(message["role"], message["content"], _CONTEXT)
        self._boundary("the prompt ends here; what follows are its answers")
        for answer in part["answers"]:
            title = _title_of(answer)
            for message in answer["messages"]:
                role = "" if message["role"] == "assistant" else f", {message['role']}"
                self._message(f"{title}{role}", message["content"], _SCORED)
        if "tokens" in part:
            self._tokens(part)

    def _facts(self, part: Mapping[str, Any]) -> None:
        copies = f", {part['copies']} times" if "copies" in part else ""
        self._fact("id", part["id"] or "none")
        self._fact("split", f"{part['split'] or 'none'}{copies}")
        if "pairs" not in part:
            if part["kind"] != "ranking":
                self._fact("checks", _checks_text(part["checks"]))
            return
        self._fact("pairs", str(len(part["pairs"])))
        for pair in part["pairs"]:
            failed = _checks_text({**pair["checks"], **pair.get("token_checks", {})})
            dropped = pair["left_out"]
            what = f"LEFT OUT by {dropped['by']}: {dropped['reason']}: {dropped['detail']}" if dropped else failed
            self._fact("", f"{pair['name']}: {what}")

    def _message(self, title: str, content: str, style: str) -> None:
        self._rule(title, "─", style)
        if content.strip():
            self._line(visible(content))
        else:
            self._line(f"(empty: {content!r})" if content else "(empty)", "dim")

    # --- tokens -------------------------------------------------------------------------------

    def _tokens(self, part: Mapping[str, Any]) -> None:
        tokens = part["tokens"]
        self._line("")
        if "problem" in tokens:
            self._rule("tokens", "─", "bold")
            self._line(f"none: {tokens['problem']}", "red")
            return
        groups = [tokens["prompt"]["pieces"], *(answer["pieces"] for answer in tokens["answers"])]
        self._rule(f"tokens of the prompt: {tokens['prompt']['count']}, not scored", "─", _CONTEXT)
        text = _token_text(tokens["prompt"]["pieces"], _CONTEXT)
        if text.plain.endswith("\n"):
            text.right_crop()  # a line end is printed anyway
        self._console.print(text, soft_wrap=True)
        self._boundary("the prompt ends here; what follows is scored")
        for answer in tokens["answers"]:
            self._rule(f"tokens of {answer['name']}: {answer['count']}, scored", "─", _SCORED)
            text = Text.assemble(("⟦", "bold"), _token_text(answer["pieces"], _SCORED), ("⟧", "bold"))
            self._console.print(text, soft_wrap=True)
        self._line("")
        self._line(_legend(groups), "dim")
        self._token_facts(part)

    def _token_facts(self, part: Mapping[str, Any]) -> None:
        tokens = part["tokens"]
        longest = max(answer["with_prompt"] for answer in tokens["answers"])
        over = longest > tokens["max_length"]
        counts = [f"{one['name']}: {one['count']} ({one['with_prompt']} with the prompt)" for one in tokens["answers"]]
        self._fact("tokens", "; ".join([f"prompt: {tokens['prompt']['count']}", *counts]))
        self._fact(
            "longest", f"{longest}, {'MORE than' if over else 'within'} the {tokens['max_length']} of max_length"
        )
        if "token_checks" in part:
            self._fact("checks", _checks_text(part["token_checks"]))

    # --- lines --------------------------------------------------------------------------------

    def _raw(self, raw: Any) -> None:
        self._rule("the row as the file has it", "─", "bold")
        lines = json.dumps(_shortened(raw), ensure_ascii=False, indent=2).splitlines()
        for line in lines[:_LONG_ROW]:
            self._line(visible(line))
        if len(lines) > _LONG_ROW:
            self._line(f"… ({len(lines)} lines in all)", "dim")

    def _print_left_out(self, what: str, dropped: Mapping[str, str]) -> None:
        where = f"{what} is left out" if what else "left out"
        self._line(visible(f"{where} by {dropped['by']}: {dropped['reason']}: {dropped['detail']}"), "bold red")

    def _fact(self, name: str, value: str) -> None:
        self._console.print(Text.assemble((f"{name:<9}", "dim"), visible(value)), soft_wrap=True)

    def _line(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style), soft_wrap=True)

    def _boundary(self, text: str) -> None:
        self._rule(text, "━", "bold yellow")

    def _rule(self, title: str, mark: str, style: str) -> None:
        head = f"{mark * 2} {visible(title)} "
        self._line(head + mark * max(self._width - Text(head).cell_len, 0), style)


def _title_of(answer: Mapping[str, Any]) -> str:
    facts = [f"{name} {answer[name]:g}" for name in ("rank", "score") if answer.get(name) is not None]
    return f"{answer['name']} ({', '.join(facts)})" if facts else answer["name"]


def _checks_text(failed: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({policy})" for name, policy in failed.items()) or "nothing found (of this row alone)"


def _token_text(pieces: Sequence[Mapping[str, Any]], style: str) -> Text:
    """Tokens with a line between them; a special one stands out."""
    text = Text()
    for number, piece in enumerate(pieces):
        if number:
            text.append(_SEPARATOR, "dim")
        text.append(_visible_token(piece["text"]), f"bold reverse {style}" if piece["special"] else style)
        if len(piece["ids"]) > 1:
            text.append(str(len(piece["ids"])).translate(_SUPERSCRIPTS), "dim")
    return text


def _visible_token(text: str) -> str:
    """A token's text, with all in it that has no shape of its own made visible."""
    first = unicodedata.category(text[0]) if text else ""
    if text and (text[0] in _JOINERS or "\ufe00" <= text[0] <= "\ufe0f"):
        text = f"\\u{ord(text[0]):04x}{text[1:]}"
    elif first.startswith("M"):
        text = f"◌{text}"  # else it would sit on the sign before it
    return visible(text.replace("\n", "⏎\n").replace("\t", "⇥"))


def _legend(groups: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    pieces = [piece for group in groups for piece in group]
    signs = [f"{_SEPARATOR} parts tokens", "⟦ ⟧ hold what is scored, the end token included"]
    if any("\n" in piece["text"] for piece in pieces):
        signs.append("⏎ is a line end")
    if any("\t" in piece["text"] for piece in pieces):
        signs.append("⇥ is a tab")
    if any(len(piece["ids"]) > 1 for piece in pieces):
        signs.append("⁴ follows a character split over four tokens")
    return "; ".join(signs)
