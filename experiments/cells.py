"""One training of an experiment's grid, measured as it goes on: reward and KL of the policy's answers.

A cell is a method with one value of its setting and one seed. It trains in the seed's project with the product's own
code, and every so many steps the policy answers prompts that no training has seen. What is measured is stored at once,
so a cell that was killed goes on from its last checkpoint, and one that is done is not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dpo_cli.core import paths
from dpo_cli.core.artifacts import atomic_path, digest_json, read_json, write_json
from dpo_cli.core.load_params import load_params
from dpo_cli.core.manifest import REWARD
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter, SilentReporter
from dpo_cli.core.scratch import stage_scratch
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.evaluation import DPO, SFT
from dpo_cli.evaluation.generation import PromptTokens
from dpo_cli.evaluation.models import EvaluatedModel, LoadedModel, reference_model
from dpo_cli.evaluation.steps import Steps
from dpo_cli.judging.answers import Answer
from dpo_cli.judging.reward_model import RewardModel
from dpo_cli.models.adapters import ModelPair, save_adapter
from dpo_cli.models.load import quiet_libraries
from dpo_cli.models.project import Project, open_project
from dpo_cli.rlhf.opening import open_reinforcement, training_prompts
from dpo_cli.rlhf.rewards import open_rewarder
from dpo_cli.rlhf.rollouts import Rewarder
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.scoring.reference import read_cache, reference_logps
from dpo_cli.scoring.scorer import Scorer
from dpo_cli.training.accumulation import Limits, LossScale
from dpo_cli.training.fit import Shuffled, count_steps, make_descent
from dpo_cli.training.loop import Course, Data, Loop
from dpo_cli.training.memory import choose_memory
from dpo_cli.training.objective import preference_objective
from dpo_cli.training.parallel import Job
from dpo_cli.training.protocols import BatchSource, Learner

Reward = Callable[[str, str], float]
"""From prompt and answer to what is known of it."""
VERSION = 2
"""To be raised when a cell is trained or measured otherwise: then all are run again."""


@dataclass(frozen=True)
class Cell:
    """A training of a grid.

    Attributes:
        method: What the figure calls it: ``dpo``, ``ppo``, ...
        value: Of the setting that tells its points apart; None where there is one.
        seed: Of data and training.
        settings: What it sets, as ``section.key=value``.
        reward: For reinforcement, ``learned`` or ``known``; empty for a training on pairs.
        eval_steps: Optimizer steps between measurements.
    """

    method: str
    value: float | None
    seed: int
    settings: tuple[str, ...]
    reward: str = ""
    eval_steps: int = 100

    @property
    def name(self) -> str:
        """Its folder."""
        return "-".join([self.method, *([] if self.value is None else [f"{self.value:g}"]), str(self.seed)])


def read_cells(grid: Mapping[str, Any], seed: int) -> list[Cell]:
    """The cells of a grid for one seed: each entry has ``method``, ``set``, and perhaps ``over`` and ``values``."""
    cells = []
    for entry in grid["cells"]:
        for value in entry.get("values", [None]):
            settings = {**entry.get("set", {}), **({} if value is None else {entry["over"]: value})}
            sections = {name.partition(".")[0] for name in settings}
            settings |= {f"{section}.seed": seed for section in sections}
            told = tuple(f"{name}={setting}" for name, setting in settings.items())
            cells.append(Cell(entry["method"], value, seed, told, entry.get("reward", ""), grid["eval_steps"]))
    return cells


def run_cell(cell: Cell, known: Reward, results: Path, reporter: Reporter, *, keeps_adapter: bool = False) -> None:
    """Train a cell in the project of the working directory, and write its measurements to a folder of its own.

    Args:
        cell: What is trained.
        known: The reward that answers are measured with.
        results: Where its folder is made: a table a measured step, and cell.json when it is done.
        reporter: Shows progress.
        keeps_adapter: Whether the policy as it is at the end stays beside the measurements, in folder adapter.

    Raises:
        StaleArtifactError: An earlier stage's result is missing or stale.
        Interrupted: The user asked to stop; a checkpoint is kept.
    """
    quiet_libraries()
    folder = results / cell.name
    params = load_params(paths.PARAMS, ["evaluate.temperature=1.0", *cell.settings])
    project = open_project(params, reporter, "train" if not cell.reward else "ppo")
    made_of = project.made_of() | ({"models/reward": REWARD.read().files} if cell.reward == "learned" else {})
    read = ("model", "reference", "evaluate", "ppo" if cell.reward else "train")
    settings = {name: getattr(params, name).model_dump() for name in read}
    key = digest_json([VERSION, asdict(cell), made_of, settings])
    if (folder / "cell.json").is_file() and read_json(folder / "cell.json", "delete it")["key"] == key:
        reporter.say(f"{cell.name}: done before")
        return
    with stage_scratch(f"cell-{cell.name}", key) as scratch:
        opened = _reinforced(cell, params, project, known) if cell.reward else _on_pairs(params, project)
        prompts = held_out_prompts(project)
        measured = Measured(project, params, opened.pair, opened.scorer, key, known, prompts, folder, scratch.folder)
        source = _Watched(opened.source, cell.eval_steps, opened.num_steps, measured)
        steps = params.ppo if cell.reward else params.train
        descent = make_descent(opened.learner.model, steps, opened.num_steps, project.machine.device, project.command)
        course = Course(opened.num_steps, steps.seed, what=cell.name)
        limits = Limits(opened.budget, LossScale(project))
        loop = Loop(opened.learner, Data(source), descent, course, limits, Job(project, scratch.folder))
        loop.run()
        opened.scorer.close()
        if keeps_adapter:
            save_adapter(opened.pair.model, folder / "adapter", params.model.name)
        write_json(folder / "log.json", loop.history)
        write_json(folder / "cell.json", {"key": key, **asdict(cell)})
        scratch.clear()


@dataclass(frozen=True)
class _Opened:
    """A training before its first step; its fields are those of a Reinforcement that are read here."""

    pair: ModelPair
    scorer: Scorer
    learner: Learner[Any]
    source: BatchSource[TokenGroup]
    num_steps: int
    budget: TokenBudget


def _on_pairs(params: Params, project: Project) -> _Opened:
    """A training on the project's pairs, as section train describes it."""
    train = project.tokenize_pairs("train").groups
    objective = preference_objective(
        params.train, reference_logps(read_cache(paths.REFERENCE, project.identity), train)
    )
    pair = project.pair_at_start(params.train.lora, params.train.seed)
    scorer, _ = project.scorer(pair.use_policy())
    source, num_steps = (
        Shuffled(train, params.train.batch_size, params.train.seed),
        count_steps(params.train, len(train)),
    )
    plan = choose_memory(pair.model, scorer, train, params.train.batch_size, project)
    budget = TokenBudget(plan.max_tokens, project.command, project.reporter)
    return _Opened(pair, scorer, Learner(pair.model, scorer, objective), source, num_steps, budget)


