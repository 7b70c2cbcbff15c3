"""GGUF files that are read (`model import`) and written (`export`) against llama.cpp, which reads them by itself."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_cli.exporting.llama_cpp import serve
from tests import gguf_files
from tests.gguf_files import llama3_divisors, settings_of, tensors_of

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

_GEMMA = {"attention__key_length": 32, "attention__value_length": 32, "attention__sliding_window": 16}
_PHI = {"attention__head_count_kv": 4}
_LONG = {f"rope_factors_{part}.weight": 1 + np.arange(8) * step for part, step in (("long", 0.5), ("short", 0.1))}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], float]] = {
    "llama": ("llama", tensors_of(head=True), settings_of(rope__dimension_count=16), 3e-4),
    "llama 3's rotary embedding": (
        "llama",
        tensors_of() | {"rope_freqs.weight": llama3_divisors(16, 5e5, 8.0)},
        settings_of(rope__dimension_count=16, rope__freq_base=5e5),
        3e-4,
    ),
    "linear": (
        "llama",
        tensors_of(),
        settings_of(rope__dimension_count=16, rope__scaling__type="linear", rope__scaling__factor=4.0),
        3e-4,
    ),
    "yarn": (
        "llama",
        tensors_of(),
        settings_of(
            rope__dimension_count=16,
            rope__scaling__type="yarn",
            rope__scaling__factor=4.0,
            rope__scaling__original_context_length=64,
        ),
        3e-4,
    ),
    "qwen3": (
        "qwen3",
        tensors_of(head_dim=32, head_norms=True, head=True),
        settings_of(attention__key_length=32, attention__value_length=32),
        3e-4,
    ),
    "gemma2 with soft caps of its own": (
        "gemma2",
        tensors_of(head_dim=32, post_norms=True),
        settings_of(**_GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
        1e-2,  # llama.cpp looks its GELU up in a table of float16
    ),
    "gemma3, half of it scaled": (
        "gemma3",
        tensors_of(layers=7, head_dim=32, head_norms=True, post_norms=True),
        settings_of(
            **_GEMMA, block_count=7, rope__freq_base=1e6, rope__scaling__type="linear", rope__scaling__factor=8.0
        ),
        1e-2,
    ),
    "phi3, three quarters turned": (
        "phi3",
        tensors_of(kv_heads=4, packed=True, head=True),
        settings_of(**_PHI, rope__dimension_count=12),
        3e-4,
    ),
    "phi3 with long factors": (
        "phi3",
        tensors_of(kv_heads=4, packed=True, head=True) | _LONG,
        settings_of(
            **_PHI,
            context_length=1024,
            rope__dimension_count=16,
            rope__scaling__original_context_length=256,
            rope__scaling__attn_factor=1.19,
        ),
        3e-4,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_log_probabilities_are_llama_cpps(name: str, tmp_path: Path, reporter: Any, cpu: Any) -> None:
    import torch

    from dpo_cli.models.importing import GgufOptions, import_model
    from dpo_cli.models.load import load_model

    architecture, tensors, settings, tolerance = CASES[name]
    file = gguf_files.write(tmp_path / "model.gguf", tensors, settings, architecture=architecture)
    import_model([file], tmp_path / "model", GgufOptions(), reporter)
    model = load_model(tmp_path / "model", cpu, quantization="none")
    rng = random.Random(name)
    ids = [1, *(rng.randrange(gguf_files.FIRST_WORD, gguf_files.NUM_TOKENS - 2) for _ in range(47))]
    with torch.inference_mode():
        logps_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    with serve(file) as post:
        for length in (5, 24, 48):
            theirs = gguf_files.next_log_probs(post, ids[:length], 50)
            ours = [float(logps_TV[length - 1, token]) for token in theirs]
            assert ours == pytest.approx(list(theirs.values()), abs=tolerance)


_CHARACTERS = "the quick   fox 12,.\u00e9\u5317\U0001f44d\n"


@pytest.mark.parametrize("says", [{}, {"add_space_prefix": False}, {"add_bos_token": False}], ids=str)
def test_token_ids_are_llama_cpps(says: dict[str, bool], tmp_path: Path, reporter: Any) -> None:
    """A sentencepiece vocabulary, with and without a blank before the first word and a token before the text."""
    from transformers import AutoTokenizer

    from dpo_cli.models.importing import GgufOptions, import_model

    settings = settings_of(rope__dimension_count=16)
    file = gguf_files.write(tmp_path / "model.gguf", tensors_of(), settings, tokenizer=gguf_files.vocabulary() | says)
    import_model([file], tmp_path / "model", GgufOptions(), reporter)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rng = random.Random(0)
    texts = ["the quick fox", "  the  fox", "fox<|end|>the dog", " the<think> dog the<eos>the", "<bos> a", ""]
    texts += ["".join(rng.choice(_CHARACTERS) for _ in range(rng.randint(1, 30))) for _ in range(100)]
    with serve(file) as post:
        for text in texts:
            theirs = post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
            assert tokenizer(text)["input_ids"] == theirs, text


WRITTEN: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32, "tie_word_embeddings": False},
    "llama with Llama 3's rotary embedding": {
        "max_position_embeddings": 32768,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama, linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_that_is_written_is_the_same_model_in_llama_cpp(
    name: str, tmp_path: Path, reporter: Any, tokenizer: Any
) -> None:
    """Every family that is written, with weights and norms at random, in float16: which leaves 0.01 nats at most."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from dpo_cli.data.chat import ChatEncoder
    from dpo_cli.exporting.gguf_model import write_model
    from dpo_cli.exporting.gguf_tokenizer import vocabulary_of

    config = AutoConfig.for_model(
        name.replace(",", " ").split()[0],
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"max_position_embeddings": 256, "tie_word_embeddings": True} | WRITTEN[name],
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.1 + (1.0 if weight.ndim == 1 else 0.0))
            weight.copy_(weight.half() if weight.ndim == 2 else weight)
    encoder = ChatEncoder(tokenizer)
    vocabulary = vocabulary_of(tokenizer, encoder, len(tokenizer), ["Add 1 to 2."])
    path = tmp_path / "model.gguf"
    write_model(model, vocabulary, path, "f16", name="tiny", reporter=reporter)
    rng = random.Random(name)
    ids = [rng.randrange(5, len(tokenizer)) for _ in range(40)]
    with torch.inference_mode():
        logps_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    ours = [float(logps_TV[place - 1, ids[place]]) for place in range(10, 40)]
    with serve(path) as server:
        theirs = server.token_logps(ids[:10], ids[10:])
    assert ours == pytest.approx([each for each in theirs if each is not None], abs=0.01)
    assert None not in theirs
