"""Runs cases in a process of its own, since the stub must be there before torch.

``python -m tests.cuda_dry_run --model llama-3.1-8b --num-pairs 18 --max-tokens 4096 --operations`` counts one case for
people; ``--suite NAME`` runs a suite for the tests, a line of JSON a case.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings

from dpo_cli.core.environment import prepare_environment
from dpo_cli.dry_run.stub import load_stub
from tests.cuda_dry_run.cases import SUITES, Case


def main(arguments: list[str]) -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_dry_run", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, help="run a suite, a line of JSON a case")
    parser.add_argument("--operations", action="store_true", help="print the costliest operations, too")
    for field in dataclasses.fields(Case):
        if field.name != "settings":
            kind = int if field.name in ("num_pairs", "max_tokens") else str
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    options = vars(parser.parse_args(arguments))
    suite, operations = options.pop("suite"), options.pop("operations")
    prepare_environment()
    warnings.filterwarnings("ignore")
    load_stub()

    import torch

    from tests.cuda_dry_run.running import run

    torch.set_num_threads(1)
    if suite is not None:
        for case in SUITES[suite]:
            print(json.dumps(run(case).as_json()), flush=True)
        return
    outcome = run(Case(**options))
    print(json.dumps(outcome.as_json(), indent=1))
    if operations and outcome.counts is not None:
        works = sorted(outcome.counts.by_operation.items(), key=lambda item: -item[1].bytes)
        for name, work in works[:30]:
            print(f"{name:45} {work.kernels:7} kernels {work.bytes / 1e9:9.2f} GB {work.flops / 1e12:9.3f} TFLOP")


if __name__ == "__main__":
    main(sys.argv[1:])
