"""The commands in README and docs/: each one parses, and what needs neither an outside model nor minutes runs.

They run in the order of the pages, in one small project on a tiny model, with the files that the pages speak of.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.core.load_params import load_params
from dpo_cli.core.params_text import params_yaml
from dpo_cli.core.pipeline import STAGES
from dpo_cli.data import world

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
    "examples/smollm2/README.md",
]

NOT_RUN = {
    r"^\S+ (-C \S+ )?repro": "every stage under DVC: tests/e2e/test_repro.py",
    r"^\S+ compare HEAD|^\S+ compare --baseline": "experiments of DVC: tests/e2e/test_repro.py",
    r"^\S+ .*evaluations/another|^\S+ .*/adapters/": "an adapter from elsewhere: tests/e2e/test_evaluate.py",
    r"judge=(hf|openai)": "a judge's model or server: tests/e2e/test_evaluate.py, test_judge_server.py",
    r"judge=votes|^\S+ agreement": "sheets that people fill in: tests/e2e/test_evaluate.py, unit/cli/test_agreement.py",
    r"^\S+ (label|votes) ": "answers to vote on: tests/unit/labeling",
    r"^\S+ capability": "tasks of the harness: tests/e2e/test_capability.py",
    r"^\S+ model ": "a model file: tests/unit/models/test_importing.py",
    r"^\S+ chat( --system .*)?$": "it needs a terminal: tests/e2e/test_chat_terminal.py",
    r"^\S+ plan": "it counts models for seconds: tests/unit/dry_run/test_plan.py",
    r"^\S+ doctor": "it looks at the machine: tests/unit/cli/test_doctor.py",
    r"^\S+ (-C \S+ )?bench": "it measures for minutes: tests/unit/cli/test_bench.py",
    r"/real/Smol|^\S+ sample data/prompts/|max_steps=50|^\S+ evaluate --set evaluate.temperature=0$": "make real's",
}
"""Commands of dpo-cli that are parsed only: a pattern, and why, with the test that runs the like."""

PROGRAMS = {
    **dict.fromkeys(("cd", "export", ".", "cat", "tail", "git"), "the shell's own"),
    **dict.fromkeys(("llama-server", "vllm", "hf", "tensorboard"), "programs that are not installed here"),
}
"""Programs whose command lines nothing here can check."""


@dataclass(frozen=True)
class Command:
    """A command line of a page."""

    page: str
    words: tuple[str, ...]

    @property
    def line(self) -> str:
        return " ".join(self.words)

    @property
    def reason(self) -> str | None:
        """Why it is not run; None where it is."""
        return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, self.line)), None)


def commands_of(page: str) -> Iterator[Command]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        plain = re.sub(r"\s+#.*$|\\\n| > \S+", "", block, flags=re.MULTILINE)
        lexer = shlex.shlex(plain, posix=True, punctuation_chars="&|;()\n")
        lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
        words: list[str] = []
        for word in [*lexer, "\n"]:
            if set(word) <= set("&|;()\n"):
                if words:
                    yield Command(page, tuple(words))
                words = []
            elif words or not re.fullmatch(r"[A-Z_]+=.*", word):
                words.append(word)


COMMANDS = [command for page in PAGES for command in commands_of(page)]
OURS = [command for command in COMMANDS if command.words[0] == "dpo-cli"]


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command that is named, and its options; a usage error where there is no such command or option."""
    found: Any = typer.main.get_command(app)
    context = found.make_context("dpo-cli", list(words))
    names = []
    while hasattr(found, "resolve_command"):
        name, found, rest = found.resolve_command(context, [*context._protected_args, *context.args])
        context = found.make_context(name, rest, parent=context)
        names.append(name)
    return " ".join(names), context.params


def test_there_are_commands_on_the_pages_and_each_pattern_is_used() -> None:
    assert len(OURS) > 40
    unused = [pattern for pattern in NOT_RUN if not any(re.search(pattern, command.line) for command in OURS)]
    assert unused == []


