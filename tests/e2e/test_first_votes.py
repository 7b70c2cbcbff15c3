"""The page for beginners: all its commands in their order, with the world's reward in place of a person."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.core import paths
from tests.contract.test_docs_commands import ROOT, commands_of

PAGE = "docs/first-votes.md"
INSTEAD = {"--rater me": "--judge world", "me.jsonl": "judge-world.jsonl"}
SHORTER = {"model": {"pretrain_steps": 400}, "sft": {"epochs": 2.0}, "evaluate": {"num_prompts": 60}}
RUN = {  # repro without DVC; the report is not opened
    "report": ("report --no-open",),
    "repro sft convert-preferences": ("base", "convert-sft", "sft", "convert-preferences"),
    "repro": ("convert-preferences", "precompute-ref", "train", "evaluate"),
}


def write_settings(changes: dict[str, Any]) -> None:
    def merge(into: Any, new: dict[str, Any]) -> None:
        for key, value in new.items():
            if isinstance(value, dict):
                merge(into[key], value)
            else:
                into[key] = value

    yaml = YAML()
    params = yaml.load(paths.PARAMS.read_text("utf-8"))
    merge(params, changes)
    with paths.PARAMS.open("w", encoding="utf-8") as file:
        yaml.dump(params, file)


def test_the_page_leads_from_an_empty_folder_to_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / PAGE).read_text("utf-8").partition("## With a real model")[0]
    [changes] = [YAML(typ="safe").load(block) for block in re.findall(r"^```yaml\n(.*?)^```", text, flags=re.M | re.S)]
    monkeypatch.chdir(tmp_path)
    for command in commands_of(PAGE):
        if "--model" in command.words:
            break  # the same with a real model
        if command.words[0] == "cd":
            monkeypatch.chdir(command.words[1])
            write_settings(SHORTER)
        elif command.words[0] == "python":
            subprocess.run([sys.executable, *command.words[1:]], check=True)
        else:
            line = command.line.removeprefix("dpo-cli ")
            if line == "repro":
                write_settings(changes)
            for stands_for, says in INSTEAD.items():
                line = line.replace(stands_for, says)
            for each in RUN.get(line, (line,)):
                done = CliRunner().invoke(app, each.split())
                has_ties = each.startswith("data check")  # 4: more rows than usual are left out
                assert done.exit_code == 0 or (has_ties and done.exit_code == 4), f"{each}: {done.output}"
    found, trained = (json.loads(paths.metrics_file(name).read_text("utf-8"))[name] for name in ("evaluate", "train"))
    print(f"{trained['num_pairs']} pairs; win rate over SFT {found['win_rate']:.3f} {found['win_rate_ci']}")
    assert 10 < trained["num_pairs"] < 52
    assert found["num_judged"] == 60
    assert Path("data/raw/blind/judge-world.jsonl").is_file()
