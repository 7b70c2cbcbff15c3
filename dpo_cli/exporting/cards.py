"""The model card of an export, with what was found, and which of several exports to take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_cli.core.text import in_one_line
from dpo_cli.exporting.held_out import Survival, in_percent

if TYPE_CHECKING:
    from dpo_cli.exporting.export import Exported

_GOOD = 0.95
"""Share of the margin and of the ranking that a form keeps which is as good as the trained model."""
_LOADING = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(THIS_DIRECTORY, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(THIS_DIRECTORY)"""
_UNMEASURED = "How far it moves here was not measured; "


def card_of(exported: Exported, base_name: str, built: Path) -> str:
    """The text of a card: the adapter's own with a section more, or a new one."""
    survival = exported.found.survival
    assert survival is not None
    rows = "".join(f"| {name} | {value} |\n" for name, value in survival.rows())
    notes = "".join(f"* {note}\n" for note in exported.found.notes)
    checked = f"""## What was checked

{exported.name} keeps {in_percent(survival.margin_kept)} of the margin. It was loaded again and held against the trained
model on held-out pairs (`dpo-cli export`):

| | |
|---|---|
{rows}
{notes}"""
    own = built / "README.md"
    if own.is_file():
        return f"{own.read_text(encoding='utf-8').replace(_UNMEASURED, '')}\n{checked}"
    kind = "gguf" if exported.name.startswith("gguf") else "merged"
    return f"""---
base_model: {json.dumps(in_one_line(base_name), ensure_ascii=False)}
tags: [dpo, {kind}]
---

# {in_one_line(base_name)}, tuned with DPO

It is {exported.what}.

{_usage(exported.name, built)}
{checked}"""


def _usage(name: str, built: Path) -> str:
    if name == "gguf-lora":
        return "```sh\nllama-server -m BASE.gguf --lora adapter.gguf\n```\n"
    if name.startswith("gguf"):
        (file,) = [path.name for path in built.glob("*.gguf")]
        ollama = "ollama create NAME -f Modelfile\n" if (built / "Modelfile").is_file() else ""
        return f"```sh\nllama-server -m {file}\n{ollama}```\n"
    return f"```python\n{_LOADING}\n```\n"


def recommend(exported: Sequence[Exported]) -> str | None:
    """One sentence: the smallest whole model that is as good as the trained one, or else the nearest to it."""
    done = [(each, each.found.survival) for each in exported if each.folder is not None and each.found.survival]
    whole = [pair for pair in done if pair[0].name not in ("adapter", "gguf-lora")]
    if not whole:
        return None
    good = [(each, survival) for each, survival in whole if _is_good(survival)]
    best, survival = (
        min(good, key=lambda pair: pair[0].size) if good else min(whole, key=lambda pair: pair[1].mean_nats)
    )
    why = f"the smallest that keeps {_GOOD:.0%} of margin and ranking" if good else "the nearest to what was trained"
    return (
        f"Take {best.name}{f', {why}' if len(whole) > 1 else ''}: {in_percent(survival.margin_kept)} of the margin,"
        f" {survival.mean_nats:.3f} nats a token, {best.size / 2**20:.0f} MiB."
    )


def _is_good(survival: Survival) -> bool:
    return survival.same_order.value >= _GOOD and _GOOD <= survival.margin_kept.value <= 1 / _GOOD
