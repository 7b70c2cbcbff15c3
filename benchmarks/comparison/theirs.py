"""TRL's side: its DPOTrainer in its configurations, and how many pairs a forward suit it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks.comparison.cases import (
    BETA,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    PAIRS_A_STEP,
    PASSES,
    Case,
    Logps,
    Meter,
    Outcome,
    Pair,
    Steps,
    length,
    tell,
)

BEST, LARGEST, DEFAULT, COMPACT = "best", "largest", "default", "compact"
CANDIDATES = (1, 2, 4, 8, 16)
"""Pairs a forward that the calibration tries, until it gets slower."""
FIXED_PAIRS = {DEFAULT: 8, LARGEST: PAIRS_A_STEP}
"""Pairs a forward of the sides that are not calibrated."""


def watch(trainer: Any, meter: Meter, case: Case) -> Steps:
    """Have a trainer note what it goes through."""
    from transformers import TrainerCallback

    steps = Steps([], [])
    training_step = trainer.training_step

    class Watcher(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            meter.reset()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            steps.ends.append(case.now())

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            steps.mib = meter.peak_mib()

    def noted(*args: Any, **kwargs: Any) -> Any:
        steps.losses.append(training_step(*args, **kwargs))
        return steps.losses[-1]

    trainer.training_step = noted
    trainer.add_callback(Watcher())
    return steps


def by_length(pairs: Sequence[Pair], indices: range) -> list[int]:
    """Indices in the order of length."""
    return sorted(indices, key=lambda index: length(pairs[index]))


def trl_dataset(pairs: Sequence[Pair], order: Sequence[int], references: Sequence[Logps] | None = None) -> Any:
    """Pairs in some order, as the columns that TRL's collator reads."""
    from datasets import Dataset

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    columns: dict[str, list[Any]] = {name: [pairs[index][part] for index in order] for part, name in enumerate(names)}
    if references is not None:
        columns["ref_chosen_logps"] = [references[index][0] for index in order]
        columns["ref_rejected_logps"] = [references[index][1] for index in order]
    return Dataset.from_dict(columns)


def check_tokens(trainer: Any, pairs: Sequence[Pair], order: Sequence[int]) -> None:
    """Assert that TRL's collator gives the model the very ids of the pairs, and has the answers' tokens scored."""
    for place, index in enumerate(order):
        prompt, *answers = pairs[index]
        batch = trainer.data_collator([trainer.train_dataset[place]])
        for row, answer in enumerate(answers):
            length = len(prompt) + len(answer)
            assert batch["input_ids"][row, :length].tolist() == prompt + answer
            assert batch["attention_mask"][row].nonzero().flatten().tolist() == list(range(length))
            assert batch["completion_mask"][row].nonzero().flatten().tolist() == list(range(len(prompt), length))


def tiny_tokenizer() -> Any:
    """A tokenizer, since TRL wants one; it has no text to tokenize."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def load_policy(case: Case) -> Any:
    """The model with its adapter, trainable."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.set_num_threads(1)
    dtype = torch.bfloat16 if case.on_gpu else torch.float32
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    quantized = {} if case.quantization == "none" else {"quantization_config": nf4, "device_map": {"": case.device}}
    model = AutoModelForCausalLM.from_pretrained(case.base, dtype=dtype, **quantized)
    policy = PeftModel.from_pretrained(model, str(case.workspace / "models" / "sft"), is_trainable=True)
    for module in policy.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return policy


