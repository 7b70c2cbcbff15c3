"""Equal to TRL's DPOTrainer in log-probabilities, losses, metrics and the curve of 20 steps.

Both load one saved model and one saved adapter, in float32 and each in its own way: TRL with PEFT's layers, padded rows
and a reference that it scores again at every step with a frozen copy of the adapter; we with our layers, each layout,
micro-batches, and references scored once before the first step. The token ids are the same, which is checked on what
TRL's collator gives to its model.

The adapter's B is not 0, so the reference is not the base, and a wrong adapter in either role would show.

An accuracy of a tie is one half with us and 0 with TRL, which asks for *chosen > rejected*. So accuracies are compared
after the first step: before it policy and reference are one, and every margin is a tie but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import SequentialSampler

from dpo_cli.core.params import RuntimeParams, TrainParams
from dpo_cli.core.training_params import LoraParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.adapters import add_adapter, save_adapter
from dpo_cli.models.lora import use_short_layers
from dpo_cli.models.project import Workplace
from dpo_cli.scoring.layout import LAYOUTS, LayoutName
from dpo_cli.scoring.scorer import Scorer
from dpo_cli.training.accumulation import Limits
from dpo_cli.training.fit import make_descent
from dpo_cli.training.loop import Course, Data, Loop
from dpo_cli.training.objective import PairObjective
from dpo_cli.training.parallel import Job
from dpo_cli.training.protocols import BatchSource, Learner

TOLERANCE = 1e-4
BETA = 0.1
BATCH_SIZE = 8
NUM_STEPS = 20
VOCABULARY = 128
SETTINGS = TrainParams(
    learning_rate=1e-3,
    batch_size=BATCH_SIZE,
    max_steps=NUM_STEPS,
    schedule="constant",
    warmup_ratio=0.0,
    optimizer="adamw",
    max_grad_norm=1.0,
    beta=BETA,
    eval_steps=0,
)
METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "entropy",
    "mean_token_accuracy",
)


@dataclass(frozen=True)
class Setting:
    """What both tools get."""

    folder: Path
    pairs: list[TokenGroup]


@pytest.fixture(scope="module")
def setting(
    tmp_path_factory: pytest.TempPathFactory,
    make_llama: Callable[..., Any],
    make_groups: Callable[..., list[TokenGroup]],
) -> Setting:
    """A saved model with a saved adapter that does something, and four optimizer batches of pairs."""
    folder = tmp_path_factory.mktemp("both")
    model = make_llama(VOCABULARY)
    model.save_pretrained(folder / "model")
    policy = add_adapter(model, LoraParams(r=4, alpha=8.0), seed=0)
    perturb(policy, seed=1)
    save_adapter(policy, folder / "adapter", "model")
    pairs = make_groups(
        4 * BATCH_SIZE, vocabulary=VOCABULARY, prompt_lengths=(3, 40), completion_lengths=(2, 24), seed=3
    )
    return Setting(folder, pairs)


def perturb(policy: Any, seed: int) -> None:
    """Add noise to B of the adapter that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B.default" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def load_policy(setting: Setting, *, ours: bool) -> Any:
    """The model with its adapter, to be trained; TRL's is as PEFT makes it."""
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(setting.folder / "model", dtype=torch.float32)
    adapter = setting.folder / "adapter"
    config: Any = LoraConfig.from_pretrained(str(adapter))
    config = use_short_layers(config) if ours else config
    return PeftModel.from_pretrained(model, str(adapter), is_trainable=True, config=config)


# --- TRL ----------------------------------------------------------------------------------


