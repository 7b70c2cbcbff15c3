"""Optimizers and schedules are those of transformers.Trainer, to the bit: groups, decay, learning rates, steps."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dpo_cli.core.training_params import TrainingParams
from dpo_cli.training.fit import make_descent, num_warmup_steps
from dpo_cli.training.loop import Descent

NUM_STEPS = 12
NAMES = {"adamw": "adamw_torch", "rmsprop": "rmsprop"}


class Model(torch.nn.Module):
    """A llama with biases, and a LayerNorm whose name says nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
        self.llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, attention_bias=True))
        self.scaled = torch.nn.LayerNorm(8)
        self.llama.model.embed_tokens.requires_grad_(False)


def theirs(model: Model, params: TrainingParams, folder: Path) -> Descent:
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        learning_rate=params.learning_rate,
        lr_scheduler_type="constant_with_warmup" if params.schedule == "constant" else params.schedule,
        warmup_steps=num_warmup_steps(params, NUM_STEPS),
        optim=NAMES[params.optimizer],
        weight_decay=params.weight_decay,
        report_to="none",
    )
    trainer = Trainer(model, arguments)
    trainer.create_optimizer_and_scheduler(NUM_STEPS)
    assert trainer.optimizer is not None
    return Descent(trainer.optimizer, trainer.lr_scheduler, params.max_grad_norm)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("optimizer", "weight_decay"), [("adamw", 0.0), ("adamw", 0.1), ("rmsprop", 0.0)])
def test_steps_are_those_of_the_trainer(optimizer: str, weight_decay: float, schedule: str, tmp_path: Path) -> None:
    changes = {"optimizer": optimizer, "weight_decay": weight_decay, "schedule": schedule, "warmup_ratio": 0.25}
    params = TrainingParams(learning_rate=1e-2).model_copy(update=changes)
    models = [Model(), Model()]
    descents = [
        make_descent(models[0], params, NUM_STEPS, torch.device("cpu"), "train"),
        theirs(models[1], params, tmp_path),
    ]
    generator = torch.Generator().manual_seed(1)
    start = copy.deepcopy(models[0].state_dict())
    for _ in range(NUM_STEPS):
        rates = [descent.schedule.get_last_lr() for descent in descents]
        assert rates[0] == rates[1]
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            gradient = torch.randn(parameters[0].shape, generator=generator)
            for parameter in parameters:
                parameter.grad = gradient.clone() if parameter.requires_grad else None
        for descent in descents:
            descent.optimizer.step()
            descent.schedule.step()
    found, expected = (model.state_dict() for model in models)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(not torch.equal(value, start[name]) for name, value in found.items())
