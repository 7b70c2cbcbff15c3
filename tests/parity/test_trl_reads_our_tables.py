"""What the conversion writes goes into TRL's trainers as it is.

Another implementation reads the same prompt, the same answers and the same boundary out of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.core.data_params import DataChecks, PreferenceSource, SftSource, Source
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.convert import convert
from dpo_cli.data.plan import Treatment

NUM_ROWS = 24


def tables(source: Source, folder: Path) -> Any:
    """The train table of a source, as TRL's users load parquet."""
    import datasets

    (folder / "work").mkdir()
    (folder / "out").mkdir()
    treatment = Treatment(DataChecks().model_dump(), 0.2)
    convert([source], treatment, folder / "work", folder / "out", folder / "rejects.jsonl")
    return datasets.load_dataset(
        "parquet", data_files=str(folder / "out" / "train.parquet"), split="train", cache_dir=str(folder / "cache")
    )


def arguments(kind: Any, folder: Path) -> Any:
    return kind(
        output_dir=str(folder / "run"),
        max_steps=1,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=256,
        save_strategy="no",
        disable_tqdm=True,
    )


def test_preferences_go_into_the_dpo_trainer(tmp_path: Path, tokenizer: Any, make_llama: Any) -> None:
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": f"What is {n} + 1?", "chosen": f"It is {n + 1}.", "rejected": f"It is {n}."} for n in range(NUM_ROWS)
    ]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    table = tables(PreferenceSource(path=str(path)), tmp_path)
    trainer = DPOTrainer(
        model=make_llama(len(tokenizer)),
        ref_model=make_llama(len(tokenizer)),
        args=arguments(DPOConfig, tmp_path),
        train_dataset=table,
        processing_class=tokenizer,
    )
    encoder = ChatEncoder(tokenizer)
    for theirs, ours in zip(trainer.train_dataset, table, strict=True):
        assert theirs["prompt_ids"] == encoder.encode_prompt(ours["prompt"])
        for side in ("chosen", "rejected"):
            ids = encoder.encode_completion(ours["prompt"], ours[side])
            assert theirs[f"{side}_ids"][: len(ids)] == ids
    result = trainer.train()
    assert result.global_step == 1
    assert result.training_loss == pytest.approx(0.6931, abs=1e-3)


def test_instructions_go_into_the_sft_trainer(tmp_path: Path, tokenizer: Any, make_llama: Any) -> None:
    from trl import SFTConfig, SFTTrainer

    rows = [{"instruction": "Add 1.", "input": f"{n} cats", "output": f"{n + 1} cats"} for n in range(NUM_ROWS)]
    path = tmp_path / "instructions.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    table = tables(SftSource(path=str(path)), tmp_path)
    trainer = SFTTrainer(
        model=make_llama(len(tokenizer)),
        args=arguments(SFTConfig, tmp_path),
        train_dataset=table,
        processing_class=tokenizer,
    )
    encoder = ChatEncoder(tokenizer)
    for theirs, ours in zip(trainer.train_dataset, table, strict=True):
        prompt = encoder.encode_prompt(ours["prompt"])
        ids = prompt + encoder.encode_completion(ours["prompt"], ours["completion"])
        assert theirs["input_ids"][: len(ids)] == ids
        assert theirs["labels"][: len(ids)] == [-100] * len(prompt) + ids[len(prompt) :]
    assert trainer.train().global_step == 1