def make_trl_trainer(setting: Setting, tokenizer: Any, folder: Path, **changes: Any) -> Any:
    """A DPOTrainer on exactly our token ids, in their order."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class OnTheseTokens(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    config = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH_SIZE,
        max_steps=NUM_STEPS,
        learning_rate=SETTINGS.learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=SETTINGS.max_grad_norm,
        beta=BETA,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        **changes,
    )
    columns = {
        "prompt_ids": [list(pair.prompt) for pair in setting.pairs],
        "chosen_ids": [list(pair.completions[0]) for pair in setting.pairs],
        "rejected_ids": [list(pair.completions[1]) for pair in setting.pairs],
    }
    trainer = OnTheseTokens(
        model=load_policy(setting, ours=False),
        args=config,
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
    )
    assert_same_tokens(trainer, setting.pairs)
    return trainer


def assert_same_tokens(trainer: Any, pairs: Sequence[TokenGroup]) -> None:
    """TRL's batches hold our token ids, pair by pair in our order, and score the completions' tokens alone."""
    place = 0
    for batch in trainer.get_train_dataloader():
        size = len(batch["input_ids"]) // 2
        for row in range(2 * size):
            pair = pairs[place + row % size]
            completion = pair.completions[row // size]
            length = len(pair.prompt) + len(completion)
            assert batch["attention_mask"][row].sum() == length
            assert batch["input_ids"][row, :length].tolist() == [*pair.prompt, *completion]
            scored = batch["completion_mask"][row].nonzero().flatten().tolist()
            assert scored == list(range(len(pair.prompt), length))
        place += size
    assert place == len(pairs)


def trl_batches(trainer: Any) -> Iterator[dict[str, Any]]:
    for batch in trainer.get_train_dataloader():
        yield trainer._prepare_inputs(batch)


# --- ours ---------------------------------------------------------------------------------


class InOrder(BatchSource[TokenGroup]):
    """Takes the pairs as they come, and from the first again."""

    def __init__(self, pairs: Sequence[TokenGroup]) -> None:
        self._pairs = pairs

    def batch(self, step: int) -> Sequence[TokenGroup]:
        start = step * BATCH_SIZE % len(self._pairs)
        return self._pairs[start : start + BATCH_SIZE]


def score_all(scorer: Scorer, pairs: Sequence[TokenGroup]) -> torch.Tensor:
    """float64 [number of pairs, 2], in batches of several pairs."""
    batches = [pairs[start : start + BATCH_SIZE] for start in range(0, len(pairs), BATCH_SIZE)]
    with torch.no_grad():
        return torch.cat([scorer.score(batch).logps_BK for batch in batches])


def objective_of(scorer: Scorer, pairs: Sequence[TokenGroup], loss: Any = "sigmoid") -> PairObjective:
    reference = {pair.id: row.tolist() for pair, row in zip(pairs, score_all(scorer, pairs), strict=True)}
    return PairObjective(TrainParams(loss=loss, beta=BETA), reference)


def our_curve(
    setting: Setting, layout: LayoutName, max_tokens: int, cpu: Any, reporter: Any, folder: Path
) -> list[Any]:
    """The logged values of every step."""
    model = load_policy(setting, ours=True)
    descent = make_descent(model, SETTINGS, NUM_STEPS, cpu.device, "train")
    job = Job(Workplace("train", reporter, RuntimeParams(), cpu), folder)
    limits = Limits.of(job.work, max_tokens)
    with Scorer(model, torch.float32, layout) as scorer:
        assert len(scorer.split(setting.pairs[:BATCH_SIZE], max_tokens)) > 1, "a step should take several micro-batches"
        learner = Learner(model, scorer, objective_of(scorer, setting.pairs))
        loop = Loop(learner, Data(InOrder(setting.pairs)), descent, Course(NUM_STEPS), limits, job)
        loop.run()
    return [entry for entry in loop.history if "loss" in entry]


# --- log-probabilities and losses ---------------------------------------------------------


def test_log_probabilities_of_pairs_are_those_of_trl(setting: Setting, tokenizer: Any, tmp_path: Path) -> None:
    trainer = make_trl_trainer(setting, tokenizer, tmp_path / "trl")
    batches = [trainer.compute_ref_log_probs(trainer.model, batch) for batch in trl_batches(trainer)]
    theirs = torch.cat([torch.stack(batch, 1) for batch in batches])
    assert theirs.std() > 1
    for layout in LAYOUTS:
        with Scorer(load_policy(setting, ours=True).eval(), torch.float32, layout) as scorer:
            ours = score_all(scorer, setting.pairs)
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("loss", "layout"), [("sigmoid", "shared"), ("hinge", "padded"), ("ipo", "shared")])
def test_the_losses_that_both_have_are_equal_away_from_the_reference(
    loss: str, layout: LayoutName, setting: Setting, tokenizer: Any, tmp_path: Path
) -> None:
    """Where ours is called ipo, so is TRL's: both divide each log-ratio by the tokens of its completion.

    ``cdpo`` has no counterpart: TRL's ``robust`` divides by 1 - 2e and subtracts the flipped term.
    """
    trainer = make_trl_trainer(setting, tokenizer, tmp_path / "trl", loss_type=[loss])
    perturb(trainer.model, seed=2)
    trainer.model.eval()
    model = load_policy(setting, ours=True).eval()
    with Scorer(model, torch.float32, layout) as scorer:
        objective = objective_of(scorer, setting.pairs, loss)
        perturb(model, seed=2)
        for index, batch in enumerate(trl_batches(trainer)):
            pairs = setting.pairs[index * BATCH_SIZE :][:BATCH_SIZE]
            with torch.no_grad():
                theirs = trainer.compute_loss(trainer.model, batch).item()
                result = objective.losses(pairs, scorer.score(pairs), pairs)
            assert result.metrics["rewards/margins"].abs().max() > 0.1
            assert result.losses_B.mean().item() == pytest.approx(theirs, abs=TOLERANCE)


# --- the curve ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl_curve(setting: Setting, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """What TRL logs at every step."""
    trainer = make_trl_trainer(setting, tokenizer, tmp_path_factory.mktemp("trl"))
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("layout", "max_tokens"), [("shared", 96), ("padded", 256)])
def test_the_curve_of_20_steps_is_that_of_trl(
    layout: LayoutName,
    max_tokens: int,
    setting: Setting,
    trl_curve: list[dict[str, float]],
    cpu: Any,
    reporter: Any,
    tmp_path: Path,
) -> None:
    ours = our_curve(setting, layout, max_tokens, cpu, reporter, tmp_path)
    assert len(ours) == len(trl_curve) == NUM_STEPS
    assert trl_curve[0]["loss"] == pytest.approx(math.log(2), abs=TOLERANCE)
    assert trl_curve[-1]["loss"] < 0.5, "a curve that does not move proves little"
    for step, (our_entry, their_entry) in enumerate(zip(ours, trl_curve, strict=True)):
        for name in METRICS:
            assert our_entry[name] == pytest.approx(their_entry[name], abs=TOLERANCE), (step, name)
        assert our_entry["learning_rate"] == their_entry["learning_rate"] == SETTINGS.learning_rate
        assert our_entry["grad_norm"] == pytest.approx(their_entry["grad_norm"], rel=1e-3)
        if step > 0:
            assert our_entry["rewards/accuracies"] == pytest.approx(their_entry["rewards/accuracies"], abs=1e-6)
