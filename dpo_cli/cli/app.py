"""The command line: one command a stage, ``init`` for a new project, ``repro`` for all of it."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import errors_as_exit_codes, examples
from dpo_cli.cli.machine import refuse_unwritable
from dpo_cli.cli.model import model_app
from dpo_cli.cli.record import HandRun
from dpo_cli.cli.repro import EXIT_CODE_FILE, reproduce, stage_file
from dpo_cli.core import paths
from dpo_cli.core.environment import claim_gpu, importing, is_first_process, prepare_environment
from dpo_cli.core.errors import DataError, MachineError, ParamsError
from dpo_cli.core.interrupts import watched_stop
from dpo_cli.core.pipeline import STAGES, Stage
from dpo_cli.core.scratch import die_with_parent
from dpo_cli.core.text import in_one_line

_EXIT_CODES = (
    "**Exit codes**: 0 done, 1 a bug, 2 usage, 3 settings, 4 data, 5 stale artifact, 6 machine or model,"
    " 130 stopped by you."
)


class _Commands(TyperGroup):
    """The commands, all of which take ``--model=~/m`` for ``--model ~/m``: shells leave a tilde behind = alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read a command line."""
        return super().parse_args(ctx, [_from_home(argument) for argument in args])


def _from_home(argument: str) -> str:
    option, separator, value = argument.partition("=")
    is_path = option.startswith("-") and (value == "~" or value.startswith("~/"))
    return f"{option}{separator}{Path(value).expanduser()}" if is_path else argument


app = typer.Typer(
    name="dpo-cli",
    cls=_Commands,
    help="Tune a language model on preferences with Direct Preference Optimization: offline, versioned, on one GPU.",
    epilog=examples(
        "dpo-cli init mine --sft instructions.json --preferences pairs.jsonl --model ~/models/Qwen2.5-0.5B",
        "dpo-cli -C mine repro",
        "dpo-cli -C mine precompute-ref && dpo-cli -C mine train --set train.beta=0.5",
    )
    + f"\n\n{_EXIT_CODES}",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting of params.yaml; may be repeated."),
]
FilesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[FILE]...", help="Data files; none: the sources in params.yaml."),
]
KindOption = Annotated[
    str | None,
    typer.Option("--as", metavar="sft|preferences", help="What the file is read as; left out: found by its rows."),
]
SettingOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of the source, as under data.sft or data.preferences: `format=hh`, `columns='{prompt: q}'`.",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="DIR", help="Count and show tokens of this model; `embedded`: the embedded one's."),
]
TemplateOption = Annotated[
    str | None,
    typer.Option("--template", metavar="NAME", help="Chat template: auto, plain, chatml or alpaca."),
]
MaxLengthOption = Annotated[
    int | None,
    typer.Option("--max-length", metavar="N", min=2, help="Tokens a row may have; left out: the project's limit."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the metrics as one JSON object, and no tables.")]


def main() -> None:
    """Entry point of the console script and of ``python -m dpo_cli``."""
    prepare_environment()
    claim_gpu()
    with watched_stop():
        app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dpo-cli {version('dpo-cli')}")
        raise typer.Exit


@app.callback()
def _global_options(
    directory: Annotated[
        Path | None, typer.Option("-C", metavar="DIR", help="Run in this project folder, as if started there.")
    ] = None,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if directory is None:
        return
    with errors_as_exit_codes(as_json=False):
        try:
            os.chdir(directory)
        except OSError as error:
            raise MachineError(f"-C {directory}: {error.strerror}") from None


# --- stages -------------------------------------------------------------------------------


def _run_stage(stage: Stage, overrides: list[str], *, as_json: bool) -> None:
    with errors_as_exit_codes(as_json=as_json):
        if overrides and "DVC_STAGE" in os.environ:
            raise ParamsError("--set has no place in a DVC stage: DVC would not see it; change params.yaml")
        from dpo_cli.core.params import load_params  # here, so that --help does not wait for it

        params = load_params(paths.PARAMS, overrides)
        _refuse_unread(stage.command, (*stage.params, "runtime"), overrides)
        refuse_unwritable(stage.made)
        die_with_parent()
        if code_file := os.environ.get(EXIT_CODE_FILE):
            stage_file(Path(code_file)).write_text(str(os.getpid()), encoding="utf-8")
        told = stage.name == "evaluate" and EXIT_CODE_FILE in os.environ  # repro prints the verdict at its end
        reporter = ConsoleReporter(show_tables=not (as_json or told))
        by_hand = HandRun(stage, overrides, reporter)
        with importing():
            run: Callable[..., dict[str, Any]] = importlib.import_module(stage.module).run
        metrics = run(params, reporter)
        by_hand.record()
    if as_json and is_first_process():
        typer.echo(json.dumps({stage.name: metrics}, ensure_ascii=False))


def _refuse_unread(command: str, read: tuple[str, ...], overrides: list[str]) -> None:
    unread = [override for override in overrides if override.partition(".")[0].strip() not in read]
    if unread:
        raise ParamsError(
            [f"--set {override} has no effect on {command}, which reads {', '.join(read)}" for override in unread]
        )


def _add_stage(stage: Stage) -> None:
    def command(overrides: SetOption = None, as_json: JsonOption = False) -> None:
        _run_stage(stage, overrides or [], as_json=as_json)

    def evaluate(
        overrides: SetOption = None,
        model: Annotated[
            Path | None,
            typer.Option(
                "--model",
                metavar="DIR",
                help="Judge this adapter for the project's SFT model, or this whole model, in place of models/dpo; no"
                " training is needed. Its files go to --out, and no report is made.",
            ),
        ] = None,
        out: Annotated[
            Path | None,
            typer.Option("--out", metavar="DIR", help="Where --model's files go; evaluations/NAME if not given."),
        ] = None,
        as_json: JsonOption = False,
    ) -> None:
        if model is None and out is None:
            _run_stage(stage, overrides or [], as_json=as_json)
        else:
            _evaluate_model(stage, model, out, overrides or [], as_json=as_json)

    body: Callable[..., None] = evaluate if stage.name == "evaluate" else command
    reads = ", ".join(path.as_posix() for path in stage.inputs) or "nothing but params.yaml"
    writes = stage.output.as_posix() if stage.output else paths.report_dir(stage.name).as_posix()
    body.__doc__ = (
        f"{stage.summary}\n\nSettings: {', '.join(stage.params)} and runtime in params.yaml."
        f" Reads {reads}. Writes {writes}."
    )
    epilog = examples(stage.example, *stage.more_examples)
    app.command(stage.command, epilog=epilog, rich_help_panel="Stages, in their order")(body)


def _evaluate_model(stage: Stage, model: Path | None, out: Path | None, overrides: list[str], *, as_json: bool) -> None:
    with errors_as_exit_codes(as_json=as_json):
        if model is None:
            raise ParamsError("--out has no effect without --model: stage evaluate writes to reports/evaluate")
        from dpo_cli.core.params import load_params  # here, so that --help does not wait for it

        params = load_params(paths.PARAMS, overrides)
        _refuse_unread(stage.command, (*stage.params, "train", "runtime"), overrides)
        from dpo_cli.stages.evaluate import evaluate_model

        folder = out or paths.EVALUATIONS / model.resolve().name
        beta_given = any(override.strip().startswith("train.") for override in overrides)
        reporter = ConsoleReporter(show_tables=not as_json)
        metrics = evaluate_model(params, model, folder, reporter, beta_given=beta_given)
    if as_json:
        typer.echo(json.dumps({stage.name: metrics}, ensure_ascii=False))


for _stage in STAGES:
    if _stage.name != "report":  # it reads no settings
        _add_stage(_stage)


@app.command(
    "report",
    rich_help_panel="Stages, in their order",
    epilog=examples("dpo-cli report", "dpo-cli -C mine report --no-open"),
)
def report_command(
    no_open: Annotated[
        bool, typer.Option("--no-open", help="Open no browser. None is opened in CI or without a display, either.")
    ] = False,
) -> None:
    """Write reports/report.html and reports/figures again from the other files under reports/, and open the page.

    It is the last stage of `dpo-cli repro`, loads no model and takes seconds; run it again after `dpo-cli agreement
    --save` and `dpo-cli capability`, whose results are part of the page.
    """
    with errors_as_exit_codes(as_json=False):
        from dpo_cli.cli.report import make_report  # here, so that --help does not wait for it

        reporter = ConsoleReporter()
        by_hand = HandRun(STAGES[-1], [], reporter)
        make_report(is_opened=not no_open, reporter=reporter)
        by_hand.record()


# --- data ---------------------------------------------------------------------------------

data_app = typer.Typer(
    name="data",
    help="Look at data before it is used: what is wrong with it, how it is read, and what the model will see.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(data_app, rich_help_panel="Data")
app.add_typer(model_app, rich_help_panel="Projects")


@data_app.command(
    "check",
    epilog=examples(
        "dpo-cli data check pairs.jsonl instructions.json",
        "dpo-cli data check answers.json --set columns='{prompt: question, first: a1, second: a2, label: best}'",
        "dpo-cli data check pairs.jsonl --list longer_chosen",
        "dpo-cli data check pairs.jsonl --model ~/models/Qwen2.5-0.5B --max-length 1024",
    ),
)
def data_check_command(
    files: FilesArgument = None,
    kind: KindOption = None,
    settings: SettingOption = None,
    listed: Annotated[
        str | None, typer.Option("--list", metavar="CHECK", help="Name all rows that this check finds.")
    ] = None,
    model: ModelOption = None,
    template: TemplateOption = None,
    max_length: MaxLengthOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as one JSON object, and no tables.")
    ] = False,
) -> None:
    """Read files as the conversion would, and report every row that it would leave out. Writes nothing.

    Exit code 0: every row is taken; 4: some row, or a whole file, is refused.
    """
    with errors_as_exit_codes(as_json=as_json):
        # here, so that --help does not wait for them
        from dpo_cli.cli.data import CheckOptions, check_sources, refuse_unknown_check
        from dpo_cli.cli.sources import sources_of

        _refuse_without_model(model, {"--template": template, "--max-length": max_length})
        refuse_unknown_check(listed, model)
        reporter = ConsoleReporter(show_tables=not as_json)
        options = CheckOptions(listed, model, template, max_length)
        figures, accepted = check_sources(sources_of(files or [], kind, settings or []), options, reporter)
    if as_json:
        typer.echo(json.dumps(figures, ensure_ascii=False))
    if not accepted:
        raise typer.Exit(DataError.exit_code)


@data_app.command(
    "show",
    epilog=examples(
        "dpo-cli data show pairs.jsonl --row 17",
        "dpo-cli data show pairs.jsonl --row 17 --model ~/models/Qwen2.5-0.5B",
        "dpo-cli data show instructions.json --as sft --model embedded",
    ),
)
def data_show_command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A data file.")],
    row: Annotated[int, typer.Option("--row", metavar="N", min=0, help="Which row, counted from 0.")] = 0,
    kind: KindOption = None,
    settings: SettingOption = None,
    model: ModelOption = None,
    template: TemplateOption = None,
    max_length: MaxLengthOption = None,
    whole: Annotated[bool, typer.Option("--whole", help="Leave nothing out of the middle of a long prompt.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as one JSON object.")] = False,
) -> None:
    """Show one row as the conversion reads it and, with --model, as the tokens that the model sees. Writes nothing.

    Exit code 0: the row is taken; 4: it, or a part of it, is left out. Rows that repeat others are
    found by `dpo-cli data check`.
    """
    with errors_as_exit_codes(as_json=as_json):
        _refuse_without_model(model, {"--template": template, "--max-length": max_length})
        from dpo_cli.cli.show import describe_row, json_of, token_view  # here, so that --help is fast
        from dpo_cli.cli.show_page import print_row
        from dpo_cli.cli.sources import sources_of

        [source] = sources_of([file], kind, settings or [])
        found = describe_row(source, row, token_view(model, template, max_length, source) if model else None)
        if as_json:
            typer.echo(json_of(found))
        else:
            print_row(found, whole=whole)
    if found["left_out"]:
        raise typer.Exit(DataError.exit_code)


@data_app.command(
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
        _refuse_without_model(model, {"--template": template})
        from dpo_cli.cli.sources import sources_of  # here, so that --help does not wait for them
        from dpo_cli.cli.stats import stats_of_sources

        reporter = ConsoleReporter(show_tables=not as_json)
        figures = stats_of_sources(sources_of(files or [], kind, settings or []), model, template, reporter)
    if as_json:
        typer.echo(json.dumps(figures, ensure_ascii=False))


def _refuse_without_model(model: str | None, options: dict[str, Any]) -> None:
    idle = [name for name, value in options.items() if value is not None]
    if model is None and idle:
        raise ParamsError([f"{name} has no effect without --model" for name in idle])


# --- measurements -------------------------------------------------------------------------


@app.command(
    "bench",
    rich_help_panel="Measurements",
    epilog=examples(
        "dpo-cli bench",
        "dpo-cli bench --regime harmless --set runtime.max_tokens_per_microbatch=8192",
        "dpo-cli bench --shape llama-3.1-8b --pass train",
        "dpo-cli bench --set runtime.layout=padded --json",
    ),
)
def bench_command(
    which: Annotated[
        str | None,
        typer.Option("--pass", metavar="precompute-ref|train", help="Which pass to measure; left out: both."),
    ] = None,
    regime: Annotated[
        str | None,
        typer.Option(
            "--regime",
            metavar="NAME",
            help="Random pairs with lengths like `harmless`, `0.42`, `2.15`, `3.91` (prompt to answer), or `equal`;"
            " left out: the project's own pairs.",
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            metavar="NAME",
            help="Random weights in the shape of `tiny`, `qwen2.5-0.5b`, `qwen2.5-1.5b`, `llama-3.2-3b` or"
            " `llama-3.1-8b`; left out: the project's own model.",
        ),
    ] = None,
    num_pairs: Annotated[int, typer.Option("--pairs", metavar="N", min=1, help="Pairs a turn.")] = 64,
    num_turns: Annotated[int, typer.Option("--turns", metavar="N", min=1, help="Timed turns.")] = 3,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object, no tables.")] = False,
) -> None:
    """Measure the reference pass and training on this machine: speed, memory, and how far from their limits.

    Reads the project's model and pairs, or makes random ones; writes nothing but the probe's verdict under
    .scratch. MFU holds the operations that
    the pass needs at the least against the speed of a matrix product in the same run.
    """
    with errors_as_exit_codes(as_json=as_json):
        # here, so that --help does not wait for them
        from dpo_cli.cli.bench import PASSES, BenchOptions, measure, refuse_unknown, refuse_unread
        from dpo_cli.core.params import Params, load_params, parse_overrides

        refuse_unknown(regime, shape)
        if which is not None and which not in PASSES:
            raise ParamsError(f"--pass must be one of {', '.join(PASSES)}, got {which}")
        in_project = paths.PARAMS.is_file() or shape is None
        params: Params = load_params(paths.PARAMS, overrides or []) if in_project else parse_overrides(overrides or [])
        refuse_unread(overrides or [], which, shape)
        options = BenchOptions([which] if which else PASSES, regime, shape, num_pairs, num_turns)  # type: ignore[list-item]
        figures = measure(options, params, ConsoleReporter(show_tables=not as_json))
    if as_json:
        typer.echo(json.dumps(figures, ensure_ascii=False))


@app.command(
    "compare",
    rich_help_panel="Measurements",
    epilog=examples(
        "dpo-cli compare",
        "dpo-cli compare --baseline HEAD --metric win_rate,kl",
        "dpo-cli compare workspace nutty-lamb main~1",
        "dpo-cli compare HEAD nutty-lamb --all --csv comparison.csv",
        "dpo-cli compare HEAD nutty-lamb evaluations/another --judge",
    ),
)
def compare_command(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[EXP]...",
            help="Experiments of DVC, git revisions, folders of `evaluate --model`, or `workspace`; none: the workspace"
            " and every experiment based on HEAD. The first is the baseline.",
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="EXP", help="Compare with this one in place of the first.")
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="NAME",
            help="A metric to show, `evaluate.kl` or `kl`; may be repeated, or hold several with commas between."
            " None: the main ones that differ.",
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Show every metric of every stage.")] = False,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write the figures to a CSV file, too.")
    ] = None,
    judge: Annotated[
        bool,
        typer.Option(
            "--judge",
            help="Judge their answers against each other, too, by the judge of params.yaml: a win rate for every two,"
            " and strengths by Bradley-Terry.",
        ),
    ] = False,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object, no tables.")] = False,
) -> None:
    """Compare experiments: the settings that differ beside the metrics that differ, with paired intervals.

    Values of the same prompt are compared with each other, so the interval is that of the difference, by
    prompts that both experiments have. Reads params.yaml, dvc.lock and reports/ from git and from the
    workspace; runs nothing, but for the judge with --judge.
    """
    with errors_as_exit_codes(as_json=as_json):
        if every and metrics:
            raise ParamsError("--metric has no effect with --all; give one of them")
        if overrides and not judge:
            raise ParamsError("--set has no effect without --judge: nothing else is computed")
        from dpo_cli.cli import compare  # here, so that --help does not wait for it

        found = compare.compare(names or [], baseline, metrics or [], every=every)
        head_to_head = importlib.import_module("dpo_cli.cli.head_to_head") if judge else None  # it loads torch
        judged = None
        if head_to_head is not None:
            reporter = ConsoleReporter(show_tables=not as_json)
            judged = head_to_head.judge_experiments(found.experiments, overrides or [], reporter)
        if csv_file is not None:
            compare.write_csv(found, csv_file)
        if as_json:
            figures = compare.as_json(found)
            if head_to_head is not None:
                figures["head_to_head"] = head_to_head.head_to_head_json(judged)
            typer.echo(json.dumps(figures, ensure_ascii=False))
        else:
            compare.print_comparison(found)
            if head_to_head is not None:
                head_to_head.print_head_to_head(judged)


@app.command(
    "agreement",
    rich_help_panel="Measurements",
    epilog=examples(
        "dpo-cli agreement votes.csv",
        "dpo-cli agreement votes.parquet --draws 10000 --confidence 0.9",
        "dpo-cli agreement votes.csv --csv table.csv --json",
        "dpo-cli agreement anna.csv ben.csv reports/evaluate/votes.csv --save",
    ),
)
def agreement_command(
    votes: Annotated[
        list[Path],
        typer.Argument(
            metavar="VOTES...",
            help="CSV or parquet, a vote a row: item_id, prompt_id, method, baseline, rater, vote (A, B or tie), a_is.",
        ),
    ],
    draws: Annotated[
        int, typer.Option("--draws", metavar="N", min=100, help="Draws behind each interval, clustered by prompt.")
    ] = 2000,
    confidence: Annotated[
        float, typer.Option("--confidence", metavar="X", help="Coverage of the intervals, between 0.5 and 1.")
    ] = 0.95,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the draws.")] = 0,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write the figures to a CSV file, too.")
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Write them to reports/agreement of this project, too, for its report.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object, no tables.")] = False,
) -> None:
    """Say how far judges and people agree, as in the paper's Table 2: win rates, agreement, kappa or alpha.

    A rater is `kind` or `kind:name`, such as `gpt-4-s` and `human:anna`; raters of a kind make one row. `a_is` names
    the model whose answer was shown as A. A tie is half a win, and agrees by half with a win or a loss. Without
    --csv and --save nothing is written.
    """
    with errors_as_exit_codes(as_json=as_json):
        if not 0.5 < confidence < 1:
            raise ParamsError(f"--confidence must be > 0.5 and < 1, got {confidence:g}")
        from dpo_cli.cli import agreement  # here, so that --help does not wait for it

        if save:
            agreement.refuse_outside_a_project()
        found = agreement.agreement_of_files(votes, draws=draws, confidence=confidence, seed=seed)
        if csv_file is not None:
            agreement.write_csv(found, csv_file)
        if save:
            agreement.save(found)
        if as_json:
            typer.echo(json.dumps(agreement.as_json(found), ensure_ascii=False))
        else:
            agreement.print_table(found)


@app.command(
    "capability",
    rich_help_panel="Measurements",
    epilog=examples(
        "dpo-cli capability tasks",
        "dpo-cli capability tasks --tasks arithmetic,reading --limit 200",
        "dpo-cli capability tasks --json",
    ),
)
def capability_command(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="YAML files of lm-evaluation-harness; paths of their data files are relative to this folder.",
        ),
    ],
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", metavar="NAME,...", help="Tasks, groups or tags of the folder; left out: all tasks."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="The first N items of each task; left out: all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object, no tables.")] = False,
) -> None:
    """Say what tuning cost on other tasks: base, SFT and DPO answer the same items, compared item by item.

    The tasks are local files of lm-evaluation-harness (`pip install 'dpo-cli[lm-eval]'`); nothing is downloaded. A
    task's figure is the first of its metrics that is a mean over items. A task may name Python functions of its folder,
    which are run. Reads the models of this project, evaluate and runtime in params.yaml. Writes reports/capability.
    """
    with errors_as_exit_codes(as_json=as_json):
        # here, so that --help does not wait for them
        from dpo_cli.cli.capability import as_json as figures_of
        from dpo_cli.cli.capability import measure_capability, print_table
        from dpo_cli.core.params import load_params

        names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks is not None else []
        if tasks is not None and not names:
            raise ParamsError(f"--tasks must name a task, got {tasks!r}")
        params = load_params(paths.PARAMS, [])
        found = measure_capability(folder, names, limit, params, ConsoleReporter(show_tables=not as_json))
        if as_json:
            typer.echo(json.dumps(figures_of(found), ensure_ascii=False))
        else:
            print_table(found)


@app.command(
    "rating-sheet",
    rich_help_panel="Measurements",
    epilog=examples(
        "dpo-cli rating-sheet data/raw/votes.csv --rater human:anna",
        "dpo-cli rating-sheet votes-ben.csv --rater human:ben --model evaluations/another",
    ),
)
def rating_sheet_command(
    sheet: Annotated[Path, typer.Argument(metavar="SHEET", help="The CSV file to write.")],
    rater: Annotated[
        str, typer.Option("--rater", metavar="KIND:NAME", help="Who fills it in, such as human:anna.")
    ] = "human",
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="DIR", help="A folder that `evaluate --model` wrote, not reports/evaluate."),
    ] = None,
) -> None:
    """Write the answers of SFT and tuned model as a sheet on which people vote, without naming the models.

    evaluate.num_prompts says how many there are. Fill in the column `vote` (A, B or tie) and hide `a_is`.
    With `evaluate.judge: votes` and `evaluate.votes.file` the votes become the win rate; `dpo-cli agreement`
    compares raters, and judges with them (reports/evaluate/votes.csv).
    """
    with errors_as_exit_codes(as_json=False):
        from dpo_cli.cli.rating_sheet import write_rating_sheet  # here, so that --help does not wait for it

        num_items, num_identical = write_rating_sheet(model, sheet, rater)
    same = f"; {num_identical} prompts with identical answers are ties and left out" if num_identical else ""
    typer.echo(in_one_line(f"{sheet}: {num_items} pairs of answers to vote on{same}"))


# --- rewards ------------------------------------------------------------------------------


@app.command(
    "score",
    rich_help_panel="Measurements",
    epilog=examples(
        "dpo-cli score new_pairs.jsonl",
        "dpo-cli score new_pairs.jsonl --html heat.html --out rewards.parquet",
        "dpo-cli score answers.csv --set columns='{prompt: question, chosen: good, rejected: bad}' --max-rows 1000",
        "dpo-cli score data/preference/eval.parquet --beta 0.5 --json",
    ),
)
def score_command(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE", help="Pairs or rankings in any format, or tables such as data/preference/eval.parquet."
        ),
    ],
    model: Annotated[
        Path, typer.Option("--model", metavar="DIR", help="Folder of an adapter that `dpo-cli train` made.")
    ] = paths.DPO_MODEL,
    beta: Annotated[
        float | None,
        typer.Option("--beta", metavar="X", help="Beta of the reward; left out: what the adapter was trained with."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the rows, token by token, as .parquet or .jsonl."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write a page with the tokens coloured by log(pi / pi_ref)."),
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option("--max-rows", metavar="N", min=1, help="Read so many rows of each file, at most.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="How the files are read, as under data.preferences: `format=hh`, `columns='{prompt: q}'`;"
            " `reference.max_length=N`; or a setting of runtime, such as `runtime.device=cpu`. May be repeated.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as one JSON object, and no tables.")
    ] = False,
) -> None:
    """Score pairs or rankings with the implicit reward r = beta log(pi / pi_ref) of the tuned model.

    Prints by source how often the reward orders the answers as the data does, and the margin. Files are read
    as the conversion reads them; rows left out are counted and named. What was scored before is not scored again.
    """
    with errors_as_exit_codes(as_json=as_json):
        # here, so that --help does not wait for them
        from dpo_cli.cli.score import refuse_options, score_files, split_settings
        from dpo_cli.cli.score_output import ScoreOptions
        from dpo_cli.cli.score_rows import refuse_idle_settings
        from dpo_cli.cli.sources import sources_of
        from dpo_cli.core.params import load_params

        overrides, of_files = split_settings(settings or [])
        params = load_params(paths.PARAMS, overrides)
        refuse_idle_settings(of_files)
        options = ScoreOptions(model, beta, max_rows, out, html)
        sources = sources_of(files, "preferences", of_files)
        refuse_options(options, sources)
        figures = score_files(sources, options, params, ConsoleReporter(show_tables=not as_json))
    if as_json:
        typer.echo(json.dumps(figures, ensure_ascii=False))


@app.command(
    "sample",
    rich_help_panel="Data",
    epilog=examples(
        "dpo-cli sample prompts.jsonl",
        "dpo-cli sample prompts.jsonl --answers 8 --set evaluate.max_new_tokens=64",
        "dpo-cli sample prompts.jsonl --out data/raw --set evaluate.judge=rule --set evaluate.rule=json_object",
        "dpo-cli sample unseen.jsonl --model models/dpo",
    ),
)
def sample_command(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="PROMPTS...", help="Rows with a prompt: text, or messages; in any kind of file."),
    ],
    answers: Annotated[int, typer.Option("--answers", metavar="K", min=1, help="Answers to each prompt.")] = 4,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="DIR",
            help="An adapter for the SFT model, such as models/dpo, or a whole model; left out: the SFT model itself.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder of the tables, one for each file, as parquet.")
    ] = paths.SAMPLED,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sample answers of the SFT model to prompts of your own, and score them where the reward is known.

    Answers are sampled as evaluate says (temperature, max_new_tokens, seed), and scored where evaluate.judge is world
    or rule. In data/raw such a table is preference data of format kwise: pairs are made of answers with different
    scores. Answers that did not end are left out and counted, and those with the same text are merged. What was sampled
    before is not sampled again.
    """
    with errors_as_exit_codes(as_json=as_json):
        from dpo_cli.core.params import load_params  # here, so that --help does not wait for them

        params = load_params(paths.PARAMS, overrides or [])
        _refuse_unread("sample", ("model", "reference", "evaluate", "runtime"), overrides or [])
        from dpo_cli.cli.sample import sample_files

        figures = sample_files(files, answers, model, out, params, ConsoleReporter(show_tables=not as_json))
    if as_json:
        typer.echo(json.dumps(figures, ensure_ascii=False))


