"""What settings must not say together, and settings that were moved from their default for nothing."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_cli.core.data_params import AS_PREFERENCES, PreferenceSource, SftSource
from dpo_cli.core.evaluate_params import idle_evaluate_settings
from dpo_cli.core.params import EMBEDDED, WORLD_HELD_OUT, Params, TrainParams
from dpo_cli.core.sections import differs
from dpo_cli.core.text import shown
from dpo_cli.losses.catalogue import LOSSES, SETTINGS, readers


def _idle_columns(params: Params) -> list[str]:
    """Settings of sources that say what is known already."""
    found = []
    if params.data.sft.path == AS_PREFERENCES:
        found += [
            f"data.sft.{name} has no effect with data.sft.path {AS_PREFERENCES}; data.preferences says how it is read"
            for name in differs(params.data.sft, *(SftSource.model_fields.keys() - {"path"}))
        ]
    for section, first in (("data.sft", params.data.sft), ("data.preferences", params.data.preferences)):
        for index, source in enumerate([first, *first.also]):
            where = section if index == 0 else f"{section}.also.{index - 1}"
            found += [
                f"{where}.columns.{field} has no effect: it names itself"
                for field, key in source.columns.items()
                if field == key
            ]
            if isinstance(source, SftSource) and source.turns == "all" and source.format not in ("auto", "messages"):
                found.append(f"{where}.turns has no effect with format {source.format}; messages reads it")
            if source.weight != 1 and source.split == "eval":
                found.append(f"{where}.weight has no effect with split eval: only train rows are weighted")
            if source.labels and source.format not in ("auto", "two_outputs"):
                found.append(f"{where}.labels has no effect with format {source.format}; two_outputs reads it")
            if (
                isinstance(source, PreferenceSource)
                and source.compare == "first"
                and source.format in ("kwise", "oasst")
            ):
                found.append(f"{where}.compare has no effect with format {source.format}; it has single answers")
            if (
                isinstance(source, PreferenceSource)
                and source.pairs != "all"
                and source.format not in ("auto", "kwise", "oasst", "pairs", "sharegpt")
            ):
                found.append(
                    f"{where}.pairs has no effect with format {source.format}; kwise, oasst, pairs and sharegpt read it"
                )
    return found


def _idle_objective_settings(train: TrainParams) -> list[str]:
    """Settings of the objective that the chosen one does not read, or that it needs and does not get."""
    found = []
    if not train.losses:
        return ["train.loss must name at least one objective, got {}"]
    called = " and ".join(train.losses)
    for setting in differs(train, *SETTINGS):
        if not any(setting in LOSSES[name].reads for name in train.losses):
            named = readers(setting)
            verb = "reads" if len(named) == 1 else "read"
            found.append(f"train.{setting} has no effect with train.loss {called}; {_listed(named)} {verb} it")
    for name in train.losses:
        found += [
            f"train.loss {name} needs train.{setting} > 0{_AT_ZERO.get(name, '')}"
            for setting in LOSSES[name].needs
            if not differs(train, setting)
        ]
    if differs(train, "divergence_alpha") and train.divergence != "alpha":
        found.append(f"train.divergence_alpha has no effect with train.divergence {train.divergence}; alpha reads it")
    coupled = [name for name in train.losses if LOSSES[name].is_coupled]
    if coupled and len(train.losses) > 1:
        found.append(f"train.loss {coupled[0]} compares sorted pairs and cannot be mixed with others")
    if coupled and train.batch_size == 1:
        found.append(f"train.loss {coupled[0]} compares the pairs of a step: train.batch_size must be > 1, got 1")
    return found


def _idle_adapter_settings(params: Params) -> list[str]:
    """Settings of the adapters that change nothing, or that another setting cannot go with."""
    sft, reward = params.sft, params.reward
    policy, lora = ("sft.lora", sft.lora) if sft.method in ("lora", "qlora") else ("train.lora", params.train.lora)
    adapters = {policy: lora}
    if reward.loss != "none":
        adapters["reward.lora"] = reward.lora
    found = [
        f"{name}.rslora has no effect with {name}.r 1"
        for name, adapter in adapters.items()
        if adapter is not None and adapter.rslora and adapter.r == 1
    ]
    if lora is not None and lora.dora and params.evaluate.scales:
        found.append(
            f"evaluate.scales cannot go with {policy}.dora true: a multiple of what DoRA changed is no such adapter;"
            " set it to []"
        )
    return found


_AT_ZERO = {"cdpo": "; at 0 it is the sigmoid loss", "robust": "; at 0 it is the sigmoid loss"}


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


_TOLD_ANYWAY = (
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token",
    "pad_token", "unk_token",
)  # fmt: skip


def contradictions(params: Params) -> list[str]:
    """Settings that contradict each other, and settings that were moved from their default for nothing."""
    found: list[str] = []
    model, sft, train, reward = params.model, params.sft, params.train, params.reward
    if model.name == EMBEDDED:
        if params.runtime.model_path is not None:
            found.append("runtime.model_path has no effect with model.name embedded; give the model a name of its own")
        if model.chat_template != "auto":
            found.append("model.chat_template has no effect with model.name embedded; leave it at auto")
        if model.template_options:
            found.append(
                "model.template_options has no effect with model.name embedded, whose chat template reads none"
            )
    else:
        found += [
            f"model.{name} has no effect with model.name {model.name}; only the embedded model is built here"
            for name in differs(model, "seed", "pretrain_steps")
        ]
    if params.evaluate.judge == "world" and params.data.eval_fraction > WORLD_HELD_OUT:
        found.append(
            f"data.eval_fraction must be <= {WORLD_HELD_OUT:g} with evaluate.judge world, got"
            f" {params.data.eval_fraction:g}: the embedded model has read the other prompts"
        )
    for name, value in model.template_options.items():
        if name in _TOLD_ANYWAY:
            found.append(f"model.template_options.{name} has no effect: the chat template is told that anyway")
        elif not name.isidentifier():
            found.append(f"model.template_options.{name} is no name of a variable in a chat template")
        elif not isinstance(value, bool | int | float | str):
            found.append(f"model.template_options.{name} must be true, false, a number or text, got {shown(value)}")
    found += idle_evaluate_settings(params.evaluate)
    if params.runtime.adapter_path is not None and sft.method != "adapter":
        found.append(f"runtime.adapter_path has no effect with sft.method {sft.method}; adapter reads it")
    if params.runtime.max_gpu_gib is not None and params.runtime.device == "cpu":
        found.append("runtime.max_gpu_gib has no effect with runtime.device cpu; set it to null")
    if params.runtime.judge_path is not None and params.evaluate.judge != "hf":
        found.append(f"runtime.judge_path has no effect with evaluate.judge {params.evaluate.judge}; judge hf reads it")
    found += _idle_columns(params)
    if sft.method == "full":
        found += [f"sft.{name} has no effect with sft.method full" for name in differs(sft, "lora")]
    for name, section in (("train", train), ("reward", reward)):
        if name == "reward" and reward.loss == "none":
            continue
        if section.lora is not None and sft.method in ("adapter", "lora", "qlora"):
            found.append(
                f"{name}.lora has no effect with sft.method {sft.method}: {name} goes on with the adapter of sft"
            )
    found += _idle_adapter_settings(params)
    found += _idle_objective_settings(train)
    if "plackett_luce" in train.losses and not params.reference.rankings:
        found.append("train.loss plackett_luce needs reference.rankings true")
    if reward.loss == "bradley_terry" and differs(reward, "ties"):
        found.append("reward.ties has no effect with reward.loss bradley_terry; plackett_luce reads it")
    for name, section in (("sft", sft), ("train", train), ("reward", reward)):
        if (name == "sft" and sft.method in ("none", "adapter")) or (name == "reward" and reward.loss == "none"):
            continue
        if section.max_steps is not None and differs(section, "epochs"):
            found.append(f"{name}.epochs has no effect beside {name}.max_steps; drop one of them")
        if section.optimizer == "rmsprop" and section.weight_decay != 0:
            found.append(f"{name}.weight_decay has no effect with {name}.optimizer rmsprop")
        if section.keep == "best" and section.eval_steps == 0:
            found.append(
                f"{name}.keep best has no effect with {name}.eval_steps 0: no step before the last is measured"
            )
        if section.keep == "last" and section.patience is not None:
            found.append(f"{name}.patience has no effect with {name}.keep last; best reads it")
    return found