def trl_trainer(case: Case, side: str, policy: Any, dataset: Any, pairs_a_forward: int, folder: str) -> Any:
    """A DPOTrainer that takes token ids and references as they are."""
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class AsItIs(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    arguments = DPOConfig(
        output_dir=folder,
        use_cpu=not case.on_gpu,
        bf16=case.on_gpu,
        gradient_checkpointing=False,
        per_device_train_batch_size=pairs_a_forward,
        gradient_accumulation_steps=PAIRS_A_STEP // pairs_a_forward,
        max_steps=case.num_steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM,
        beta=BETA,
        precompute_ref_log_probs=True,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_strategy="steps" if side == DEFAULT else "no",
    )
    trained = {name: part.detach().clone() for name, part in policy.named_parameters() if part.requires_grad}
    trainer = AsItIs(model=policy, args=arguments, train_dataset=dataset, processing_class=tiny_tokenizer())
    for name, part in policy.named_parameters():
        if name in trained:
            part.data = trained[name]
    return trainer


def trl_references(
    trainer: Any, dataset: Any, pairs_a_forward: int, meter: Meter, case: Case
) -> tuple[float, float, list[Logps]]:
    """TRL's own reference pass: seconds, peak MiB, and what it found.

    The time ends with the last forward pass: that it writes the datasets cache does not count.
    """
    from trl.trainer.dpo_trainer import DPOTrainer

    compute = trainer.compute_ref_log_probs
    end = 0.0

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal end
        found = compute(*args, **kwargs)
        end = case.now()
        return found

    compute(trainer.model, _moved(trainer, trainer.data_collator([dataset[0], dataset[1]])))
    trainer.compute_ref_log_probs = timed
    meter.reset()
    begun = case.now()
    found = DPOTrainer._precompute_ref_logps(trainer, dataset, "train", pairs_a_forward)
    peak_mib = meter.peak_mib()
    return end - begun, peak_mib, list(zip(found["ref_chosen_logps"], found["ref_rejected_logps"], strict=True))


def _moved(trainer: Any, batch: Any) -> Any:
    """A batch on the device of the trainer's model."""
    return trainer._prepare_inputs(batch)


def score_answers_only() -> None:
    """Have TRL's head leave out the prompts' positions, as it does where there is Triton."""
    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda device: True  # type: ignore[reportPrivateImportUsage]


def run_trl(case: Case, side: str, pairs_a_forward: dict[str, int]) -> Outcome:
    """TRL's trainer in one of its configurations."""
    import trl.trainer.dpo_trainer  # noqa: F401  before memory is measured

    if side == COMPACT:
        score_answers_only()
    pairs, references = case.read()
    timed = range(PAIRS_A_STEP, len(pairs))
    order, reference_order = list(range(len(pairs))), list(timed)
    if side != DEFAULT:
        begins = range(0, len(pairs), PAIRS_A_STEP)
        order = [index for begin in begins for index in by_length(pairs, range(begin, begin + PAIRS_A_STEP))]
        reference_order = by_length(pairs, timed)
    policy = load_policy(case)
    dataset, reference_dataset = trl_dataset(pairs, order, references), trl_dataset(pairs, reference_order)
    meter = Meter(case)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(case, side, policy, dataset, pairs_a_forward["step"], folder)
        check_tokens(trainer, pairs, order)
        reference_s, reference_mib, found = trl_references(
            trainer, reference_dataset, pairs_a_forward["reference"], meter, case
        )
        steps = watch(trainer, meter, case)
        trainer.train()
    by_index = dict(zip(reference_order, found, strict=True))
    logps = [by_index[index] for index in timed]
    losses = steps.step_losses(case.num_steps)
    seconds, mib = {"step": steps.seconds, "reference": reference_s}, {"step": steps.mib, "reference": reference_mib}
    return Outcome(seconds, mib, logps, losses, meter.process_mib, meter.cpu_share())


def calibrate(case: Case) -> dict[str, int]:
    """Pairs a forward with which ``best`` is fastest on the pairs of one step; the fewest of those within 5% of it."""
    import torch

    pairs, references = case.read()
    rows = trl_dataset(pairs, by_length(pairs, range(PAIRS_A_STEP, 2 * PAIRS_A_STEP)), references)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(case, BEST, load_policy(case), rows, 1, folder)
    trainer.model.train()

    def score(what: str, places: range) -> None:
        batch = _moved(trainer, trainer.data_collator([rows[place] for place in places]))
        if what == "step":
            trainer.compute_loss(trainer.model, batch).backward()
        else:
            trainer.compute_ref_log_probs(trainer.model, batch)

    fastest = {}
    for what in PASSES:
        times: dict[int, float] = {}
        for pairs_a_forward in CANDIDATES:
            batches = [range(begin, begin + pairs_a_forward) for begin in range(0, PAIRS_A_STEP, pairs_a_forward)]
            try:
                score(what, batches[-1])  # warms up with the longest
                begun = case.now()
                for batch in batches:
                    score(what, batch)
            except torch.OutOfMemoryError:
                break
            times[pairs_a_forward] = case.now() - begun
            if times[pairs_a_forward] > 1.15 * min(times.values()):
                break
        tell(f"{what}: seconds by pairs a forward {times}")
        fastest[what] = next(size for size, taken in times.items() if taken <= 1.05 * min(times.values()))
    return fastest
