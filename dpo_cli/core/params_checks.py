"""What settings must not say together, and settings that were moved from their default for nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import attrgetter

from dpo_cli.core.data_params import AS_PREFERENCES, PreferenceSource, SftSource, differs
from dpo_cli.core.judges import JUDGES
from dpo_cli.core.params import EMBEDDED, WORLD_HELD_OUT, EvaluateParams, Params, TrainParams
from dpo_cli.core.text import shown
from dpo_cli.losses.catalogue import LOSSES, SETTINGS, readers

_BY_SFT = ("adapter", "lora", "qlora")
_CURVES = ("opponents", "judge_pairs", "temperatures", "scales")

_IDLE: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("runtime.model_path", "model.name", (EMBEDDED,), "; give the model a name of its own"),
    ("model.chat_template", "model.name", (EMBEDDED,), "; leave it at auto"),
    ("model.template_options", "model.name", (EMBEDDED,), ", whose chat template reads none"),
    ("runtime.max_gpu_gib", "runtime.device", ("cpu",), "; set it to null"),
    ("sft.lora", "sft.method", ("full",), ""),
    ("train.lora", "sft.method", _BY_SFT, ": train goes on with the adapter of sft"),
    ("reward.lora", "sft.method", _BY_SFT, ": reward goes on with the adapter of sft"),
    ("ppo.lora", "sft.method", _BY_SFT, ": ppo goes on with the adapter of sft"),
    ("reward.ties", "reward.loss", ("bradley_terry",), "; plackett_luce reads it"),
)
"""Settings that have no effect where another one has one of these values, and what is said of it."""
_READ: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("model.seed", "model.name", (EMBEDDED,), "; only the embedded model is built here"),
    ("model.pretrain_steps", "model.name", (EMBEDDED,), "; only the embedded model is built here"),
    ("runtime.adapter_path", "sft.method", ("adapter",), "; adapter reads it"),
    ("evaluate.rule", "evaluate.judge", ("rule",), "; judge rule reads it"),
    ("ppo.rule", "ppo.reward", ("rule",), "; reward rule reads it"),
    ("ppo.value_clip", "ppo.estimator", ("gae",), "; gae reads it"),
    ("ppo.value_coefficient", "ppo.estimator", ("gae",), "; gae reads it"),
    ("ppo.gamma", "ppo.estimator", ("gae",), "; gae reads it"),
    ("ppo.lam", "ppo.estimator", ("gae",), "; gae reads it"),
    ("train.divergence_alpha", "train.divergence", ("alpha",), "; alpha reads it"),
)
"""Settings that have an effect only where another one has one of these values."""


def contradictions(params: Params) -> list[str]:
    """Settings that contradict each other, and settings that were moved from their default for nothing."""
    found = []
    for table, idle_in in ((_IDLE, True), (_READ, False)):
        for path, other, values, why in table:
            section, name = path.split(".")
            value = attrgetter(other)(params)
            is_idle = (value in values) == idle_in
            if is_idle and differs(getattr(params, section), name) and not _rests(params, section):
                found.append(f"{path} has no effect with {other} {value}{why}")
    if params.evaluate.judge == "world" and params.data.eval_fraction > WORLD_HELD_OUT:
        found.append(
            f"data.eval_fraction must be <= {WORLD_HELD_OUT:g} with evaluate.judge world, got"
            f" {params.data.eval_fraction:g}: the embedded model has read the other prompts"
        )
    if not params.sample.prompts:
        found += [
            f"sample.{name} has no effect with sample.prompts []; dpo-cli sample FILE has {option}"
            for name, option in (("answers", "--answers"), ("top_p", "--top-p"))
            if differs(params.sample, name)
        ]
    if "plackett_luce" in params.train.losses and not params.reference.rankings:
        found.append("train.loss plackett_luce needs reference.rankings true")
    return [
        *found,
        *_of_the_template(params),
        *_of_judges(params),
        *_of_evaluation(params.evaluate),
        *_of_sources(params),
        *_of_adapters(params),
        *_of_objective(params.train),
        *_of_trainings(params),
        *_of_ppo(params),
    ]


def _rests(params: Params, section: str) -> bool:
    """Whether nothing is trained by this section, so that it is not read."""
    return {
        "sft": params.sft.method in ("none", "adapter"),
        "reward": params.reward.loss == "none",
        "ppo": params.ppo.reward == "none",
    }.get(section, False)


_TOLD_ANYWAY = (
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token",
    "pad_token", "unk_token",
)  # fmt: skip


def _of_the_template(params: Params) -> Iterator[str]:
    for name, value in params.model.template_options.items():
        where = f"model.template_options.{name}"
        if name in _TOLD_ANYWAY:
            yield f"{where} has no effect: the chat template is told that anyway"
        elif not name.isidentifier():
            yield f"{where} is no name of a variable in a chat template"
        elif not isinstance(value, bool | int | float | str):
            yield f"{where} must be true, false, a number or text, got {shown(value)}"


def _of_judges(params: Params) -> Iterator[str]:
    """Settings of judges that nobody asks, or that those who are asked need."""
    evaluate, judge = params.evaluate, params.evaluate.judge
    asked = dict.fromkeys([judge, *([params.ppo.reward] if params.ppo.reward in ("hf", "openai") else [])])
    for name, kind in JUDGES.items():
        own = kind.section
        for setting in differs(getattr(evaluate, own)) if own is not None and name not in asked else ():
            yield f"evaluate.{own}.{setting} has no effect with evaluate.judge {judge}; judge {name} reads it"
        if name in asked and kind.needs is not None:
            setting, remedy = kind.needs
            if not attrgetter(setting)(evaluate):
                yield f"evaluate.{setting} is missing; {remedy}"
    if params.runtime.judge_path is not None and "hf" not in asked:
        yield f"runtime.judge_path has no effect with evaluate.judge {judge}; judge hf reads it"


def _of_evaluation(evaluate: EvaluateParams) -> Iterator[str]:
    judge = evaluate.judge
    asked = JUDGES.get(judge)
    if asked is None or not asked.judges_any:
        why = ": nobody voted on those answers" if judge == "votes" else ""
        for name in differs(evaluate, *_CURVES):
            yield f"evaluate.{name} has no effect with evaluate.judge {judge}{why}; set it to {_default(name)}"
    if "sft" not in evaluate.opponents:
        yield "evaluate.opponents must hold sft, whose answers are sampled anyway"
    for name in ("opponents", "temperatures", "scales"):
        values = getattr(evaluate, name)
        for value in dict.fromkeys(values):
            if values.count(value) > 1:
                yield f"evaluate.{name} names {value} twice"
    if 1 in evaluate.scales:
        yield "evaluate.scales names 1, the model as it is, which is there anyway"


def _default(setting: str) -> str:
    value = EvaluateParams.model_fields[setting].get_default(call_default_factory=True)
    return f"[{', '.join(value)}]" if isinstance(value, list) else str(value)


def _of_sources(params: Params) -> Iterator[str]:
    """Settings of sources that say what is known already."""
    sft, preferences = params.data.sft, params.data.preferences
    if sft.path == AS_PREFERENCES:
        for name in differs(sft, *(SftSource.model_fields.keys() - {"path"})):
            why = "data.preferences says how it is read"
            yield f"data.sft.{name} has no effect with data.sft.path {AS_PREFERENCES}; {why}"
    for section, first in (("data.sft", sft), ("data.preferences", preferences)):
        for index, source in enumerate([first, *first.also]):
            where = section if index == 0 else f"{section}.also.{index - 1}"
            for field, key in source.columns.items():
                if field == key:
                    yield f"{where}.columns.{field} has no effect: it names itself"
            for problem in _of_source(source):
                yield f"{where}.{problem}"


def _of_source(source: SftSource | PreferenceSource) -> Iterator[str]:
    kind = source.format
    if isinstance(source, SftSource) and source.turns == "all" and kind not in ("auto", "messages"):
        yield f"turns has no effect with format {kind}; messages reads it"
    if source.weight != 1 and source.split == "eval":
        yield "weight has no effect with split eval: only train rows are weighted"
    if source.labels and kind not in ("auto", "two_outputs"):
        yield f"labels has no effect with format {kind}; two_outputs reads it"
    if isinstance(source, PreferenceSource):
        if source.compare == "first" and kind in ("kwise", "oasst", "unpaired", "votes"):
            yield f"compare has no effect with format {kind}; it has single answers"
        if source.pairs != "all" and kind not in ("auto", "kwise", "oasst", "pairs", "sharegpt", "votes"):
            yield f"pairs has no effect with format {kind}; kwise, oasst, pairs, sharegpt and votes read it"


def _of_adapters(params: Params) -> Iterator[str]:
    """Settings of the adapters that change nothing, or that another setting cannot go with."""
    sft = params.sft
    policy, lora = ("sft.lora", sft.lora) if sft.method in ("lora", "qlora") else ("train.lora", params.train.lora)
    others = {f"{name}.lora": getattr(params, name).lora for name in ("reward", "ppo") if not _rests(params, name)}
    for name, adapter in {policy: lora, **others}.items():
        if adapter is not None and adapter.rslora and adapter.r == 1:
            yield f"{name}.rslora has no effect with {name}.r 1"
    if lora is not None and lora.dora and params.evaluate.scales:
        yield (
            f"evaluate.scales cannot go with {policy}.dora true: a multiple of what DoRA changed is no such adapter;"
            " set it to []"
        )


_SIGMOID_AT_ZERO = ("cdpo", "robust", "r_dpo")


def _of_objective(train: TrainParams) -> Iterator[str]:
    """Settings of the objective that the chosen one does not read, or that it needs and does not get."""
    if not train.losses:
        yield "train.loss must name at least one objective, got {}"
        return
    called = " and ".join(train.losses)
    for setting in differs(train, *SETTINGS):
        if not any(setting in LOSSES[name].reads for name in train.losses):
            named = readers(setting)
            verb = "reads" if len(named) == 1 else "read"
            yield f"train.{setting} has no effect with train.loss {called}; {_listed(named)} {verb} it"
    for name in train.losses:
        for setting in LOSSES[name].needs:
            if not differs(train, setting):
                at_zero = "; at 0 it is the sigmoid loss" if name in _SIGMOID_AT_ZERO else ""
                yield f"train.loss {name} needs train.{setting} > 0{at_zero}"
    coupled = [name for name in train.losses if LOSSES[name].is_coupled]
    if coupled and len(train.losses) > 1:
        yield f"train.loss {coupled[0]} looks at all pairs of a step together and cannot be mixed with others"
    if coupled and train.batch_size == 1:
        rows = "answers" if LOSSES[coupled[0]].is_unpaired else "pairs"
        yield f"train.loss {coupled[0]} looks at all {rows} of a step together: train.batch_size must be > 1, got 1"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _of_trainings(params: Params) -> Iterable[str]:
    """Settings that SFT, DPO and the reward model share, where they are read at all."""
    for name, section in (("sft", params.sft), ("train", params.train), ("reward", params.reward)):
        if _rests(params, name):
            continue
        if section.max_steps is not None and differs(section, "epochs"):
            yield f"{name}.epochs has no effect beside {name}.max_steps; drop one of them"
        if section.optimizer == "rmsprop" and section.weight_decay != 0:
            yield f"{name}.weight_decay has no effect with {name}.optimizer rmsprop"
        if section.keep == "best" and section.eval_steps == 0:
            yield f"{name}.keep best has no effect with {name}.eval_steps 0: no step before the last is measured"
        if section.keep == "last" and section.patience is not None:
            yield f"{name}.patience has no effect with {name}.keep last; best reads it"


def _of_ppo(params: Params) -> Iterable[str]:
    """Settings of reinforcement that change nothing, or that others need."""
    ppo = params.ppo
    if _rests(params, "ppo"):
        return
    if ppo.reward == "rule" and ppo.rule is None:
        yield "ppo.rule is missing; ppo.reward rule checks one of one_sentence, json_object"
    if ppo.estimator == "rloo" and ppo.answers < 2:
        yield "ppo.estimator rloo compares the answers to a prompt: ppo.answers must be > 1, got 1"
    if ppo.target_kl is not None and ppo.kl_coefficient == 0:
        yield "ppo.target_kl has no effect with ppo.kl_coefficient 0, which no factor moves; start above 0"
    if ppo.batch_size > ppo.prompts_a_round:
        yield f"ppo.batch_size must be <= ppo.prompts_a_round, {ppo.prompts_a_round}, got {ppo.batch_size}"
    if ppo.estimator == "gae" and ppo.value_coefficient == 0 and differs(ppo, "value_clip"):
        yield "ppo.value_clip has no effect with ppo.value_coefficient 0"
    if ppo.epochs == 1 and ppo.batch_size == ppo.prompts_a_round:
        for name in (name for name in ("clip", "value_clip", "max_step_kl") if differs(ppo, name)):
            yield f"ppo.{name} has no effect where a round is one step: raise ppo.epochs or lower ppo.batch_size"
    if ppo.optimizer == "rmsprop" and ppo.weight_decay != 0:
        yield "ppo.weight_decay has no effect with ppo.optimizer rmsprop"
