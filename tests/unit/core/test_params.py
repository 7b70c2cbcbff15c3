"""The schema of params.yaml: every problem in one go, in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic import ValidationError

from dpo_cli.core.errors import ParamsError
from dpo_cli.core.load_params import load_params, parse_overrides, parse_params
from dpo_cli.core.params import Params, iter_settings
from dpo_cli.losses.catalogue import LOSSES


def problems_of(tree: dict[str, Any]) -> list[str]:
    with pytest.raises(ParamsError) as caught:
        parse_params(tree)
    return caught.value.problems


def write(folder: Path, text: str) -> Path:
    path = folder / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- values -------------------------------------------------------------------------------


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_params(write(tmp_path, "")) == Params()
    assert load_params(write(tmp_path, "\ufefftrain:\n  beta: 0.3\n")).train.beta == 0.3, "a byte order mark is no text"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    params = load_params(
        write(tmp_path, "train:\n  beta: 0.3\n  loss: hinge\nsft:\n  lora: {r: 4, target_modules: [q_proj]}\n")
    )
    assert (params.train.beta, params.train.loss) == (0.3, "hinge")
    assert (params.sft.lora.r, params.sft.lora.target_modules) == (4, ["q_proj"])
    assert params.train.batch_size == Params().train.batch_size


@pytest.mark.parametrize("text", ["1e-06", "1.0e-6", "0.000001"])
def test_a_learning_rate_is_a_number_however_it_is_written(tmp_path: Path, text: str) -> None:
    """PyYAML reads 1e-06, which ``dvc exp run -S`` writes, as a string."""
    assert load_params(write(tmp_path, f"train: {{learning_rate: {text}}}\n")).train.learning_rate == 1e-6


def test_params_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Params().train.beta = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ({"train": {"beta": -1}}, "train.beta must be > 0, got -1"),
        ({"train": {"beta": 0}}, "train.beta must be > 0, got 0"),
        ({"train": {"label_smoothing": 0.5}}, "train.label_smoothing must be < 0.5, got 0.5"),
        ({"sft": {"batch_size": 0}}, "sft.batch_size must be >= 1, got 0"),
        ({"sft": {"batch_size": 1.5}}, "sft.batch_size must be a whole number, got 1.5"),
        ({"sft": {"batch_size": "16"}}, "sft.batch_size must be a whole number, got '16'"),
        ({"train": {"beta": "0.1"}}, "train.beta must be a number, got '0.1'"),
        ({"train": {"beta": True}}, "train.beta must be a number, got True"),
        ({"model": {"name": 7}}, "model.name must be text, got 7"),
        (
            {"train": {"loss": "dpo"}},
            f"train.loss must be one of {', '.join(map(repr, [*LOSSES][:-1]))} or {[*LOSSES][-1]!r}, got 'dpo'",
        ),
        ({"train": 5}, "train must be a section, got 5"),
        ({"train": {"lora": 5}}, "train.lora must be a section, got 5"),
        ({"sft": {"lora": {"target_modules": "q_proj"}}}, "sft.lora.target_modules must be a list, got 'q_proj'"),
        ({"data": {"eval_fraction": 1}}, "data.eval_fraction must be < 1, got 1"),
        ({"evaluate": {"confidence": 0.5}}, "evaluate.confidence must be > 0.5, got 0.5"),
        ({"train": {"beta": float("nan")}}, "train.beta must be a finite number, got nan"),
        ({"train": {"epochs": float("inf")}}, "train.epochs must be a finite number, got inf"),
        ({"data": {"checks": {"tie": "keep"}}}, "data.checks.tie must be one of 'drop' or 'error', got 'keep'"),
        (
            {"reward": {"loss": "sigmoid"}},
            "reward.loss must be one of 'none', 'bradley_terry' or 'plackett_luce', got 'sigmoid'",
        ),
    ],
)
def test_a_wrong_value_says_where_what_and_got(tree: dict[str, Any], problem: str) -> None:
    assert problems_of(tree) == [f"params.yaml: {problem}"]


@pytest.mark.parametrize("path", ["model.name", "sft.lora.target_modules"])
def test_an_empty_value_is_refused_where_one_is_needed(path: str) -> None:
    *sections, name = path.split(".")
    tree: Any = {name: "" if name == "name" else []}
    for section in reversed(sections):
        tree = {section: tree}
    (problem,) = problems_of(tree)
    assert problem.startswith(f"params.yaml: {path}: ")


def test_all_problems_of_a_file_come_in_one_go() -> None:
    found = problems_of(
        {
            "train": {"beta": -1, "lerning_rate": 1e-5},
            "sft": {"lora": {"r": 0}},
            "evaluat": {},
            "runtime": {"device": "tpu"},
        }
    )
    assert len(found) == 5
    for part in ("train.beta", "train.lerning_rate", "sft.lora.r", "evaluat", "runtime.device"):
        assert sum(f"params.yaml: {part} " in problem for problem in found) == 1


# --- unknown keys -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "name", "nearest"),
    [
        ({"train": {"bta": 1}}, "train.bta", "train.beta"),
        ({"train": {"lerning_rate": 1}}, "train.lerning_rate", "train.learning_rate"),
        ({"trian": {}}, "trian", "train"),
        ({"sft": {"lora": {"alhpa": 1}}}, "sft.lora.alhpa", "sft.lora.alpha"),
        ({"train": {"lora": {"rr": 1}}}, "train.lora.rr", "train.lora.r"),
        ({"data": {"sft": {"pth": ""}}}, "data.sft.pth", "data.sft.path"),
        ({"sft": {"beta": 0.1}}, "sft.beta", "train.beta"),
        ({"train": {"device": "cpu"}}, "train.device", "runtime.device"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(tree: dict[str, Any], name: str, nearest: str) -> None:
    assert problems_of(tree) == [f"params.yaml: {name} is not a setting; did you mean {nearest}?"]


def test_an_unknown_key_without_a_near_name_lists_what_there_is() -> None:
    (problem,) = problems_of({"reference": {"zzzzzzzz": 1}})
    assert problem == (
        "params.yaml: reference.zzzzzzzz is not a setting; there are reference.quantization, reference.max_length,"
        " reference.rankings, reference.checks"
    )


# --- settings without effect, and contradictions -------------------------------------------

OWN = {"name": "mine"}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"runtime": {"model_path": "somewhere"}}, "runtime.model_path has no effect with model.name embedded"),
        ({"model": {"chat_template": "chatml"}}, "model.chat_template has no effect with model.name embedded"),
        ({"model": OWN | {"seed": 3}}, "model.seed has no effect with model.name mine"),
        ({"model": OWN | {"pretrain_steps": 3}}, "model.pretrain_steps has no effect with model.name mine"),
        (
            {"evaluate": {"judge": "world"}, "data": {"eval_fraction": 0.4}},
            "data.eval_fraction must be <= 0.3 with evaluate.judge world, got 0.4",
        ),
        ({"evaluate": {"judge": "rule"}}, "evaluate.rule is missing; evaluate.judge rule checks one of one_sentence, "),
        ({"evaluate": {"rule": "json_object"}}, "evaluate.rule has no effect with evaluate.judge none; judge rule"),
        ({"sft": {"method": "full", "lora": {"r": 4}}}, "sft.lora has no effect with sft.method full"),
        ({"train": {"lora": {"r": 4}}}, "train.lora has no effect with sft.method qlora"),
        ({"train": {"loss": "cdpo"}}, "train.loss cdpo needs train.label_smoothing > 0"),
        ({"train": {"label_smoothing": 0.1}}, "train.label_smoothing has no effect with train.loss sigmoid"),
        ({"train": {"loss": "aot", "batch_size": 1}}, "train.loss aot looks at all pairs of a step together: "),
        ({"train": {"gamma": 0.5}}, "train.gamma has no effect with train.loss sigmoid; simpo and alphapo read it"),
        (
            {"train": {"loss": "simpo", "ld_alpha": 0.5}},
            "train.ld_alpha has no effect with train.loss simpo; sigmoid, ",
        ),
        (
            {"train": {"loss": {"sigmoid": 1.0, "sft": 0.5}, "ties": "groups"}},
            "train.ties has no effect with train.loss s",
        ),
        (
            {"train": {"loss": {"aot": 1.0, "sft": 0.5}}},
            "train.loss aot looks at all pairs of a step together and cannot be mixed",
        ),
        ({"train": {"loss": "exo_pair"}}, "train.loss exo_pair needs train.label_smoothing > 0"),
        ({"train": {"loss": "robust"}}, "train.loss robust needs train.label_smoothing > 0; at 0 it is the sigmoid"),
        ({"train": {"loss": "r_dpo"}}, "train.loss r_dpo needs train.rdpo_alpha > 0; at 0 it is the sigmoid loss"),
        ({"train": {"rpo_eta": 0.2}}, "train.rpo_eta has no effect with train.loss sigmoid; rpo_bwd_kl reads it"),
        ({"train": {"divergence_alpha": 0.2}}, "train.divergence_alpha has no effect with train.divergence reverse_kl"),
        ({"train": {"loss": "plackett_luce"}, "reference": {"rankings": False}}, "train.loss plackett_luce needs "),
        ({"train": {"max_steps": 5, "epochs": 2.0}}, "train.epochs has no effect beside train.max_steps"),
        ({"sft": {"max_steps": 5, "epochs": 2.0}}, "sft.epochs has no effect beside sft.max_steps"),
        ({"sft": {"optimizer": "rmsprop", "weight_decay": 0.1}}, "sft.weight_decay has no effect with sft.optimizer"),
        ({"sft": {"keep": "best", "eval_steps": 0}}, "sft.keep best has no effect with sft.eval_steps 0"),
        ({"sft": {"lora": {"rslora": True, "r": 1}}}, "sft.lora.rslora has no effect with sft.lora.r 1"),
        (
            {"sft": {"lora": {"dora": True}}, "evaluate": {"judge": "world", "scales": [0.5]}},
            "evaluate.scales cannot go with sft.lora.dora true",
        ),
        (
            {
                "sft": {"method": "none"},
                "train": {"lora": {"dora": True}},
                "evaluate": {"judge": "world", "scales": [2]},
            },
            "evaluate.scales cannot go with train.lora.dora true",
        ),
        ({"train": {"patience": 3}}, "train.patience has no effect with train.keep last; best reads it"),
        (
            {"data": {"sft": {"format": "alpaca", "turns": "all"}}},
            "data.sft.turns has no effect with format alpaca; messages reads it",
        ),
        (
            {"data": {"preferences": {"format": "unpaired", "compare": "first"}}},
            "data.preferences.compare has no effect with format unpaired; it has single answers",
        ),
        (
            {"reward": {"loss": "bradley_terry", "ties": "groups"}},
            "reward.ties has no effect with reward.loss bradley_terry; plackett_luce reads it",
        ),
        (
            {"reward": {"loss": "bradley_terry", "lora": {"r": 4}}},
            "reward.lora has no effect with sft.method qlora: reward goes on with the adapter of sft",
        ),
        (
            {"reward": {"loss": "bradley_terry", "max_steps": 5, "epochs": 2.0}},
            "reward.epochs has no effect beside reward.max_steps; drop one of them",
        ),
        (
            {"ppo": {"reward": "world", "target_kl": 3, "kl_coefficient": 0}},
            "ppo.target_kl has no effect with ppo.kl_coefficient 0, which no factor moves",
        ),
        (
            {"ppo": {"reward": "world", "estimator": "rloo", "lam": 0.5}},
            "ppo.lam has no effect with ppo.estimator rloo; gae reads it",
        ),
        (
            {"ppo": {"reward": "world", "value_coefficient": 0, "value_clip": 5}},
            "ppo.value_clip has no effect with ppo.value_coefficient 0",
        ),
        (
            {"ppo": {"reward": "world", "epochs": 1, "batch_size": 64, "max_step_kl": 0.1}},
            "ppo.max_step_kl has no effect where a round is one step",
        ),
        (
            {"ppo": {"reward": "world", "epochs": 1, "batch_size": 64, "value_clip": 0.5}},
            "ppo.value_clip has no effect where a round is one step",
        ),
        (
            {"ppo": {"reward": "world", "optimizer": "rmsprop", "weight_decay": 0.1}},
            "ppo.weight_decay has no effect with ppo.optimizer rmsprop",
        ),
    ],
)
def test_a_setting_without_effect_is_an_error(tree: dict[str, Any], words: str) -> None:
    (problem,) = problems_of(tree)
    assert problem.startswith(f"params.yaml: {words}")


@pytest.mark.parametrize(
    "tree",
    [
        {"evaluate": {"judge": "world"}, "data": {"eval_fraction": 0.3}},
        {"evaluate": {"judge": "rule", "rule": "json_object", "temperatures": [0.0]}},
        {"train": {"loss": "cdpo", "label_smoothing": 0.1}},
        {"sft": {"method": "none", "max_steps": 5, "epochs": 2.0}, "train": {"lora": {"r": 4}}},
        {"sft": {"method": "full"}, "train": {"lora": {"r": 4}}},
        {"train": {"max_steps": 5}},
        {"model": OWN | {"chat_template": "chatml"}, "runtime": {"model_path": "somewhere"}},
    ],
)
def test_settings_that_go_together_pass(tree: dict[str, Any]) -> None:
    parse_params(tree)


def test_several_settings_without_effect_come_in_one_go() -> None:
    assert len(problems_of({"model": OWN | {"seed": 3, "pretrain_steps": 3}, "train": {"label_smoothing": 0.1}})) == 3


# --- the file -----------------------------------------------------------------------------


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"params.yaml is missing; run the command in a project folder"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  beta: [1\n", r"params.yaml, line \d+, column \d+: not valid YAML: "),
        ("train:\n  beta: 0.1\n  beta: 0.2\n", "not valid YAML: found duplicate key"),
        ("train: !!python/object:os.system {}\n", "not valid YAML: "),
        ("a: 1\n---\nb: 2\n", "not valid YAML: "),
        ("- 1\n- 2\n", "must hold sections .* got list"),
        ("beta\n", "must hold sections .* got str"),
        ("model: {revision: 2024-13-01}\n", "not valid YAML: month must be in 1..12"),
        ("[" * 3000, "not valid YAML"),
    ],
)
def test_a_file_that_holds_no_sections_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ParamsError, match=words):
        load_params(write(tmp_path, text))


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes("model: {revision: 版本}\n".encode("gbk"))
    with pytest.raises(ParamsError, match="not UTF-8 text"):
        load_params(path)


# --- overrides ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.beta=0.5", "train.beta", 0.5),
        ("train.beta = 0.5", "train.beta", 0.5),
        ("train.learning_rate=1e-06", "train.learning_rate", 1e-6),
        ("data.sft.path=data/raw/a=b.json", "data.sft.path", "data/raw/a=b.json"),
        ("sft.lora.target_modules=[q_proj, v_proj]", "sft.lora.target_modules", ["q_proj", "v_proj"]),
        ("sft.max_steps=null", "sft.max_steps", None),
        ("reference.max_length=77", "reference.max_length", 77),
    ],
)
def test_an_override_wins_over_the_file(tmp_path: Path, override: str, path: str, value: Any) -> None:
    file = write(tmp_path, "train:\n  beta: 0.2\nsft:\n  max_steps: 3\n")
    found: Any = load_params(file, ["train.beta=0.7", override])  # and over an earlier one
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_an_override_opens_a_section_that_is_null(tmp_path: Path) -> None:
    path = write(tmp_path, "sft: {method: none}\ntrain:\n  lora: null\n")
    lora = load_params(path, ["train.lora.r=3"]).train.lora
    assert lora is not None
    assert lora.r == 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("beta", "--set takes section.key=value, got 'beta'"),
        ("beta=1", "--set takes section.key=value, got 'beta=1'"),
        (".beta=1", "--set takes section.key=value"),
        ("train..beta=1", "--set takes section.key=value"),
        ("model.revision=2024-13-01", "--set model.revision: not valid YAML: month"),
        ("train.beta=[", r"--set train.beta, line \d+, column \d+: not valid YAML"),
        ("train.beta.deep=1", "--set train.beta.deep: beta is a value, not a section"),
        ("train.bta=1", "train.bta is not a setting; did you mean train.beta?"),
        ("train.beta=-1", "train.beta must be > 0, got -1"),
    ],
)
def test_a_wrong_override_says_what_is_wrong(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(ParamsError, match=words.replace("?", r"\?")):
        load_params(write(tmp_path, "train:\n  beta: 0.2\n"), [override])


# --- the schema itself ---------------------------------------------------------------------


def test_every_setting_has_a_meaning_and_its_default_is_valid() -> None:
    settings = dict(iter_settings())
    assert [path for path, field in settings.items() if not field.description] == []
    assert {"train.beta", "data.sft.path", "sft.lora.r", "runtime.model_path"} <= set(settings)
    assert parse_params(Params().model_dump()) == Params()


# --- sources of data ----------------------------------------------------------------------


def test_a_source_may_have_columns_roles_labels_and_further_sources() -> None:
    params = parse_params(
        {
            "data": {
                "preferences": {
                    "columns": {"prompt": "question", "completions": ["a.text", "b.text"]},
                    "labels": {"1": "first", "0": "second"},
                    "also": [{"path": "data/raw/more.csv", "roles": {"narrator": "system"}, "weight": 0.5}],
                }
            }
        }
    )
    first, more = params.data.preferences, params.data.preferences.also[0]
    assert first.columns["completions"] == ["a.text", "b.text"]
    assert (more.path, more.format, more.roles, more.split) == (
        "data/raw/more.csv",
        "auto",
        {"narrator": "system"},
        "auto",
    )


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({"columns": {"prompt": 5}}, "columns.prompt must be text or a list of texts, got 5"),
        ({"roles": {"x": "boss"}}, "roles.x must be one of 'system', 'user', 'assistant' or 'tool', got 'boss'"),
        ({"also": [{"format": "hh"}]}, "also.0.path is missing"),
        ({"also": [{"path": "a", "formt": "hh"}]}, "formt is not a setting; did you mean"),
        ({"also": {"path": "a"}}, "also must be a list, got {'path': 'a'}"),
        ({"max_rows": 0}, "max_rows must be >= 1, got 0"),
        ({"weight": 0.0}, "weight must be > 0, got 0.0"),
        ({"columns": {"prompt": "prompt"}}, "columns.prompt has no effect: it names itself"),
        (
            {"format": "hh", "pairs": "adjacent"},
            "pairs has no effect with format hh; kwise, oasst, pairs, sharegpt and votes read it",
        ),
        ({"format": "hh", "labels": {"1": "first"}}, "labels has no effect with format hh; two_outputs reads it"),
    ],
)
def test_an_odd_source_is_refused(source: dict[str, Any], problem: str) -> None:
    (found,) = problems_of({"data": {"preferences": source}})
    assert found.startswith("params.yaml: data.preferences.")
    assert problem in found


# --- the reward model ---------------------------------------------------------------------


def test_without_a_reward_model_the_rest_of_its_section_rests() -> None:
    rest = {"ties": "groups", "lora": {"r": 4}, "max_steps": 5, "epochs": 2.0, "learning_rate": 1e-3}
    assert parse_params({"reward": rest}).reward.loss == "none"
    parse_params({"reward": {**rest, "loss": "plackett_luce", "max_steps": None}, "sft": {"method": "none"}})
    parse_params({"reward": {"loss": "bradley_terry"}, "evaluate": {"judge": "reward-model"}})


def test_without_a_reward_the_rest_of_section_ppo_rests() -> None:
    parse_params({"ppo": {"rule": "json_object", "estimator": "rloo", "lam": 0.5, "answers": 1, "lora": {"r": 4}}})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reward": "rule"}, "ppo.rule is missing; ppo.reward rule checks one of one_sentence, json_object"),
        ({"reward": "world", "estimator": "rloo", "answers": 1}, "ppo.answers must be > 1, got 1"),
        ({"reward": "world", "prompts_a_round": 8}, "ppo.batch_size must be <= ppo.prompts_a_round, 8, got 16"),
    ],
)
def test_what_ppo_needs_is_asked_for(settings: dict[str, Any], words: str) -> None:
    (problem,) = problems_of({"ppo": settings})
    assert words in problem


# --- settings of hostile sizes ----------------------------------------------------------------------------------


def _numbers(annotation: Any, metadata: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The constraints of each number that a setting may be, or may hold."""
    if annotation in (int, float):
        yield metadata
    elif get_origin(annotation) is Annotated:
        inner, *fields = get_args(annotation)
        yield from _numbers(inner, [constraint for field in fields for constraint in field.metadata])
    else:
        for argument in get_args(annotation):
            if argument is not type(None):
                yield from _numbers(argument, metadata)


