"""What ``dpo-cli data`` prints: a row with its messages, tokens and facts, and the figures of data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from rich.console import Console
from rich.text import Text

from dpo_cli.cli.console import open_console
from dpo_cli.core.progress import Reporter
from dpo_cli.core.text import NO_TEXT, visible, visible_token
from dpo_cli.data.problem import shown_name
from dpo_cli.data.schema import TOOLS
from dpo_cli.data.statistics import NO_LETTERS, TOO_SHORT

_LONG_PROMPT, _LONG_PROMPT_PIECES = 1200, 150
"""Characters and tokens at either end of a long prompt's message that are always shown."""
_LONG_TEXT, _LONG_LIST, _LONG_ROW = 240, 8, 60

_CONTEXT, _SCORED = "cyan", "green"
_BOUNDARY = "━", "bold yellow"
_SEPARATOR = "│"
_WIDTH = 80
_BAR = 36
_EIGHTHS = " ▏▎▍▌▋▊▉"
_NAMED = 8
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def print_row(found: Mapping[str, Any], console: Console | None = None, *, whole: bool = False) -> None:
    """Print what :func:`describe_row` found.

    Args:
        found: What to print.
        console: Where; None: standard output.
        whole: Leave nothing out of the middle of a long prompt.
    """
    _Page(console or open_console(), whole=whole).row(found)


class _Page:
    """Prints a row. Long lines are left to the terminal, so that a pipe gets the texts as they are."""

    def __init__(self, console: Console, *, whole: bool) -> None:
        self._console = console
        self._whole = whole
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
        if found["unread"]:
            self._fact("not read", ", ".join(map(shown_name, found["unread"])))
        if found.get("model"):
            model = found["model"]
            self._fact("model", model["path"])
            self._fact(
                "special", f"BOS {model['bos'] or 'none'}, EOS {model['eos']}; a turn ends with {model['end_of_turn']}"
            )
            if len(model["stops_at"]) > 1:
                self._fact("stops at", ", ".join(map(str, model["stops_at"])))
            for warning in model["warnings"]:
                self._fact("warning", warning)
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
        if part["prompt"] and TOOLS in part["prompt"][0]:
            self._rule("tools", "─", _CONTEXT)
            self._line(visible(part["prompt"][0][TOOLS]))
        for message in part["prompt"]:
            self._message(message["role"], message if self._whole else _without_middle(message), _CONTEXT)
        self._rule("the prompt ends here; what follows are its answers", *_BOUNDARY)
        for answer in part["answers"]:
            title = _title_of(answer)
            for message in answer["messages"]:
                role = "" if message["role"] == "assistant" else f", {message['role']}"
                self._message(f"{title}{role}", message, _SCORED)
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

    def _message(self, title: str, message: Mapping[str, str], style: str) -> None:
        answers = f" to {message['tool_call_id']}" if "tool_call_id" in message else ""
        self._rule(f"{title}{answers}{' of ' + message['name'] if 'name' in message else ''}", "─", style)
        content, calls = message["content"], message.get("tool_calls")
        if reasoning := message.get("reasoning_content"):
            self._line("reasoning:", "dim")
            self._line(visible(reasoning))
            self._line("answer:", "dim")
        if content.strip():
            self._line(visible(content))
        elif not calls:
            self._line(f"(empty: {content!r})" if content else "(empty)", "dim")
        if calls:
            self._line("calls:", "dim")
            self._line(visible(calls))

    # --- tokens -------------------------------------------------------------------------------

    def _tokens(self, part: Mapping[str, Any]) -> None:
        tokens = part["tokens"]
        self._line("")
        if "problem" in tokens:
            self._rule("tokens", "─", "bold")
            self._line(f"none: the row {tokens['problem']}", "red")
            return
        groups = [tokens["prompt"]["pieces"], *(answer["pieces"] for answer in tokens["answers"])]
        self._rule(f"tokens of the prompt: {tokens['prompt']['count']}, not scored", "─", _CONTEXT)
        text = self._prompt_tokens(tokens["prompt"]["pieces"])
        if text.plain.endswith("\n"):
            text.right_crop()  # a line end is printed anyway
        self._console.print(text, soft_wrap=True)
        self._rule("the prompt ends here; what follows is scored", *_BOUNDARY)
        for answer in tokens["answers"]:
            self._rule(f"tokens of {answer['name']}: {answer['count']}, scored", "─", _SCORED)
            text = Text.assemble(("⟦", "bold"), _token_text(answer["pieces"], _SCORED), ("⟧", "bold"))
            self._console.print(text, soft_wrap=True)
        self._line("")
        self._line(_legend(groups), "dim")
        self._token_facts(part)

    def _prompt_tokens(self, pieces: Sequence[Mapping[str, Any]]) -> Text:
        left_out = len(pieces) - 2 * _LONG_PROMPT_PIECES
        if self._whole or left_out <= _LONG_PROMPT_PIECES:
            return _token_text(pieces, _CONTEXT)
        first, last = pieces[:_LONG_PROMPT_PIECES], pieces[-_LONG_PROMPT_PIECES:]
        middle = (f"\n… {left_out} tokens are left out here; --whole shows them …\n", "dim")
        return Text.assemble(_token_text(first, _CONTEXT), middle, _token_text(last, _CONTEXT))

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

    def _rule(self, title: str, mark: str, style: str) -> None:
        head = f"{mark * 2} {visible(title)} "
        self._line(head + mark * max(self._width - Text(head).cell_len, 0), style)


