"""What every section of params.yaml is made of, and section data: sources, and what is done with rows of theirs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

AS_PREFERENCES = "preferences"
"""The value of data.sft.path that stands for the preference data."""


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


Column = str | list[str]

Labels = Literal["first", "second", "tie"]
Roles = Literal["system", "user", "assistant", "tool"]


def _label_keys(labels: Any) -> Any:
    """Labels as YAML reads them, 1 or true, as the texts that they are in the data."""
    if not isinstance(labels, dict):
        return labels
    return {
        str(key).lower() if isinstance(key, bool) else f"{key:.15g}" if isinstance(key, int | float) else key: side
        for key, side in labels.items()
    }


class Source(Section):
    """A source of data: a file, or several of one kind."""

    path: str = Field(
        min_length=1,
        description="File under data/raw, where DVC sees a change; * and ? stand for several files, a folder for its"
        " *.jsonl.",
    )
    format: Any = param("auto", "Format of its rows; auto detects it and says what it found.")
    columns: dict[str, Column] = param(
        {}, "Columns whose names differ from the format's: {prompt: question}; a.b is b inside a; a list makes a list."
    )
    records: str = param("", "Where the list of rows is, if not at the top level: a key, or keys joined by dots.")
    roles: dict[str, Roles] = param({}, "Further names of roles: {narrator: system}.")
    labels: Annotated[dict[str, Labels], BeforeValidator(_label_keys)] = param(
        {},
        'Which of two outputs a label means: {"1": first, "0": second}; "<1.5" matches all numbers below.',
    )
    unwrap: bool = param(
        False,
        "Texts that are whole conversations as a chat template renders them (ChatML, Llama, Gemma, [INST],"
        " ### Instruction and the like) become messages.",
    )
    weight: float = param(
        1.0,
        "How often each row is seen per epoch: 0.5 takes half of the prompts (chosen by a hash), 2 takes every row"
        " twice. The eval split is not weighted.",
        gt=0,
        le=100,
    )
    max_rows: int | None = param(None, "Read at most this many rows.", unit="rows", ge=1, le=10**12)
    split: Literal["auto", "train", "eval"] = param(
        "auto", "auto: data.eval_fraction of its prompts are held out; else all of it goes to one split."
    )


SftFormat = Literal[
    "auto", "alpaca", "prompt_completion", "messages", "oasst",
    "sharegpt", "pairs", "hh", "implicit", "two_outputs", "kwise", "unpaired", "votes",
]  # fmt: skip
PreferenceFormat = Literal[
    "auto", "sharegpt", "pairs", "hh", "implicit", "two_outputs", "kwise", "oasst", "unpaired", "votes",
]  # fmt: skip


class SftSource(Source):
    """A source of instruction data."""

    format: SftFormat = param("auto", "Format of its rows; auto detects it and says what it found.")
    turns: Literal["last", "all"] = param(
        "last", "Of a conversation (format messages): its last answer is the example, or every answer is one."
    )


class PreferenceSource(Source):
    """A source of preference data."""

    format: PreferenceFormat = param("auto", "Format of its rows; auto detects it and says what it found.")
    pairs: Literal["all", "adjacent", "best_vs_worst"] = param(
        "all",
        "Pairs made of K ranked answers: all that are not tied, those of neighboring ranks, or the best with the"
        " worst.",
    )
    compare: Literal["last", "first"] = param(
        "last",
        "Of chosen and rejected with several turns each: last takes those that differ in the last answer alone; first"
        " compares the first answers in which they differ, and leaves out what follows.",
    )


class SftData(SftSource):
    """Where the instruction data is."""

    path: str = param(
        "data/raw/instructions.json",
        "File of instruction data under data/raw, where DVC sees a change; * and ? stand for several files, a folder"
        " for its *.jsonl."
        " preferences: the preference data, read as data.preferences says, so that its preferred answers are learned.",
        min_length=1,
    )
    also: list[SftSource] = param([], "Further sources: a list of mappings with the settings above.")


class PreferenceData(PreferenceSource):
    """Where the preference data is."""

    path: str = param(
        "data/raw/preferences.json",
        "File of preference data under data/raw; * and ? stand for several files, a folder for its *.jsonl.",
        min_length=1,
    )
    also: list[PreferenceSource] = param([], "Further sources: a list of mappings with the settings above.")


Policy = Literal["drop", "keep", "error"]
StrictPolicy = Literal["drop", "error"]


class DataChecks(Section):
    """What to do with rows that a check finds: drop lists them and leaves them out, keep counts them, error stops."""

    malformed: StrictPolicy = param("drop", "The row does not fit its format: a field missing, not text, no such role.")
    empty_prompt: StrictPolicy = param("drop", "Nothing is asked.")
    empty_completion: Policy = param("drop", "The answer to an instruction is empty.")
    empty_chosen: Policy = param("drop", "The preferred answer is empty.")
    empty_rejected: Policy = param("drop", "The other answer is empty.")
    equal_sides: Policy = param("drop", "Both answers are the same, up to white space around them.")
    tie: StrictPolicy = param("drop", "Neither answer won: no pair can be made.")
    duplicate: Policy = param("drop", "The same prompt and answers came before; the first one stays.")
    contradiction: Policy = param("drop", "The same two answers are there in both orders; drop leaves out both.")
    shared_prompt: Policy = param(
        "drop",
        "The opening of a train row's prompt is in eval, too; only sources with a split of their own have it.",
    )
    score_conflict: Policy = param(
        "keep", "The preferred answer's score is lower than the other's, or the same; keep: the choice counts."
    )
    repeated_prompt: Policy = param("keep", "An earlier row has the same prompt with other answers.")
    prefix_sides: Policy = param("keep", "One answer is the beginning of the other.")
    longer_chosen: Policy = param(
        "keep", "The preferred answer is the longer one: a share far from one half is a length bias."
    )
    chat_markers: Policy = param("keep", "A text holds marks of chat templates, such as <|im_end|> or Human:.")
    placeholders: Policy = param("keep", "A text holds {{placeholders}}; they are kept as they stand.")
    replacement_characters: Policy = param(
        "keep", "A text contains U+FFFD: it was once decoded with the wrong encoding."
    )
    turn_order: Policy = param(
        "keep", "The prompt has two turns of one role in a row, or a system turn after the first."
    )
    no_input: Policy = param("keep", "The prompt ends with <noinput> or Noinput, which stands for an empty input.")


class DataParams(Section):
    """What goes in. Read by convert_sft and convert_preferences."""

    sft: SftData = Field(default_factory=SftData, description="Instruction data.")
    preferences: PreferenceData = Field(default_factory=PreferenceData, description="Preference data.")
    eval_fraction: float = param(
        0.1,
        "Share of prompts held out. A hash of the prompt's opening decides, for both files alike: adding rows moves"
        " none.",
        gt=0,
        lt=1,
    )
    split_by: Literal["opening", "prompt"] = param(
        "opening",
        "What is hashed: opening, all up to the first user turn, so that no conversation is on both sides; or the whole"
        " prompt, for conversations that all begin alike.",
    )
    checks: DataChecks = Field(default_factory=DataChecks, description="What is done with rows that a check finds.")

    @property
    def sft_sources(self) -> list[SftSource]:
        """All sources of instructions; where they are the preferences, with the settings of those."""
        if self.sft.path != AS_PREFERENCES:
            return [self.sft, *self.sft.also]
        shared = [source.model_dump(include=set(Source.model_fields)) for source in self.preference_sources]
        return [*map(SftSource.model_validate, shared), *self.sft.also]

    @property
    def preference_sources(self) -> list[PreferenceSource]:
        """All sources of preferences."""
        return [self.preferences, *self.preferences.also]
