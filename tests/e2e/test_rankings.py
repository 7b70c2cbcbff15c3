"""Rankings of several answers, from the file to the trained adapter, in-process and through nf4."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_cli.core import paths
from dpo_cli.core.errors import DataError
from dpo_cli.core.load_params import parse_params
from dpo_cli.core.params import Params
from dpo_cli.core.progress import SilentReporter
from dpo_cli.data import world
from tests.public_files import PUBLIC_DATA, needs_public_data
from tests.tiny_project import run_stages

PUBLIC = PUBLIC_DATA / "kwise" / "oaast_rm_zh.rows0-387.json.gz"
NUM_RANKINGS = 700


_MIDDLING = {
    "add_one": slice(1, None),  # one number of two is right
    "message": slice(1),
    "review": slice(1, None),  # dull in place of hateful
    "greeting": slice(2, None),
}
"""Which of a task's bad answers are half as good as the good one."""


def middling(task: world.Task) -> tuple[str, ...]:
    return task.bad[_MIDDLING[task.kind.partition(".")[0]]]


def graded_reward(task: world.Task, answer: str) -> float:
    return 0.5 if answer in middling(task) else task.reward(answer)


def ranking_rows(seed: int, num_rows: int) -> list[dict[str, Any]]:
    """Rankings of three answers by the graded reward: the good one, a middling one, a bad one, in any order."""
    rng = random.Random(f"rankings {seed}")
    rows = []
    for task in islice(filter(middling, world.draw_tasks(2 * seed + 1)), num_rows):
        worst = rng.choice([answer for answer in task.bad if answer not in middling(task)])
        answers = [task.good, rng.choice(middling(task)), worst]
        rng.shuffle(answers)
        scores = [graded_reward(task, answer) for answer in answers]
        rows.append({"prompt": task.prompt, "completions": answers, "scores": scores})
    return rows


def params_of(
    file: str, pairs: str = "all", max_length: int = 256, format: str = "auto", **train_section: Any
) -> Params:
    settings = {"learning_rate": 1e-3, "batch_size": 8, "beta": 2.0, "eval_steps": 0, **train_section}
    return parse_params(
        {
            "data": {
                "preferences": {"path": f"data/raw/{file}", "format": format, "pairs": pairs},
                "eval_fraction": 0.2,
            },
            "model": {"pretrain_steps": 150},
            "sft": {"method": "none"},
            "reference": {"max_length": max_length},
            "train": settings,
        }
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, make_reporter: Callable[[], Any]) -> Path:
    """A project whose base model is there."""
    folder = tmp_path_factory.mktemp("rankings")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        paths.RAW.mkdir(parents=True)
        rows = ranking_rows(0, NUM_RANKINGS)
        (paths.RAW / "rankings.json").write_text(json.dumps(rows), encoding="utf-8")
        run_stages(params_of("rankings.json"), make_reporter(), "base", "sft")
    return folder


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return project


def held_out_tau(params: Params) -> float:
    """Kendall's tau of the trained implicit reward with the known one, over the held-out rankings of three answers."""
    from dpo_cli.losses.ranking import kendall_tau
    from dpo_cli.models.project import open_project
    from dpo_cli.scoring.reference import read_cache, reference_logps
    from dpo_cli.scoring.scorer import Scorer

    project = open_project(params, SilentReporter(), "test")
    table = project.tokenize_rankings("eval")
    reference = reference_logps(read_cache(paths.REFERENCE, project.identity), table.groups)
    taus = []
    with torch.no_grad(), Scorer(project.pair().use_policy(), project.machine.compute_dtype, "shared") as scorer:
        for indices in scorer.split(table.groups, 1024):
            groups = [table.groups[index] for index in indices]
            known = torch.tensor([reference[group.id] for group in groups], dtype=torch.float64)
            rewards = scorer.score(groups).logps_BK - known
            taus.append(kendall_tau(rewards, torch.tensor([[1, 2, 3]]).expand(len(groups), 3)))
            for group in groups:
                task = world.task_of(table.prompts[group.group][0]["content"])
                assert task is not None
                row = [graded_reward(task, project.encoder.decode(list(ids))) for ids in group.completions]
                assert sorted(row, reverse=True) == row, "the table is best first"
    return torch.cat(taus).mean().item()


def test_rankings_teach_more_than_their_best_and_worst(here: Path, make_reporter: Callable[[], Any]) -> None:
    """At equal data, as many rankings a step and as many steps: the order in the middle is learned from it alone."""
    params = params_of("rankings.json", loss="plackett_luce")
    first = run_stages(params, make_reporter(), "convert_preferences", "precompute_ref")
    assert first["num_computed"] == first["num_completions"] == 3 * NUM_RANKINGS
    metrics = run_stages(params, make_reporter(), "train")
    assert metrics["step0_loss"] == pytest.approx(math.log(6), abs=1e-5), "three answers have 3! orders"
    assert metrics["step0_max_abs_margin"] <= 1e-4
    by_ranking = held_out_tau(params)
    assert by_ranking == pytest.approx(metrics["eval_kendall_tau"], abs=1e-9)
    steps = (paths.report_dir("train") / "steps.tsv").read_text(encoding="utf-8").splitlines()
    assert "eval_rewards/kendall_tau" in steps[0].split("\t")

    params = params_of("rankings.json", pairs="best_vs_worst")
    again = run_stages(params, make_reporter(), "convert_preferences", "precompute_ref")
    assert again["num_computed"] == 0, "another loss, the same cache"
    pairs = run_stages(params, make_reporter(), "train")
    assert (pairs["num_steps"], pairs["num_pairs"]) == (metrics["num_steps"], metrics["num_pairs"])
    by_pairs = held_out_tau(params)
    print(f"held-out Kendall tau: rankings {by_ranking:.3f}, best against worst {by_pairs:.3f}, before training 0")
    assert by_ranking > 0.5, "before training every implicit reward is 0, and so is tau"
    assert by_ranking > by_pairs + 0.05


def test_pairs_alone_are_no_rankings(here: Path, make_reporter: Callable[[], Any]) -> None:
    (paths.RAW / "pairs.json").write_text(json.dumps(world.preference_rows(0, 60)), encoding="utf-8")
    params = params_of("pairs.json", loss="plackett_luce")
    run_stages(params, make_reporter(), "convert_preferences", "precompute_ref")
    with pytest.raises(DataError, match=r"plackett_luce learns from rankings .*train\.ranking\.parquet is missing"):
        run_stages(params, make_reporter(), "train")


@needs_public_data
def test_public_rankings_train_end_to_end(here: Path, make_reporter: Callable[[], Any]) -> None:
    rows = json.loads(gzip.decompress(PUBLIC.read_bytes()))
    (paths.RAW / "oaast_rm_zh.json").write_text(json.dumps(rows[:60]), encoding="utf-8")
    settings = {"loss": "plackett_luce", "ties": "groups", "max_steps": 3}
    params = params_of("oaast_rm_zh.json", max_length=512, format="kwise", **settings)
    metrics = run_stages(params, make_reporter(), "convert_preferences", "precompute_ref", "train")
    assert metrics["num_pairs"] > 5
    assert math.isfinite(metrics["eval_loss"])
    assert metrics["step0_max_abs_margin"] <= 1e-4
