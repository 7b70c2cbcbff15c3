"""``dpo-cli data stats``: what data is like before it is used. Nothing here writes to the project."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from dpo_cli.cli.command import command_app, examples
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.data import (
    FilesArgument,
    KindOption,
    ModelOption,
    SettingOption,
    TemplateOption,
    refuse_without_model,
)
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core.progress import Reporter

_BAR = 36
_EIGHTHS = " ▏▎▍▌▋▊▉"
_NAMED = 8

app = command_app()


@app.command(
    "stats",
    epilog=examples(
        "dpo-cli data stats pairs.jsonl instructions.json",
        "dpo-cli data stats pairs.jsonl --model ~/models/Qwen2.5-0.5B",
    ),
)
def data_stats_command(
    files: FilesArgument = None,
    kind: KindOption = None,
    settings: SettingOption = None,
    model: ModelOption = None,
    template: TemplateOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
) -> None:
    """Say what data is like: lengths, turns, which answers are longer, languages. Writes nothing.

    Lengths are characters, or tokens with --model. Rows that the conversion would refuse are not
    counted; those that repeat others are.
    """
    with errors_as_exit_codes(as_json=as_json):
        refuse_without_model(model, {"--template": template})
        # here, so that --help does not wait for them
        from dpo_cli.cli.sources import project_data, sources_of
        from dpo_cli.data.profile import profile_sources

        reporter = ConsoleReporter(show_tables=not as_json)
        sources, encoder = sources_of(files or [], kind, settings or []), None
        if model is not None:
            from dpo_cli.cli.token_view import encoder_of

            encoder = encoder_of(model, template)[1]
        figures = {}
        for name, found in profile_sources(sources, project_data(), encoder, reporter):
            figures[name] = found
            print_profile(name, found, reporter)
    if as_json:
        typer.echo(json.dumps(figures, ensure_ascii=False))


# --- printing -----------------------------------------------------------------------------


def print_profile(kind: str, found: dict[str, Any], reporter: Reporter) -> None:
    """Print the figures of a kind of data."""
    reporter.table(f"{kind}: what there is", _account(found))
    if not found["examples"]:
        return
    unit = found["unit"]
    rows = [("", _figures_line("mean", "median", "p95", "p99", "max"))]
    rows += [
        (_name(name), _figures_line(f"{it['mean']:.1f}", *(str(it[key]) for key in ("median", "p95", "p99", "max"))))
        for name, it in found["lengths"].items()
    ]
    reporter.table(f"{kind}: lengths ({unit})", rows)
    for name, lengths in found["lengths"].items():
        reporter.table(f"{kind}: {_name(name)} ({unit})", _bars(lengths))
    if "over" in found:
        rows = [(f"over {limit} tokens", _share_text(share)) for limit, share in found["over"].items()]
        reporter.table(f"{kind}: examples too long", rows)
    if "chosen_longer" in found:
        reporter.table(f"{kind}: is the chosen answer the longer one?", _longer_rows(found))
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


def _longer_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    longer = found["chosen_longer"]
    low, high = longer["interval"]
    interval = f"{longer['share']:.1%} [{low:.1%}, {high:.1%}] (95%, Wilson)"
    return [
        ("longer", f"{longer['count']} of {found['pairs']} pairs: {interval}"),
        ("as long", str(longer["equal"])),
    ]


def _language_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    languages = found["languages"]
    rows = [("sampled", f"{found['sampled']} of {found['examples']} examples")]
    rows += [(name, _named(languages[name], found["sampled"])) for name in ("prompts", "answers")]
    rows.append(("answer in another", _share_text(languages["answer_in_another"])))
    scripts = {script: share for script, share in found["scripts"].items() if share}
    rows.append(("letters", ", ".join(f"{script} {share:.1%}" for script, share in scripts.items()) or "none"))
    return rows


def _named(counts: dict[str, int], total: int) -> str:
    from dpo_cli.data.statistics import NO_LETTERS, TOO_SHORT  # here, so that --help does not wait for it

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


def _figures_line(*figures: str) -> str:
    return " ".join(f"{figure:>9}" for figure in figures)


def _share_text(share: dict[str, Any]) -> str:
    return f"{share['count']} ({share['share']:.1%})"


def _name(key: str) -> str:
    return key.replace("_", " ")