def test_every_number_has_bounds_on_both_sides() -> None:
    unbounded = [
        path
        for path, field in iter_settings()
        for constraints in _numbers(field.annotation, field.metadata)
        if not any(isinstance(each, Gt | Ge) for each in constraints)
        or not any(isinstance(each, Lt | Le) for each in constraints)
    ]
    assert unbounded == []


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("sft.lora.r=1000000000", "sft.lora.r must be <= 4096, got 1000000000"),
        ("train.seed=100000000000000000000000000", "train.seed must be <= 4294967295, got 1000"),
        ("train.learning_rate=1e300", "train.learning_rate must be <= 1, got 1e+300"),
        (f"train.learning_rate=1{'0' * 400}", "train.learning_rate must be a number, got 1000"),
        (f"train.beta=1{'0' * 5000}", "train.beta: not valid YAML: Exceeds the limit"),
        (f"train.beta={'x' * 100_000}", "train.beta must be a number, got 'xxx"),
        (r'data.sft.path="a\0b"', "data.sft.path holds a NUL byte"),
        (f"runtime.model_path=/{'a' * 300}", "runtime.model_path holds a name that is longer than the 255 bytes"),
        (f"model.name={'a' * 20_000}", "model.name must have at most 10000 characters, got 20000"),
    ],
)
def test_values_without_measure_are_refused_in_a_short_line(override: str, problem: str) -> None:
    with pytest.raises(ParamsError) as caught:
        parse_overrides([override])
    (line,) = caught.value.problems
    assert problem in line
    assert len(line) < 400


