"""Tiny random models of several families, saved to disk, through qlora SFT, the reference cache and DPO in nf4."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.load_params import parse_params
from dpo_cli.core.params import Params
from dpo_cli.core.progress import SilentReporter
from tests.tiny_project import CONVERTED, run_stages, tiny_params, tiny_settings, write_raw

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def _config(family: str, vocab_size: int, special: dict[str, int]) -> Any:
    import transformers

    extra = {"head_dim": 16} if family in ("Qwen3", "Gemma2") else {}
    make: Callable[..., Any] = getattr(transformers, f"{family}Config")
    return make(vocab_size=vocab_size, **_SHAPE, **extra, **special)


def save_model(family: str, tokenizer: Any, folder: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    AutoModelForCausalLM.from_config(_config(family, len(tokenizer), special)).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Gemma2", "Phi3"])
def test_a_tiny_model_goes_through_nf4(
    family: str, project: Path, tmp_path: Path, tokenizer: Any, reporter: Any
) -> None:
    folder = save_model(family, tokenizer, tmp_path / family)
    params = tiny_params(folder)
    run_through(params, reporter)
    assert not Path("models/base/model.safetensors").exists()
    assert_the_card_loads_it(params, folder)


def test_an_adapter_of_ones_own_is_start_and_reference(
    project: Path, tmp_path: Path, tiny_folder: Path, reporter: Any
) -> None:
    from dpo_cli.models.identity import read_base_lock
    from dpo_cli.stages import base, sft

    write_raw()
    run_stages(tiny_params(tiny_folder), reporter, *CONVERTED, "sft")
    mine = shutil.copytree("models/sft", tmp_path / "mine")
    shutil.rmtree("models/sft")
    settings = tiny_settings(tiny_folder)
    settings["runtime"]["adapter_path"] = str(mine)
    params = parse_params(settings | {"sft": {"method": "adapter"}})
    run_through(params, reporter)
    assert json.loads(Path("models/sft/sft.json").read_text(encoding="utf-8"))["settings"]["sft"]["method"] == "adapter"
    assert_the_card_loads_it(params, tiny_folder)
    before = read_base_lock()
    config = mine / "adapter_config.json"
    config.write_text(
        config.read_text(encoding="utf-8").replace('"lora_alpha": 32', '"lora_alpha": 64'), encoding="utf-8"
    )
    with pytest.raises(StaleArtifactError, match=r"adapter_config.json is not the file that was locked; set sft"):
        sft.run(params, reporter)
    base.run(params, reporter)
    assert read_base_lock().adapter != before.adapter, "DVC sees it by the lock"
    assert read_base_lock().identity == before.identity
    assert sft.run(params, reporter)["method"] == "adapter"


def run_through(params: Params, reporter: Any) -> None:
    write_raw()
    metrics = run_stages(params, reporter, *CONVERTED, "sft", "precompute_ref", "train")
    assert metrics["step0_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["step0_max_abs_margin"] <= 1e-4
    assert metrics["eval_loss"] < metrics["eval_loss_start"]


def assert_the_card_loads_it(params: Params, folder: Path) -> None:
    """The code on the model card gives our log-probabilities of the held-out answers."""
    from dpo_cli.models.project import open_project

    card = Path("models/dpo/README.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"BASE_DIRECTORY": str(folder), "THIS_DIRECTORY": "models/dpo"}
    exec(card.split("```python\n")[1].split("```")[0], names)
    project = open_project(params, SilentReporter(), "test")
    ours = project.pair().use_policy()
    for group in project.tokenize_pairs("eval").groups[:4]:
        for answer in group.completions:
            assert logp(names["model"], group.prompt, answer) == pytest.approx(
                logp(ours, group.prompt, answer), abs=1e-3
            )


def logp(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    import torch

    tokens = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logps = model(tokens).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) - 1 + place, token].item() for place, token in enumerate(answer))
