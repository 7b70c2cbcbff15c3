"""What every section of params.yaml is made of, and which of its settings were moved from their defaults."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of all sections: unknown keys refused, no silent conversion of types, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def param(default: Any, doc: str, *, unit: str = "", **constraints: Any) -> Any:
    """A field of the schema: its default, what it means, and its unit."""
    return Field(default, description=doc, json_schema_extra={"unit": unit} if unit else None, **constraints)


def differs(section: BaseModel, *names: str) -> list[str]:
    """Those of the named fields, or of all, that were moved from their defaults."""
    fields = type(section).model_fields
    return [
        name
        for name in names or fields
        if getattr(section, name) != fields[name].get_default(call_default_factory=True)
    ]