def _aliases(line: str, first: str) -> str:
    names = "abcdefghij"
    lines = [first, *(line.format(name, ", ".join([f"*{before}"] * 10)) for before, name in pairwise(names))]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        _aliases("{0}: &{0} [{1}]", "a: &a [x, x, x, x, x, x, x, x, x, x]"),
        _aliases("{0}: &{0}\n  <<: [{1}]", "a: &a {x: 1}"),
        "a: &a [*a]",
        "train: &a\n  beta: *a",
    ],
)
def test_aliases_that_spell_out_to_more_than_fits_are_not_spelled_out(text: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ParamsError, match="with its aliases spelled out it holds more than 10000 values"):
        load_params(path)


def test_a_few_aliases_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("sft:\n  learning_rate: &rate 1.0e-4\ntrain:\n  learning_rate: *rate\n", encoding="utf-8")
    assert load_params(path).train.learning_rate == 1e-4


def test_a_file_that_is_no_settings_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("train:\n" + "".join(f"  k{i}: 1\n" for i in range(1000)), encoding="utf-8")
    with pytest.raises(ParamsError) as caught:
        load_params(path)
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1] == "params.yaml: and 980 more"
    path.write_bytes(b"#" * (1 << 21))
    with pytest.raises(ParamsError, match="larger than 1 MiB"):
        load_params(path)
