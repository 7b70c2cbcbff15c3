"""The embedded model's pretraining, as the training loop sees it: a batch is one item of packed rows, with one loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_cli.models.device import Machine
from dpo_cli.models.embedded import (
    PackedRows,
    build_model,
    build_tokenizer,
    pretraining_batch,
    pretraining_loss,
    pretraining_optimizer,
)
from dpo_cli.scoring.scorer import Statistics
from dpo_cli.training.accumulation import Limits
from dpo_cli.training.loop import Course, Data, Descent, Loop
from dpo_cli.training.parallel import Job
from dpo_cli.training.protocols import BatchSource, GroupLosses, Learner


def build_embedded(folder: Path, seed: int, num_steps: int, job: Job) -> None:
    """Build tokenizer and weights of the embedded model into ``folder``, in Hugging Face layout.

    Args:
        folder: An empty folder to write to.
        seed: Of weights and text.
        num_steps: Optimizer steps of pretraining.
        job: Where it works.

    Raises:
        Interrupted: The user asked to stop; a checkpoint is in the job's folder.
    """
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    packed: Any = _Packed(model, tokenizer, seed, num_steps)
    descent = Descent(*pretraining_optimizer(model, num_steps), max_grad_norm=1.0)
    course = Course(num_steps, seed, what="pretraining the embedded model")
    on_cpu = replace(job.work, machine=Machine(packed.device, packed.compute_dtype))  # whatever there is beside it
    limits, job = Limits.of(on_cpu, 1), replace(job, work=on_cpu)
    Loop(Learner(model, packed, packed), Data(packed), descent, course, limits, job).run()
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class _Packed(BatchSource[PackedRows]):
    """Packed rows, drawn anew for each step; their loss; and what is minimized, which is that loss."""

    device = torch.device("cpu")
    compute_dtype = torch.float32
    is_coupled = False
    statistics: Statistics = "none"
    metric_names: Sequence[str] = ()

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, num_steps: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._seed = seed
        self._num_steps = num_steps

    def batch(self, step: int) -> Sequence[PackedRows]:
        return [pretraining_batch(self._tokenizer, self._seed, step, self._num_steps)]

    def split(self, groups: Sequence[PackedRows], max_tokens: int) -> list[list[int]]:
        return [[0]]

    def score(self, groups: Sequence[PackedRows], *, statistics: Statistics) -> torch.Tensor:
        return pretraining_loss(self._model, groups[0])

    def weight(self, groups: Sequence[PackedRows]) -> float:
        return 1.0

    def losses(self, groups: Sequence[PackedRows], scores: torch.Tensor, step: Sequence[PackedRows]) -> GroupLosses:
        return GroupLosses(scores[None], {})
