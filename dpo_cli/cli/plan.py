"""``dpo-cli plan``: does it fit, how long will it take, and what to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpo_cli.cli.bench import refuse_unknown
from dpo_cli.cli.command import JsonOption, SetOption, command_app, examples
from dpo_cli.cli.console import ConsoleReporter
from dpo_cli.cli.exits import errors_as_exit_codes
from dpo_cli.core import paths
from dpo_cli.core.errors import MachineError, ParamsError

if TYPE_CHECKING:
    from dpo_cli.core.params import Params

app = command_app()


@app.command(
    "plan",
    rich_help_panel="Measurements",
    epilog=examples(
        "dpo-cli plan",
        "dpo-cli plan --measure",
        "dpo-cli plan --card rtx-3060",
        "dpo-cli plan --model ~/models/Qwen2.5-0.5B --card rtx-4070 --regime 0.42",
        "dpo-cli plan --shape llama-3.1-8b --card rtx-3060 --set reference.quantization=nf4 --json",
    ),
)
def plan_command(
    card: Annotated[
        str | None,
        typer.Option("--card", metavar="NAME", help="A GPU that is not here, like `rtx-3060`: memory is predicted."),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Take real steps on the longest rows and on usual ones, in a process apart."),
    ] = False,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="DIR", help="Another model than the project's; random pairs.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option("--shape", metavar="NAME", help="A model of this shape, as `dpo-cli bench` has them.")
    ] = None,
    regime: Annotated[
        str | None,
        typer.Option("--regime", metavar="NAME", help="Lengths of random pairs, as `dpo-cli bench` has them."),
    ] = None,
    num_pairs: Annotated[int, typer.Option("--pairs", metavar="N", min=1, help="Random pairs.")] = 512,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether training fits into the memory that is free, what to change if not, and how long it takes.

    Weights are counted tensor by tensor and activations on a model without numbers, so nothing is loaded and it takes
    seconds; the largest micro-batch follows from the data's own lengths, once data is converted. Exit code 6 if it
    does not fit.
    """
    with errors_as_exit_codes(as_json=as_json):
        from dpo_cli.models.device import GPUS

        refuse_unknown({"--card": (card, GPUS)})
        if model is not None and shape is not None:
            raise ParamsError("--model and --shape both name a model; give one of them")
        if measure and card is not None:
            raise ParamsError(f"--measure has no effect with --card {card}, which is not here")
        is_random = model is not None or shape is not None
        if regime is not None and not is_random:
            raise ParamsError("--regime has no effect on the project's own pairs; name a model with --model or --shape")
        if card is not None:
            from dpo_cli.dry_run.stub import load_stub

            load_stub()  # before torch

        # here, so that --help does not wait for them
        from dpo_cli.core.load_params import load_params, parse_overrides
        from dpo_cli.dry_run.outlook import figures, look_ahead, report
        from dpo_cli.dry_run.plan import plan_training
        from dpo_cli.dry_run.target import that_card, this_machine
        from dpo_cli.dry_run.tasks import other_subject, project_subject
        from dpo_cli.models.load import quiet_libraries
        from dpo_cli.models.shapes import REGIMES, SHAPES

        refuse_unknown({"--shape": (shape, SHAPES), "--regime": (regime, REGIMES)})
        quiet_libraries()
        in_project = paths.PARAMS.is_file() or not is_random
        params: Params = load_params(paths.PARAMS, overrides or []) if in_project else parse_overrides(overrides or [])
        regime = regime or "harmless"
        subject = other_subject(shape, model, regime, num_pairs, params) if is_random else project_subject(params)
        measured: dict[str, Any] = {}
        target = that_card(card, params.runtime) if card is not None else this_machine(params, embedded=not is_random)
        if measure:
            measured = _measure(params, shape, model, regime, num_pairs)
        plans = [plan_training(subject.config, task, target.target, params.runtime) for task in subject.tasks]
        outlook = look_ahead(subject, plans, params, measured, target.operations_per_s(), target.watts)
        report(outlook, ConsoleReporter(show_tables=not as_json))
        if as_json:
            typer.echo(json.dumps({"plan": figures(outlook)}, ensure_ascii=False))
        if "ended" in measured:
            raise MachineError(
                f"the measured steps ended early ({measured['ended']}): memory ran out, or see above; lower"
                " runtime.max_tokens_per_microbatch"
            )
    if not outlook.fits:
        raise typer.Exit(MachineError.exit_code)


def _measure(params: Params, shape: str | None, model: Path | None, regime: str, num_pairs: int) -> dict[str, Any]:
    from dpo_cli.models.trials import Trial

    asked = {
        "params": params.model_dump(),
        "shape": shape,
        "folder": None if model is None else str(model),
        "regime": regime,
        "num_pairs": num_pairs,
    }
    return Trial.start("dpo_cli.dry_run.rehearsal", json.dumps(asked)).result()
