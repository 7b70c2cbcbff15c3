"""Tiny random GGUF files, as llama.cpp names their parts, and what llama.cpp says of a next token."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, LAYERS, HEADS, WIDTH = 64, 2, 4, 96


def vocabulary() -> dict[str, Any]:
    """A sentencepiece vocabulary: five special tokens, the bytes, pieces of words, letters, and two added tokens."""
    words = "the quick brown fox jumps over the lazy dog and other things in this world then 1234 times more".split()
    pieces = {f"\u2581{word}"[begin:end] for word in words for begin in range(6) for end in range(begin + 2, begin + 7)}
    pieces = {piece for piece in pieces if len(piece) > 1} | {"\u2581\u2581", "\u2581\u2581\u2581\u2581"}
    order = sorted(pieces)
    random.Random(1).shuffle(order)
    letters = sorted("\u2581abcdefghijklmnopqrstuvwxyz0123456789,.")
    special = ["<unk>", "<bos>", "<eos>", "<pad>", "<mask>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*special, *bytes_, *order, *letters, "<|end|>", "<think>"]
    scores = [0.0] * 261 + [-float(n) for n in range(len(order))] + [-1e4 - n for n in range(len(letters))] + [0.0] * 2
    types = [2, 3, 3, 3, 3] + [6] * 256 + [1] * (len(order) + len(letters)) + [3, 4]
    return {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "token_type": types,
            "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}  # fmt: skip


NUM_TOKENS = len(vocabulary()["tokens"])
FIRST_WORD = 5 + 256


def tensors_of(
    *,
    seed: int = 0,
    layers: int = LAYERS,
    kv_heads: int = 2,
    head_dim: int = 16,
    head_norms: bool = False,
    biases: bool = False,
    post_norms: bool = False,
    head: bool = False,
    packed: bool = False,
) -> dict[str, np.ndarray]:
    """Random weights of a dense model, by llama.cpp's names."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, scale: float = 0.3) -> np.ndarray:
        return rng.normal(0, scale, (rows, columns))

    def norm(size: int) -> np.ndarray:
        return 1 + rng.normal(0, 0.2, size)

    queries, keys = HEADS * head_dim, kv_heads * head_dim
    found = {"token_embd.weight": matrix(NUM_TOKENS, HIDDEN, 1.0), "output_norm.weight": norm(HIDDEN)}
    if head:
        found["output.weight"] = matrix(NUM_TOKENS, HIDDEN)
    last = found["output.weight" if head else "token_embd.weight"]
    # never the most probable: of a token that ends the text, or is no whole letter, llama.cpp tells no probabilities
    last[:FIRST_WORD] = last[-2] = 0.0
    for layer in range(layers):
        of_layer = {"attn_norm.weight": norm(HIDDEN), "ffn_norm.weight": norm(HIDDEN)}
        if packed:
            of_layer["attn_qkv.weight"] = matrix(queries + 2 * keys, HIDDEN)
            of_layer["ffn_up.weight"] = matrix(2 * WIDTH, HIDDEN)
        else:
            for part, rows in (("q", queries), ("k", keys), ("v", keys)):
                of_layer[f"attn_{part}.weight"] = matrix(rows, HIDDEN)
                of_layer |= {f"attn_{part}.bias": rng.normal(0, 0.3, rows)} if biases else {}
            of_layer |= {"ffn_gate.weight": matrix(WIDTH, HIDDEN), "ffn_up.weight": matrix(WIDTH, HIDDEN)}
        of_layer |= {"attn_output.weight": matrix(HIDDEN, queries), "ffn_down.weight": matrix(HIDDEN, WIDTH)}
        if head_norms:
            of_layer |= {"attn_q_norm.weight": norm(head_dim), "attn_k_norm.weight": norm(head_dim)}
        if post_norms:
            of_layer |= {"post_attention_norm.weight": norm(HIDDEN), "post_ffw_norm.weight": norm(HIDDEN)}
        found |= {f"blk.{layer}.{name}": values for name, values in of_layer.items()}
    return found


def settings_of(**changes: Any) -> dict[str, Any]:
    """What a file says of such a model, without the architecture's name; a dot is written as two underscores."""
    return {
        "context_length": 256,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": WIDTH,
        "attention.head_count": HEADS,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 1e4,
        "vocab_size": NUM_TOKENS,
    } | {name.replace("__", "."): value for name, value in changes.items()}


def llama3_divisors(head_dim: int, base: float, factor: float) -> np.ndarray:
    """By what Llama 3 divides its frequencies: nothing below wavelengths of 2,048, the factor above 8,192."""
    divisors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * base ** (index / head_dim)
        share = min(1.0, max(0.0, (8192 / wavelength - 1) / 3))
        divisors.append(1 / ((1 - share) / factor + share))
    return np.array(divisors)


def write(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
    *,
    architecture: str = "llama",
    tokenizer: Mapping[str, Any] | None = None,
    general: Mapping[str, str] | None = None,
    split: tuple[int, int, int] | None = None,
) -> Path:
    """Write a file of format version 3; one of several has a number, their count, and that of all tensors."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    entries = {f"{architecture}.{key}": value for key, value in settings.items()}
    entries |= {f"general.{key}": value for key, value in (general or {}).items()}
    entries |= {
        f"tokenizer.ggml.{key}": value for key, value in (vocabulary() if tokenizer is None else tokenizer).items()
    }
    if template := entries.pop("tokenizer.ggml.chat_template", None):
        entries["tokenizer.chat_template"] = template
    if split is not None:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
        writer.add_int32("split.tensors.count", split[2])
    for key, value in entries.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case str():
                writer.add_string(key, value)
            case float():
                writer.add_float32(key, value)
            case int():
                writer.add_uint32(key, value)
            case _:
                writer.add_array(key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def next_log_probs(post: Callable[[str, dict[str, Any]], Any], prompt: Sequence[int], number: int) -> dict[int, float]:
    """llama.cpp's log-probabilities of the token after a prompt, nats: of the most probable ones, by token id."""
    body = {"prompt": list(prompt), "n_predict": 1, "n_probs": number, "temperature": 0, "cache_prompt": False}
    top = post("/completion", body)["completion_probabilities"][0]["top_logprobs"]
    return {int(each["id"]): float(each["logprob"]) for each in top}
