"""From canonical tables to token groups, with every row that does not fit accounted for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from dpo_cli.core.errors import DataError, StaleArtifactError
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import TOOLS, Messages, content_id, from_table

_MANY = 0.05
"""Share of rows left out above which a stage warns."""


@dataclass(frozen=True)
class TokenGroup:
    """A prompt with K completions, as token ids.

    Attributes:
        id: The row's content id.
        group: The prompt's content id.
        prompt: Token ids of the prompt.
        completions: Token ids of each completion; its last one ends the turn.
    """

    id: str
    group: str
    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest completion."""
        return len(self.prompt) + max(map(len, self.completions))


@dataclass
class TokenTable:
    """The token groups of a table, and the rows that were left out.

    Attributes:
        groups: In the order of the table.
        prompts: The prompts' messages, by group id.
        rejects: One entry for each row left out: file, row, reason, detail.
        found: For each check, the rows that fail it and stay.
    """

    groups: list[TokenGroup]
    prompts: dict[str, Messages]
    rejects: list[dict[str, Any]]
    found: dict[str, list[int]] = field(default_factory=dict)


def tokenise_table(
    path: Path,
    completion_columns: Sequence[str],
    encoder: ChatEncoder,
    max_length: int,
    policies: Mapping[str, str],
    remedy: str,
) -> TokenTable:
    """Tokenise a canonical table.

    Args:
        path: A parquet file of :mod:`dpo_cli.data.schema`.
        completion_columns: The columns with completions: ``completion``, ``chosen`` and ``rejected``, or
            ``completions``, which holds several.
        encoder: The model's chat encoder.
        max_length: Tokens a prompt with one completion may have.
        policies: What to do with what each check of tokens finds (:class:`dpo_cli.core.params.TokenChecks`).
        remedy: What to do when the table is missing.

    Raises:
        StaleArtifactError: The table is missing or damaged.
        DataError: Rows fail a check whose policy is ``error``.
    """
    if not path.is_file():
        raise StaleArtifactError(f"{path} is missing; {remedy}")
    try:
        frame = pl.read_parquet(path, glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise StaleArtifactError(f"{path} is damaged ({error}); {remedy}") from None
    table = TokenTable([], {}, [])
    for index, found_row in enumerate(frame.iter_rows(named=True)):
        row = from_table(found_row)
        try:
            group, found = tokenise_row(row, completion_columns, encoder, max_length, policies)
        except RowProblem as problem:
            table.rejects.append(
                {"file": path.as_posix(), "row": index, "reason": problem.reason, "detail": problem.detail}
            )
            continue
        table.groups.append(group)
        table.prompts[group.group] = row["prompt"]
        for name in found:
            table.found.setdefault(name, []).append(index)
    _refuse_errors(table, path, policies)
    return table


def prompt_ids(path: Path) -> set[str]:
    """The content ids of the prompts in a canonical table."""
    names = [name for name in pl.read_parquet_schema(path) if name in ("prompt", TOOLS)]
    frame = pl.read_parquet(path, columns=names, glob=False)
    return {content_id(from_table(row)["prompt"]) for row in frame.iter_rows(named=True)}


def _refuse_errors(table: TokenTable, path: Path, policies: Mapping[str, str]) -> None:
    problems = []
    for name, policy in policies.items():
        rows = [reject["row"] for reject in table.rejects if reject["reason"] == name] if policy == "error" else []
        if rows:
            shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            problems.append(
                f"{path}: {len(rows)} rows fail the check {name} (rows {shown}); mend them, or set the check to drop"
            )
    if problems:
        raise DataError(problems)


def explain_found(tables: Sequence[TokenTable]) -> str | None:
    """A warning where rows stay that fail a check of their tokens."""
    counts = Counter({name: 0 for table in tables for name in table.found})
    for table in tables:
        counts.update({name: len(rows) for name, rows in table.found.items()})
    if not counts:
        return None
    return "kept, though their tokens are odd: " + ", ".join(
        f"{count} rows with {name.replace('_', ' ')}" for name, count in counts.items()
    )


def explain_rejects(tables: Sequence[TokenTable], setting: str, max_length: int) -> str | None:
    """A warning where many rows of some tables were left out: how many, why, and which setting decides it."""
    rejects = [reject for table in tables for reject in table.rejects]
    num_rows = len(rejects) + sum(len(table.groups) for table in tables)
    if len(rejects) <= _MANY * num_rows:
        return None
    reasons = Counter(reject["reason"] for reject in rejects).most_common()
    named = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in reasons)
    remedy = f"; {setting} is {max_length}, raise it to keep long ones" if "over_long" in dict(reasons) else ""
    first = {reject["reason"]: reject for reject in reversed(rejects) if reject["reason"] != "over_long"}
    said = "".join(f"; row {reject['row']} {reject['detail']}" for reject in reversed(first.values()))
    return f"{len(rejects)} of {num_rows} rows ({len(rejects) / num_rows:.0%}) are left out: {named}{remedy}{said}"


def tokenise_row(
    row: dict[str, Any],
    columns: Sequence[str],
    encoder: ChatEncoder,
    max_length: int,
    policies: Mapping[str, str],
) -> tuple[TokenGroup, list[str]]:
    """A canonical row's tokens, and the names of the checks that it fails and stays nevertheless.

    Raises:
        RowProblem: The template refuses the row, it is over long, or a check leaves it out.
    """
    row = from_table(row)
    prompt = row["prompt"]
    completions = row["completions"] if "completions" in columns else [row[column] for column in columns]
    encoding = encoder.encode(prompt, completions)
    group = TokenGroup(
        id=row["id"],
        group=row.get("group") or row["id"],
        prompt=tuple(encoding.prompt),
        completions=tuple(map(tuple, encoding.completions)),
    )
    if group.longest > max_length:
        raise RowProblem("over_long", f"has {group.longest} tokens, more than {max_length}")
    found = encoder.check_tokens(prompt, completions, encoding)
    for name in found:
        if policies[name] != "keep":
            raise RowProblem(name, TOKEN_DETAILS[name])
    return group, found


TOKEN_DETAILS: Mapping[str, str] = {
    "lost_eos": "has an answer that does not end with a token that ends the turn",
    "lost_text": (
        "has text that is not among its tokens: the model's chat template leaves it out, as many do with reasoning"
        " between <think> and </think>, or its tokenizer has no token for it; give reasoning as reasoning_content, or"
        " set model.chat_template"
    ),
    "equal_sides": "has two answers that are the same token by token",
    "doubled_opener": (
        "has an answer that begins with what the chat template opens before it, such as <think>; take it out of the"
        " answer's text"
    ),
    "tools_not_shown": (
        "has tools or calls that the model's chat template does not show: without them it writes the same; take a"
        " model whose template knows tools, or set the check to keep to train without them"
    ),
    "reasoning_not_shown": (
        "has reasoning that the model's chat template does not show; take a model whose template does, or"
        " set the check to keep to train on the answer alone"
    ),
    "double_bos": "has a prompt that begins with two BOS tokens",
    "double_eos": "has an answer whose text ends with an end token of its own",
}
"""What a check of tokens says of a row that fails it, and what helps."""