def _without_middle(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose text is shortened where it is long: both of its ends say what it is."""
    text = message["content"]
    left_out = len(text) - 2 * _LONG_PROMPT
    if left_out <= _LONG_PROMPT:
        return message
    middle = f"\n… {left_out} characters are left out here; --whole shows them …\n"
    return {**message, "content": f"{text[:_LONG_PROMPT]}{middle}{text[-_LONG_PROMPT:]}"}


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
        text.append(visible_token(piece["text"]), f"bold reverse {style}" if piece["special"] else style)
        if len(piece["ids"]) > 1:
            text.append(str(len(piece["ids"])).translate(_SUPERSCRIPTS), "dim")
    return text


def _legend(groups: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    pieces = [piece for group in groups for piece in group]
    signs = [f"{_SEPARATOR} parts tokens", "⟦ ⟧ hold what is scored, the end token included"]
    texts = [piece["text"] for piece in pieces]
    signs += [f"{NO_TEXT} is a token without text"] * ("" in texts)
    signs += ["⏎ is a line end"] * any("\n" in text for text in texts)
    signs += ["⇥ is a tab"] * any("\t" in text for text in texts)
    signs += ["⁴ follows a character split over four tokens"] * any(len(piece["ids"]) > 1 for piece in pieces)
    return "; ".join(signs)


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


# --- figures ------------------------------------------------------------------------------


def print_profile(kind: str, found: dict[str, Any], reporter: Reporter) -> None:
    """Print the figures of a kind of data."""
    reporter.table(f"{kind}: what there is", _account(found))
    if not found["examples"]:
        return
    unit = found["unit"]
    columns = ("mean", "median", "p95", "p99", "max")
    rows = [("", " ".join(f"{name:>9}" for name in columns))]
    for name, it in found["lengths"].items():
        figures = {**it, "mean": f"{it['mean']:.1f}"}
        rows.append((_name(name), " ".join(f"{figures[column]:>9}" for column in columns)))
    reporter.table(f"{kind}: lengths ({unit})", rows)
    for name, lengths in found["lengths"].items():
        reporter.table(f"{kind}: {_name(name)} ({unit})", _bars(lengths))
    if "over" in found:
        rows = [(f"over {limit} tokens", _share_text(share)) for limit, share in found["over"].items()]
        reporter.table(f"{kind}: examples too long", rows)
    if longer := found.get("chosen_longer"):
        low, high = longer["interval"]
        share = f"{longer['share']:.1%} [{low:.1%}, {high:.1%}] (95%, Wilson)"
        rows = [("longer", f"{longer['count']} of {found['pairs']} pairs: {share}"), ("as long", str(longer["equal"]))]
        reporter.table(f"{kind}: is the chosen answer the longer one?", rows)
    reporter.table(f"{kind}: languages, guessed", _language_rows(found))


def _account(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for source in found["sources"]:
        rows.append(("file", f"{source['file']}: {source['rows']} rows"))
        rows.append(("", source["format"]))
    rows.append(("formats", ", ".join(f"{name} {count}" for name, count in found["formats"].items()) or "none"))
    rows.append(("rows", str(found["rows"])))
    for reason, count in found["left_out"].items():
        rows.append((f"left out: {reason.replace('_', ' ')}", f"{count}; dpo-cli data check names them"))
    rows.append(("examples", str(found["examples"])))
    if found.get("rankings"):
        rows.append(("of them rankings", f"{found['rankings']}; pairs in all: {found['pairs']}"))
    rows.append(("multi-turn", _share_text(found["multi_turn"])))
    turns = found["turns"]
    rows.append(("turns of the user", f"mean {turns['mean']:.2f}, median {turns['median']}, max {turns['max']}"))
    rows.append(("with a system prompt", _share_text(found["system_prompt"])))
    return rows


def _language_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    languages = found["languages"]
    rows = [("sampled", f"{found['sampled']} of {found['examples']} examples")]
    rows += [(name, _named(languages[name], found["sampled"])) for name in ("prompts", "answers")]
    rows.append(("answer in another", _share_text(languages["answer_in_another"])))
    scripts = {script: share for script, share in found["scripts"].items() if share}
    rows.append(("letters", ", ".join(f"{script} {share:.1%}" for script, share in scripts.items()) or "none"))
    return rows


def _named(counts: dict[str, int], total: int) -> str:
    not_told = {NO_LETTERS: "no letters", TOO_SHORT: "too short to tell"}
    named = [(not_told.get(name, name), count) for name, count in counts.items()]
    rest = sum(count for _, count in named[_NAMED:])
    shown = [*named[:_NAMED], *([("others", rest)] if rest else [])]
    return ", ".join(f"{name} {count / total:.1%}" for name, count in shown)


def _bars(lengths: dict[str, Any]) -> list[tuple[str, str]]:
    """A histogram as bars of at most ``_BAR`` characters."""
    bins = lengths["histogram"]
    most = max((count for *_, count in bins), default=1)
    return [
        (f"{low}-{high}" if high > low else str(low), f"{_bar(count, most)} {count} ({count / lengths['count']:.1%})")
        for low, high, count in bins
    ]


def _bar(count: int, most: int) -> str:
    """A bar in eighths of a character; what is not nothing is at least one eighth."""
    eighths = max(round(8 * _BAR * count / most), 1 if count else 0)
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (_EIGHTHS[rest] if rest else "")).ljust(_BAR)


def _share_text(share: dict[str, Any]) -> str:
    return f"{share['count']} ({share['share']:.1%})"


def _name(key: str) -> str:
    return key.replace("_", " ")