@app.command(
    "try",
    rich_help_panel="Measurements",
    epilog=examples(
        "dpo-cli try 'Explain in one sentence why the sky is blue.'",
        "dpo-cli try 'Tell me a story.' --temperature 0.7 --set evaluate.max_new_tokens=64",
        "dpo-cli try 'Hello!' --system 'You are a pirate.' --model ~/adapters/another",
    ),
)
def try_command(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the user says.")],
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="A system message before the prompt.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="DIR",
            help="An adapter for the project's SFT model, or a whole model, in place of models/dpo.",
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option("--temperature", metavar="T", min=0, max=10, help="0 takes the likeliest token each time."),
    ] = 0.0,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answers as one JSON object.")] = False,
) -> None:
    """Try a prompt on the SFT model and on the tuned one, and see both answers side by side.

    Answers are greedy. With --temperature they are sampled, as evaluate does: the same prompt gives the same answers,
    another evaluate.seed others. They end after evaluate.max_new_tokens. Neither reports nor models are touched.
    """
    with errors_as_exit_codes(as_json=as_json):
        from dpo_cli.core.params import load_params  # here, so that --help does not wait for them

        if not prompt.strip():
            raise DataError("the prompt is empty; say something, as in: dpo-cli try 'Hello!'")
        params = load_params(paths.PARAMS, overrides or [])
        _refuse_unread("try", ("model", "reference", "evaluate", "runtime"), overrides or [])
        if any(override.partition("=")[0].strip() == "evaluate.temperature" for override in overrides or []):
            raise ParamsError("--set evaluate.temperature has no effect on try; say --temperature")
        from dpo_cli.cli import try_prompt

        evaluate = params.evaluate.model_copy(update={"temperature": temperature})
        params = params.model_copy(update={"evaluate": evaluate})
        found = try_prompt.try_prompt(prompt, system, model, params, ConsoleReporter(show_tables=not as_json))
        if as_json:
            typer.echo(json.dumps(try_prompt.as_json(prompt, found, temperature), ensure_ascii=False))
        else:
            try_prompt.print_tried(found, temperature)