@pytest.mark.parametrize("command", OURS, ids=lambda command: command.line)
def test_a_command_parses_and_its_settings_are_settings(command: Command, tmp_path: Path) -> None:
    name, options = parse([*command.words[1:]])
    if name in {stage.command for stage in STAGES}:
        params = tmp_path / "params.yaml"
        params.write_text(params_yaml({"model.name": "mine"}), encoding="utf-8")
        load_params(params, options.get("overrides") or [])


def test_an_option_that_is_none_does_not_parse() -> None:
    for words in (["train", "--beta", "1"], ["trian"], ["data", "check", "--lost", "x"], ["score"]):
        with pytest.raises(Exception, match="No such|Missing"):
            parse(words)


def test_examples_in_the_help_parse() -> None:
    examples = re.findall(r"^- `((?:[A-Z_]+=\S+ )?dpo-cli .*)`$", (ROOT / "docs/cli.md").read_text("utf-8"), flags=re.M)
    assert len(examples) > 40
    for line in examples:
        for part in line.split(" && "):
            words = shlex.split(part)
            parse(words[words.index("dpo-cli") + 1 :])


@pytest.mark.parametrize("page", PAGES)
def test_commands_named_in_the_text_are_there(page: str) -> None:
    known: Any = typer.main.get_command(app)
    names = set(known.list_commands(None))
    named = re.findall(r"`dpo-cli ([a-z][\w-]*)", (ROOT / page).read_text(encoding="utf-8"))
    assert set(named) <= names


@pytest.mark.parametrize(
    "command", [each for each in COMMANDS if each.words[0] != "dpo-cli"], ids=lambda command: command.line[:60]
)
def test_commands_of_other_programs(command: Command) -> None:
    program, *words = command.words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert {word for word in words if "=" not in word} <= set(targets)
    elif program == "torchrun":
        parse(words[words.index("dpo_cli") + 1 :])
    elif program == "dvc":
        from dvc.cli import parse_args

        parsed = parse_args(words)
        settings = [value for _, values in _pairs(getattr(parsed, "params", None)) for value in values]
        for setting in settings:
            key, _, values = setting.partition("=")
            for value in values.split(","):
                load_params(ROOT / "params.yaml", [f"{key}={value}"])
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
        assert set(re.findall(r"\[([\w,-]+)\]", command.line)) <= set(extras) | {",".join(extras)}
    elif program == "python":
        script = words[0]
        assert script == "-c" or (ROOT / script).is_file() or script == "-m"
    elif program == "pytest":
        assert all((ROOT / word.partition("::")[0]).exists() for word in words if word.startswith("tests/"))
    else:
        assert program in PROGRAMS


def _pairs(params: Any) -> list[tuple[str, list[str]]]:
    """DVC's ``-S`` settings: a list, or a mapping by file."""
    if not params:
        return []
    return list(params.items()) if isinstance(params, dict) else [("", list(params))]


