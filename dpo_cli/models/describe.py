"""What a model directory holds, said in one table: checked file by file, loaded, and asked a question."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_cli.core.artifacts import sha256_file
from dpo_cli.core.environment import is_gpu
from dpo_cli.core.errors import MachineError
from dpo_cli.core.params import RuntimeParams
from dpo_cli.core.progress import Reporter
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.schema import user
from dpo_cli.models.device import Machine, prepare_machine
from dpo_cli.models.folder import read_object, read_tensors, total_size, weight_files
from dpo_cli.models.identity import model_files
from dpo_cli.models.load import in_words, load_config, load_model
from dpo_cli.models.verify import verify_numbers, verify_tokenizer, verify_vocabulary, verify_weights

QUESTION, OPENING = "What is the capital of France?", "The capital of France is"
"""What a model with a chat template is asked, and what one without is to go on from."""
_ANSWER_TOKENS = 24
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LICENSE_NAMES = re.compile(r"(licen[sc]e|notice|copying|use_policy|.*terms)[^/]*", re.IGNORECASE)


@dataclass(frozen=True)
class ModelDescription:
    """A model directory, looked at: a table for a reader, figures for a program, what is odd but no error as notes."""

    table: list[tuple[str, str]]
    figures: dict[str, Any]
    notes: tuple[str, ...]


def license_files(folder: Path) -> list[Path]:
    """The files of a directory that say on which terms it may be used, and its model card."""
    files = (path for path in folder.iterdir() if path.is_file())
    return sorted(path for path in files if _LICENSE_NAMES.fullmatch(path.name) or path.name == "README.md")


def describe_model(folder: Path, reporter: Reporter, label: str) -> ModelDescription:
    """Check a model directory, load it, and let it answer greedily; nothing is written.

    Raises:
        MachineError: It is no causal language model that can be used, damaged, or gives no finite numbers.
    """
    weights = verify_weights(folder)
    facts = weights.facts
    tokenizer = verify_tokenizer(folder)
    files = weight_files(folder)
    with reporter.meter(f"{label}: looking for NaN and infinity", total_size(files), "bytes") as meter:
        verify_numbers(files, meter.advance)
    names = [folder / name for name in model_files(folder)] + license_files(folder)
    with reporter.meter(f"{label}: digests", total_size(names), "bytes") as meter:
        digests = {
            path.name: {"size": path.stat().st_size, "sha256": sha256_file(path, meter.advance)} for path in names
        }
    notes: list[str] = []
    encoder = None
    if tokenizer.chat_template:
        try:
            encoder = ChatEncoder(tokenizer)
            notes += verify_vocabulary(folder, tokenizer, encoder, facts.num_rows)
        except MachineError as error:
            if len(tokenizer) > facts.num_rows:
                raise
            notes += error.problems
    elif len(tokenizer) > facts.num_rows:
        raise MachineError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, and the model's embedding {facts.num_rows} rows;"
            " fetch tokenizer and weights of one model"
        )
    if unused := list(weights.unused):
        notes.append(f"the weights hold {len(unused)} tensors that are no part of the model: {unused[0]}")
    tensors = read_tensors(files)
    kinds = Counter(_DTYPES.get(tensor.dtype, tensor.dtype) for tensor in tensors.values())
    model = load_model(folder, _machine(kinds.most_common(1)[0][0]), quantization="none")
    prompt, answer = _ask(folder, model, tokenizer, encoder)
    figures = {
        "architecture": type(model).__name__,
        "model_type": weights.model_type,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtypes": sorted(kinds),
        "size_bytes": sum(each["size"] for each in digests.values()),
        "context_length": facts.context_length,
        "num_tokens": len(tokenizer),
        "num_embedding_rows": facts.num_rows,
        "special_tokens": _special_tokens(tokenizer),
        "end_tokens": _end_tokens(folder, tokenizer, encoder),
        "chat_template": bool(tokenizer.chat_template),
        "license": _license(folder),
        "license_files": [path.name for path in license_files(folder) if path.name != "README.md"],
        "finite": True,
        "prompt": prompt,
        "greedy_answer": answer,
        "files": digests,
    }
    return ModelDescription(_table(figures, load_config(folder), encoder), figures, tuple(notes))


def _machine(dtype: str) -> Machine:
    """The GPU as it is used in training, or the CPU in the dtype of the weights, which is what they fit into."""
    machine = prepare_machine(RuntimeParams(), embedded=False)
    return machine if is_gpu(machine.device) else Machine(machine.device, getattr(torch, dtype, torch.float32))


# --- an answer ----------------------------------------------------------------------------


def _ask(folder: Path, model: Any, tokenizer: Any, encoder: ChatEncoder | None) -> tuple[str, str]:
    """A prompt and what the model says to it, the most probable token each time."""
    if encoder is not None:
        prompt, ids = QUESTION, encoder.encode_prompt([user(QUESTION)])
    else:
        prompt, ids = OPENING, list(tokenizer(OPENING)["input_ids"])
    stops = {token["id"] for token in _end_tokens(folder, tokenizer, encoder)}
    answer: list[int] = []
    cache = None
    given = torch.tensor([ids], device=model.device)
    with torch.inference_mode(), in_words(f"{folder}: the model cannot be run"):
        while len(answer) < _ANSWER_TOKENS:
            outputs = model(given, past_key_values=cache, use_cache=True)
            logits_V, cache = outputs.logits[0, -1].float(), outputs.past_key_values
            if not torch.isfinite(logits_V).all():
                raise MachineError(f"{folder}: the model gives NaN or infinity; fetch it again")
            token = int(logits_V.argmax())
            if token in stops:
                break
            answer.append(token)
            given = torch.tensor([[token]], device=model.device)
    return prompt, tokenizer.decode(answer, skip_special_tokens=True).strip()


def _special_tokens(tokenizer: Any) -> dict[str, dict[str, Any]]:
    found = {}
    for kind in ("bos", "eos", "pad", "unk"):
        number = getattr(tokenizer, f"{kind}_token_id", None)
        if number is not None:
            found[kind] = {"text": getattr(tokenizer, f"{kind}_token"), "id": int(number)}
    return found


def _end_tokens(folder: Path, tokenizer: Any, encoder: ChatEncoder | None) -> list[dict[str, Any]]:
    """Where generation stops: at the tokens of generation_config.json, the template's and the tokenizer's."""
    path = folder / "generation_config.json"
    said = read_object(path).get("eos_token_id") if path.is_file() else None
    ids = {number for number in (said if isinstance(said, list) else [said]) if isinstance(number, int)}
    ids |= set(encoder.stop_ids) if encoder is not None else {tokenizer.eos_token_id} - {None}
    return [{"text": tokenizer.convert_ids_to_tokens(number), "id": number} for number in sorted(ids)]


def _license(folder: Path) -> str | None:
    """What the model card's front matter, or else the license file's first line, calls the license."""
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        name = re.search(r"^license(?:_name)?:[ \t]*([^\s#]+)", front[1], re.MULTILINE) if front else None
        if name:
            return name[1].strip("\"'")
    for path in license_files(folder):
        if path != card and (lines := path.read_text(encoding="utf-8", errors="replace").split("\n", 40)):
            return next((line.strip()[:80] for line in lines if line.strip() and "<" not in line), None)
    return None


# --- the table ----------------------------------------------------------------------------


def _table(figures: dict[str, Any], config: Any, encoder: ChatEncoder | None) -> list[tuple[str, str]]:
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "num_hidden_layers", None)
    width = getattr(config, "hidden_size", None)
    special = ", ".join(f"{kind} {token['text']} ({token['id']})" for kind, token in figures["special_tokens"].items())
    if encoder is not None:
        template = "its own"
    elif figures["chat_template"]:
        template = "one that cannot be used; set model.chat_template"
    else:
        template = "none: set model.chat_template to plain, chatml or alpaca"
    names = ", ".join(figures["license_files"])
    rows = [
        ("model", f"{figures['architecture']}, {layers} layers, width {width}"),
        ("parameters", f"{figures['num_parameters']:,} in {', '.join(figures['dtypes'])}, all finite"),
        ("size", f"{figures['size_bytes'] / 2**30:.3f} GiB in {len(figures['files'])} files"),
        ("context", f"{figures['context_length'] or 'no limit said'} tokens{f', window {window}' if window else ''}"),
        ("vocabulary", f"{figures['num_tokens']} tokens, {figures['num_embedding_rows']} rows of the embedding"),
        ("special tokens", special or "none"),
        ("stops at", ", ".join(f"{token['text']} ({token['id']})" for token in figures["end_tokens"]) or "nothing"),
        ("chat template", template),
        ("license", f"{figures['license'] or 'not said'}{f' ({names})' if names else ''}"),
        ("asked", figures["prompt"]),
        ("answers", figures["greedy_answer"] or "nothing: it stops at once"),
    ]
    for name, entry in figures["files"].items():
        rows.append((name, f"{entry['size'] / 2**20:.2f} MiB, sha256 {entry['sha256'][:16]}..."))
    return rows