def _reinforced(cell: Cell, params: Params, project: Project, known: Reward) -> _Opened:
    """A training by reinforcement, as section ppo describes it."""
    prompts = training_prompts(project, params.ppo.prompts_a_round)
    asked = {prompt.id: prompt.messages for prompt in prompts}
    ppo = params.ppo.model_copy(update={"reward": "reward-model"})

    def open_reward(pair: ModelPair) -> Rewarder:
        return open_rewarder(project, pair, ppo, asked, known=known if cell.reward == "known" else None)

    found = open_reinforcement(project, params.ppo, prompts, open_reward)
    return _Opened(found.pair, found.scorer, found.learner, found.source, found.num_steps, found.budget)


def held_out_prompts(project: Project) -> list[PromptTokens]:
    """The prompts of the held-out pairs, in the order of their ids."""
    table = project.tokenize_pairs("eval")
    first = {group.group: group.prompt for group in table.groups}
    return [PromptTokens(id, first[id], table.prompts[id]) for id in sorted(first)]


# --- measuring --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Measures a policy that is in memory, in the midst of its training.

    Attributes:
        project: Whose models they are.
        params: Section evaluate says how answers are sampled.
        pair: Policy and reference.
        scorer: Of the same model.
        key: Of the training, so that a measurement that was taken is not taken again.
        known: The reward.
        prompts: What is answered.
        folder: Where a table a step is written.
        scratch: Where rows are kept until then.
    """

    project: Project
    params: Params
    pair: ModelPair
    scorer: Scorer
    key: str
    known: Reward
    prompts: Sequence[PromptTokens]
    folder: Path
    scratch: Path

    def __call__(self, step: int) -> None:
        """Write the reward, the KL and the text of an answer to each prompt, sampled at temperature 1."""
        path = self.folder / f"{step:05d}.parquet"
        if path.is_file() and pl.read_parquet_metadata(path).get("key") == self.key:
            return
        start = digest_json([VERSION, self.project.made_of(), self.params.evaluate.model_dump()]) if step == 0 else ""
        of = {"key": self.key, "start": start}
        for there in self.folder.parent.glob(f"*/{path.name}") if start else ():  # each cell of a seed starts the same
            if pl.read_parquet_metadata(there).get("start") == start:
                self._write(path, pl.read_parquet(there), of)
                return
        head, self.scorer.value_head = self.scorer.value_head, None
        steps = Steps(self.project, self.params.evaluate, self.scratch / "measured")
        policy = self._model(DPO, digest_json([self.key, step]), self.pair.use_policy)
        reference = self._model(SFT, digest_json(self.project.identity), self.pair.use_reference)
        answers = steps.answers(policy, self.prompts, 1.0)
        rows = answer_rows(answers, self.known)
        kls = steps.divergences(policy, reference, answers)
        for row in rows:
            row |= {"kl": kls[row["prompt_id"]].exact, "k1": kls[row["prompt_id"]].k1}
        self.scorer.value_head = head
        self.pair.use_policy()
        self._write(path, pl.DataFrame(rows), of)

    def _write(self, path: Path, table: pl.DataFrame, of: dict[str, str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            table.write_parquet(temporary, metadata=of)

    def _model(self, name: str, digest: str, switch: Callable[[], Any]) -> EvaluatedModel:
        return EvaluatedModel(name, digest, lambda: nullcontext(LoadedModel(switch(), self.scorer)))


def answer_rows(answers: Mapping[str, Answer], known: Reward) -> list[dict[str, Any]]:
    """A row an answer: prompt, text, known reward, tokens."""
    return [
        {
            "prompt_id": id,
            "prompt": answer.messages[-1]["content"],
            "text": answer.text,
            "reward": known(answer.messages[-1]["content"], answer.text),
            "num_tokens": answer.num_tokens,
            "finished": answer.finished,
        }
        for id, answer in sorted(answers.items())
    ]


class _Watched(BatchSource[TokenGroup]):
    """A source that has the policy measured before its first step, every so many steps and after the last."""

    def __init__(
        self, inner: BatchSource[TokenGroup], every: int, num_steps: int, measured: Callable[[int], None]
    ) -> None:
        self._inner, self._every, self._num_steps, self._measured, self._step = inner, every, num_steps, measured, 0

    def batch(self, step: int) -> Sequence[TokenGroup]:
        if step == 0:
            self._measured(0)
        self._step = step + 1
        return self._inner.batch(step)

    def after_step(self, metrics: Mapping[str, float]) -> None:
        self._inner.after_step(metrics)
        if self._step % self._every == 0 or self._step == self._num_steps:
            self._measured(self._step)

    def state(self) -> Mapping[str, Any]:
        return self._inner.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._inner.restore(state)


# --- the reference -----------------------------------------------------------------------------


def reference_samples(number: int, seed: int, known: Reward, out: Path) -> None:
    """Many answers of the reference to each held-out prompt of the half that is reported, by both rewards.

    Writes float64 [prompts, number] ``known`` and ``learned``, the prompts' ids, and the texts of the first prompt's
    answers, for Best-of-N and the ideal.
    """
    params = load_params(paths.PARAMS, ["evaluate.temperature=1.0", f"evaluate.seed={1000 + seed}"])
    project = open_project(params, SilentReporter(), "sample")
    prompts = held_out_prompts(project)[1::2]  # half 1
    key = digest_json([VERSION, number, seed, project.made_of(), REWARD.read().files])
    if out.is_file() and str(np.load(out)["key"]) == key:
        return
    asked = [PromptTokens(f"{each.id}-{k}", each.tokens, each.messages) for each in prompts for k in range(number)]
    with stage_scratch("reference-samples", key) as scratch:
        answers = Steps(project, params.evaluate, scratch.folder).answers(reference_model(project), asked, 1.0)
        texts = [answers[each.id] for each in asked]
        shape = (len(prompts), number)
        rewards = np.array([known(each.messages[-1]["content"], each.text) for each in texts]).reshape(shape)
        learned = RewardModel.load(paths.REWARD_MODEL, project).rewards(texts)
        ids = np.array([each.id for each in prompts])
        with atomic_path(out) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                key=key,
                known=rewards,
                learned=np.array(learned).reshape(shape),
                prompt_ids=ids,
                texts=np.array([each.text for each in texts[:number]]),
            )
        scratch.clear()


def measured_tables(folder: Path) -> dict[int, Path]:
    """What a finished cell measured, by step; a table of an earlier run with other settings is none of them."""
    key = read_json(folder / "cell.json", "run the experiment again")["key"]
    paths = [path for path in sorted(folder.glob("*.parquet")) if pl.read_parquet_metadata(path).get("key") == key]
    return {int(path.stem): path for path in paths}


def half(rows: pl.DataFrame, which: int) -> pl.DataFrame:
    """Every other row, in the order of prompt ids: half 0 is chosen on, half 1 is reported."""
    return rows.sort("prompt_id")[which::2]