# --- running ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A trained project in a home of its own, with the files that the pages name."""
    home = tmp_path_factory.mktemp("home")
    folder = home / "mine"
    (folder / "data/raw/votes").mkdir(parents=True)
    (home / "models").mkdir()
    for name in ("Qwen2.5-0.5B", "Qwen2.5-0.5B-Instruct"):
        (home / "models" / name).symlink_to(tiny_folder)
    training = {"learning_rate": 1e-3, "batch_size": 8, "max_steps": 2}
    values = {
        "data.eval_fraction": 0.3,
        "model.name": "tiny",
        **{f"{section}.{key}": value for section in ("sft", "train", "reward") for key, value in training.items()},
        "sft.max_length": 200,
        "reference.max_length": 200,
        "ppo.prompts_a_round": 8,
        "ppo.batch_size": 8,
        "ppo.rounds": 1,
        "ppo.max_new_tokens": 6,
        "evaluate.judge": "world",
        "evaluate.num_prompts": 6,
        "evaluate.max_new_tokens": 6,
        "evaluate.bootstrap_draws": 200,
        "runtime.model_path": str(tiny_folder),
        "runtime.device": "cpu",
    }
    pairs = world.preference_rows(0, 60)
    files: dict[str, list[Any]] = {
        "data/raw/instructions.json": world.instruction_rows(0, 60),
        "data/raw/preferences.json": pairs,
        "data/raw/votes/anna.jsonl": [
            {
                "item_id": str(number),
                "rater": "human:anna",
                "vote": "A",
                "prompt": row["prompt"],
                "completions": ["a", "b"],
            }
            for number, row in enumerate(pairs)
        ],
        "instructions.json": world.instruction_rows(0, 60),
        "pairs.jsonl": pairs,
        "new_pairs.jsonl": pairs[:6],
        "prompts.jsonl": [{"prompt": f"Write {n} as JSON."} for n in range(3)],
        "unseen.jsonl": [{"prompt": f"Write {n} as a word."} for n in range(3)],
    }
    for name, rows in files.items():
        lines = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
        (folder / name).write_text(lines, encoding="utf-8")
    (folder / "params.yaml").write_text(params_yaml(values), encoding="utf-8")
    (folder / "DIR").symlink_to(tiny_folder)
    for stage in STAGES:
        if stage.name not in ("reward", "report"):
            run(folder, [stage.command], home)
    return folder


def run(folder: Path, words: list[str], home: Path, exit_codes: tuple[int, ...] = (0,)) -> None:
    """Run a command in a folder, with a home of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(home))
        result = CliRunner().invoke(
            app, [str(Path(word).expanduser()) if word.startswith("~/") else word for word in words]
        )
    said = result.output + (str(result.exception) if result.exception else "")
    assert result.exit_code in exit_codes, said


@pytest.mark.parametrize(
    "command", [command for command in OURS if not command.reason], ids=lambda command: command.line
)
def test_a_command_runs(command: Command, project: Path, tmp_path: Path) -> None:
    words = [*command.words[1:]]
    home = project.parent
    if "init" in words:  # into a home without the project
        home = tmp_path
        (home / "models").symlink_to(project.parent / "models")
    exit_codes = (0, 4) if "data/raw/prompts.parquet" in words else (0,)  # 4: ties, which a random model may leave
    run(project, [*words, "--no-open"] if words == ["report"] else words, home, exit_codes)


def test_the_recipe_of_a_loss_is_one_function_and_its_test() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    diffs = re.findall(r"^```diff\n--- a/(\S+)\n\+\+\+ b/\1\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert [path for path, _ in diffs] == ["dpo_cli/losses/pairwise.py", "tests/unit/losses/test_pairwise.py"]
    import torch

    from dpo_cli.core.params import TrainParams
    from dpo_cli.losses import catalogue, pairwise

    loss, its_test = (re.sub(r"^\+", "", added, flags=re.MULTILINE) for _, added in diffs)
    try:
        exec(loss, vars(pairwise) | {"Tensor": torch.Tensor})
        names = {"torch": torch, "LOSSES": catalogue.LOSSES, "TrainParams": TrainParams, "Pairs": pairwise.Pairs}
        exec(its_test, names)
        names["test_squared_hinge_is_the_squared_shortfall_from_1"]()
    finally:
        catalogue.LOSSES.pop("squared_hinge", None)


def test_readme_shows_the_verdict_of_the_committed_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dpo_cli.cli.console import ConsoleReporter
    from dpo_cli.evaluation.verdict import report_verdict

    monkeypatch.setenv("COLUMNS", "600")
    metrics = json.loads((ROOT / "reports/evaluate/metrics.json").read_text(encoding="utf-8"))["evaluate"]
    report_verdict(metrics, ConsoleReporter(), also=[("report", "reports/report.html")])
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    [block] = re.findall(r"^```\n(The .*?)^```", (ROOT / "README.md").read_text("utf-8"), flags=re.M | re.DOTALL)
    shown = [" ".join(line.removesuffix("...").split()) for line in block.splitlines()]
    assert [line for line in shown if not any(each.startswith(line) for each in printed)] == []
