"""The model card of an adapter: what it is, how it was made, and how to load the very model that was trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_cli.core import paths
from dpo_cli.core.artifacts import publish_folder, write_text
from dpo_cli.core.manifest import Artifact, Manifest, all_files
from dpo_cli.core.text import in_one_line
from dpo_cli.models.adapters import save_adapter
from dpo_cli.models.device import Machine
from dpo_cli.models.load import load_config, own_attention, save_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel

    from dpo_cli.models.project import Project


@dataclass(frozen=True)
class Card:
    """What a stage says of the adapter that it trained.

    Attributes:
        tags: Of the card's head.
        text: Title and first lines.
        rows: How it was made, one fact and its value a row.
        kind: What transformers loads: CausalLM or SequenceClassification.
        more: What follows the code.
    """

    tags: Sequence[str]
    text: str
    rows: Sequence[tuple[str, str]]
    kind: str = "CausalLM"
    more: str = ""


def publish_adapter(
    artifact: Artifact, manifest: Manifest, card: Card, project: Project, model: PeftModel, built: Path
) -> None:
    """Write an adapter with its tokenizer, card and manifest, and move the folder onto its place.

    Args:
        artifact: What it becomes.
        manifest: What it was made of.
        card: What is said of it.
        project: Has what it belongs to.
        model: Holds the adapter.
        built: An empty folder.
    """
    base_name = manifest.settings["model"]["name"]
    save_adapter(model, built, base_name)
    save_tokenizer(project.tokenizer, project.encoder, built, project.base)
    write_text(built / "README.md", _card_text(card, project, base_name, artifact.name))
    artifact.write(built, manifest, all_files(built))
    publish_folder(built, artifact.folder)


def _card_text(card: Card, project: Project, base_name: str, manifest_name: str) -> str:
    name = json.dumps(in_one_line(base_name), ensure_ascii=False)  # JSON is YAML, whatever the name holds
    if project.sft.method == "full":
        frozen, directory = paths.SFT_MODEL, "SFT_DIRECTORY"
        belongs = "the whole model that stage sft made of it (models/sft of the same run)"
    else:
        frozen, directory = project.base, "BASE_DIRECTORY"
        belongs = f"the very base model whose digests `{manifest_name}` lists"
    rows = "".join(f"| {fact} | {value} |\n" for fact, value in card.rows)
    code = usage(frozen, project.machine, project.quantization, directory=directory, kind=card.kind)
    return f"""---
library_name: peft
base_model: {name}
tags: [{", ".join(card.tags)}]
---

{card.text}

| | |
|---|---|
{rows}
It belongs to {belongs}. To use it as it was trained:

{code}{card.more}"""


def usage(base: Path, machine: Machine, quantization: str, *, directory: str, kind: str = "CausalLM") -> str:
    """Code that puts the adapter on the frozen weights as they were held while it was trained; what else costs.

    Args:
        base: Directory of the frozen weights, for what their configuration asks for.
        machine: Where it was trained.
        quantization: ``nf4`` or ``none``.
        directory: What stands in the code for that directory.
        kind: What transformers loads: CausalLM or SequenceClassification.
    """
    is_4bit, dtype = quantization == "nf4", f"torch.{machine.dtype_name}"
    arguments = [directory, f"dtype={dtype}"]
    if kind == "SequenceClassification":
        arguments.append("num_labels=1")
    if attention := own_attention(load_config(base)):
        arguments.append(f'attn_implementation="{attention}"')
    if is_4bit:
        held = ["load_in_4bit=True", 'bnb_4bit_quant_type="nf4"', "bnb_4bit_use_double_quant=True"]
        held.append(f"bnb_4bit_compute_dtype={dtype}")
        if kind == "SequenceClassification":
            held.append('llm_int8_skip_modules=["score"]')
        inner = "".join(f"        {line},\n" for line in held)
        arguments.append(f"quantization_config=BitsAndBytesConfig(\n{inner}    )")
    names = ", ".join(sorted([f"AutoModelFor{kind}", "AutoTokenizer", *(["BitsAndBytesConfig"] if is_4bit else [])]))
    code = "\n".join(
        [
            "import torch",
            "from peft import PeftModel",
            f"from transformers import {names}",
            "",
            f"base = AutoModelFor{kind}.from_pretrained(",
            *(f"    {argument}," for argument in arguments),
            ")",
            *(_EXACT_ON_CPU if is_4bit and machine.device.type == "cpu" else []),
            "model = PeftModel.from_pretrained(base, THIS_DIRECTORY).eval()",
            "tokenizer = AutoTokenizer.from_pretrained(THIS_DIRECTORY)",
        ]
    )
    further = [_NOT_BY_NAME, *([_MERGING] if is_4bit else [])] if kind == "CausalLM" else []
    return f"```python\n{code}\n```\n{''.join(further)}"


_NOT_BY_NAME = """
`AutoPeftModelForCausalLM.from_pretrained(THIS_DIRECTORY)` does not find the base: adapter_config.json holds its name
and no path, so that the adapter is the same on every machine, and peft would look for that name on a hub.
"""
_EXACT_ON_CPU = [
    "for layer in base.modules():  # or bitsandbytes rounds them once more, on CPUs with AVX512-BF16",
    '    if hasattr(layer, "support_avx512bf16_for_cpu"):',
    "        layer.support_avx512bf16_for_cpu = False",
]
_MERGING = """
The adapter was trained on weights rounded to 4-bit nf4 and belongs to those. On the plain weights, or merged into
them, it is another model, without the rounding that it learned with: the log-probability of a whole answer can move by
several nats, enough to turn a preference round. How far it moves here was not measured; `dpo-cli evaluate --model
MERGED_DIRECTORY` judges a merged model like any other. To merge without that difference, hold the rounded weights
plainly first; the result is the model that was trained, as large as the plain one:

```python
base = model.unload().dequantize()
merged = PeftModel.from_pretrained(base, THIS_DIRECTORY).merge_and_unload()
merged.save_pretrained(MERGED_DIRECTORY)
tokenizer.save_pretrained(MERGED_DIRECTORY)
```
"""