# --- projects -----------------------------------------------------------------------------


@app.command(
    "init",
    rich_help_panel="Projects",
    epilog=examples(
        "dpo-cli init demo",
        "dpo-cli init mine --sft instructions.json --preferences pairs.jsonl --model ~/models/Qwen2.5-0.5B",
        "dpo-cli init mine --preferences pairs.csv --set 'columns={chosen: good, rejected: bad}' --set sft.method=none",
    ),
)
def init_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the new project; made where it is missing.")],
    sft: Annotated[
        Path | None, typer.Option("--sft", metavar="FILE", help="Instruction data; copied into data/raw.")
    ] = None,
    preferences: Annotated[
        Path | None, typer.Option("--preferences", metavar="FILE", help="Preference data; copied into data/raw.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="DIR", help="Base model in Hugging Face layout; none: the embedded model."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="[SECTION.]KEY=VALUE",
            help="A setting for params.yaml, such as `sft.method=none`; of the file that is given without its section:"
            " `columns='{chosen: good}'`; may be repeated.",
        ),
    ] = None,
) -> None:
    """Make a project folder: params.yaml, dvc.yaml, and a git repository with DVC, in which the data is committed.

    Without files it holds the embedded small world, without a model the embedded tiny model.
    What stands in the folder already is never overwritten. Data that cannot be read makes no project.
    """
    from dpo_cli.cli.init import ProjectFiles, create_project  # here, so that --help does not wait for it

    with errors_as_exit_codes(as_json=False):
        files = ProjectFiles(sft=sft, preferences=preferences, model=model)
        create_project(folder, files, ConsoleReporter(), settings or [])


@app.command(
    "repro",
    rich_help_panel="Projects",
    epilog=examples("dpo-cli repro", "dpo-cli repro train --force"),
)
def repro_command(
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="[STAGE]...", help="Stages to bring up to date; none: all.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run them though they did not change: the named stages alone, or all.")
    ] = False,
) -> None:
    """Bring the project up to date: run the stages whose inputs changed, then print the verdict.

    It is `dvc repro` with this very interpreter, so no environment need be activated. It ends
    with the exit code of the stage that failed. To try a setting as an experiment of DVC, in a
    project that is committed to git: `dvc exp run -S train.beta=0.5`.
    """
    with errors_as_exit_codes(as_json=False):
        code = reproduce(targets or [], force=force, reporter=ConsoleReporter())
    if code:
        sys.exit(code)
