"""params.yaml as text: every setting with its meaning, unit and range beside it."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from typing import Any, get_args

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dpo_cli.core.load_params import bound_text
from dpo_cli.core.params import Params
from dpo_cli.core.training_params import LoraParams

EMBEDDED_PRESET: dict[str, Any] = {
    "data.eval_fraction": 0.15,
    "model.pretrain_steps": 1800,
    "sft.learning_rate": 2e-3,
    "sft.batch_size": 32,
    "sft.epochs": 3.0,
    "train.learning_rate": 7.5e-4,
    "train.batch_size": 8,
    "train.beta": 2.0,
    "reward.learning_rate": 2e-3,
    "reward.batch_size": 8,
    "reward.epochs": 2.0,
    "ppo.learning_rate": 5e-4,
    "ppo.kl_coefficient": 0.1,
    "ppo.max_new_tokens": 48,
    "evaluate.judge": "world",
    "evaluate.opponents": ["sft", "chosen"],
    "evaluate.judge_pairs": -1,
    "evaluate.num_prompts": 0,
    "evaluate.temperature": 0.7,
    "evaluate.temperatures": [0.0, 0.25, 0.5, 0.75, 1.0],
    "evaluate.scales": [0.25, 0.5, 0.75, 1.5],
    "evaluate.max_new_tokens": 48,
    "runtime.threads": 1,  # the same bytes on machines with other numbers of cores
}
"""What the embedded default sets otherwise than the schema, whose defaults suit a real model."""

_WIDTH = 110
_PLAIN = re.compile(r"[A-Za-z_][\w./-]*")
_RESERVED = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
_HEADER = """\
# What this project does, in one place. Sections are read by the stages named beside them; after a change,
# `dpo-cli repro` runs those stages again and no others. Unknown keys and values without effect are errors.
# docs/params.md lists the same settings as a table.
"""


def params_yaml(values: Mapping[str, Any]) -> str:
    """A whole params.yaml.

    Args:
        values: Settings that differ from their defaults, by dotted path.
    """
    left = dict(values)
    lines = [_HEADER.rstrip()]
    for name, field in Params.model_fields.items():
        section = _section_of(field)
        lines += ["", *_comment(section.__doc__ or "", ""), f"{name}:"]
        lines += _section_lines(section, f"{name}.", "  ", left)
    if left:
        raise ValueError(f"not settings: {', '.join(left)}")
    return "\n".join(lines) + "\n"


def _section_of(field: FieldInfo) -> type[BaseModel]:
    section = field.annotation
    assert isinstance(section, type)
    assert issubclass(section, BaseModel)
    return section


def _section_lines(section: type[BaseModel], prefix: str, indent: str, values: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, field in section.model_fields.items():
        path = prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            lines += [*_comment(field.description or "", indent), f"{indent}{name}:"]
            lines += _section_lines(field.annotation, f"{path}.", indent + "  ", values)
            continue
        value = values.pop(path, field.get_default(call_default_factory=True))
        lines += _comment(describe(field), indent)
        lines.append(f"{indent}{name}: {_scalar(value)}")
    return lines


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def describe(field: FieldInfo) -> str:
    """Meaning, unit and range of a setting, as one text."""
    facts = [fact for fact in (unit_of(field), range_of(field)) if fact]
    return f"{field.description} ({'; '.join(facts)})" if facts else field.description or ""


def unit_of(field: FieldInfo) -> str:
    """The setting's unit, or nothing."""
    extra = field.json_schema_extra
    return str(extra.get("unit", "")) if isinstance(extra, dict) else ""


def range_of(field: FieldInfo) -> str:
    """The values a setting may have, or nothing where any of its type will do."""
    choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
    if choices:
        return " | ".join(choices)
    if field.annotation == (LoraParams | None):
        return "null or the settings of sft.lora"
    bounds = []
    for constraint in field.metadata:
        for kind, sign, attribute in (
            (annotated_types.Gt, ">", "gt"),
            (annotated_types.Ge, ">=", "ge"),
            (annotated_types.Lt, "<", "lt"),
            (annotated_types.Le, "<=", "le"),
        ):
            if isinstance(constraint, kind):
                bounds.append(f"{sign} {bound_text(getattr(constraint, attribute))}")
    return ", ".join(bounds)


def _scalar(value: Any) -> str:
    """A value as YAML, floats so that YAML 1.1 readers (DVC among them) take them for numbers."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_scalar(key)}: {_scalar(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and value.lower() not in _RESERVED
        return value if plain else json.dumps(value, ensure_ascii=False)
    return str(value)


def _float(value: float) -> str:
    mantissa, letter, exponent = repr(value).partition("e")
    return f"{mantissa}.0e{exponent}" if letter and "." not in mantissa else repr(value)
