"""A local model as a judge: the next token's distribution among the options, in both orders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_cli.core.errors import MachineError
from dpo_cli.core.params import HfJudgeParams, RuntimeParams
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.schema import user
from dpo_cli.judging.judge import INVALID, Question
from dpo_cli.judging.language_model import HfJudge, kinship_of
from dpo_cli.judging.templates import Template
from dpo_cli.models.load import load_model, load_tokenizer
from dpo_cli.models.project import Workplace
from dpo_cli.scoring.scorer import Scorer

TEMPLATE = Template("short", "{prompt} A: {a} B: {b} A or B?")
WITH_TIE = Template("tie", "{prompt} A: {a} B: {b} A, B or {tie}?")
QUESTIONS = [Question("2 and 2?", "4", "five " * n) for n in range(1, 9)]


def load(folder: Path, cpu: Any, reporter: Any, template: Template = TEMPLATE, policy: Path | None = None) -> HfJudge:
    runtime = RuntimeParams(max_tokens_per_microbatch=120)
    return HfJudge.load(folder, template, HfJudgeParams(), Workplace("evaluate", reporter, runtime, cpu), policy)


@pytest.mark.parametrize("template", [TEMPLATE, WITH_TIE])
def test_a_verdict_is_the_plain_forwards(
    project: Path, tiny_folder: Path, cpu: Any, reporter: Any, template: Template
) -> None:
    judge = load(tiny_folder, cpu, reporter, template)
    found = dict(judge.judge(QUESTIONS))
    assert sorted(found) == list(range(len(QUESTIONS)))
    model, tokenizer = load_model(tiny_folder, cpu, quantization="none"), load_tokenizer(tiny_folder)
    options = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in template.options]
    for index, question in enumerate(QUESTIONS):
        ids = ChatEncoder(tokenizer).encode_prompt([user(template.render(question))])
        with torch.no_grad():
            p = model(torch.tensor([ids])).logits[0, -1, options].double().softmax(-1)
        expected = p[0] + (p[2] / 2 if len(options) == 3 else 0)
        assert found[index].p_a == pytest.approx(expected.item(), abs=1e-5)
        assert found[index].verdict == ("A", "B", "tie")[int(p.argmax())]


def test_many_questions_go_through_the_model_at_once_whatever_logits_may_be_held(
    project: Path, tiny_folder: Path, cpu: Any, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = RuntimeParams(max_tokens_per_microbatch=4096)
    judge = HfJudge.load(tiny_folder, TEMPLATE, HfJudgeParams(), Workplace("evaluate", reporter, runtime, cpu))
    expected = dict(judge.judge(QUESTIONS))
    passes, rows = [], []
    predict, read = Scorer.predict, Scorer.next_token_logps
    monkeypatch.setattr(Scorer, "predict", lambda self, groups: passes.append(len(groups)) or predict(self, groups))
    monkeypatch.setattr(Scorer, "next_token_logps", lambda self, some: rows.append(len(some)) or read(self, some))
    monkeypatch.setattr(Scorer, "max_distribution_rows", 3)
    found = dict(judge.judge(QUESTIONS))
    assert passes == [8]
    assert rows == [3, 3, 2]
    for index, judgment in expected.items():
        assert found[index].p_a == pytest.approx(judgment.p_a, abs=1e-6)


def test_its_judgments_are_known_by_model_and_template(
    project: Path, tiny_folder: Path, cpu: Any, reporter: Any
) -> None:
    first, again, other = (load(tiny_folder, cpu, reporter, each) for each in (TEMPLATE, TEMPLATE, WITH_TIE))
    assert first.identity == again.identity != other.identity


def test_a_question_beyond_the_context_has_no_verdict(
    project: Path, tiny_folder: Path, cpu: Any, reporter: Any
) -> None:
    judge = load(tiny_folder, cpu, reporter)
    found = dict(judge.judge([QUESTIONS[0], Question("why", "because " * 200, "no")]))
    assert found[1] == INVALID
    assert found[0].verdict in ("A", "B")


def test_what_a_chat_template_puts_before_every_answer_is_read_past(
    project: Path, tiny_folder: Path, cpu: Any, reporter: Any, tmp_path: Path
) -> None:
    """As templates with an empty thought before the answer do."""
    folder = tmp_path / "thinking"
    shutil.copytree(tiny_folder, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}{{ '<thought>' }}{% endif %}"
        "{{ m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    ((_, found),) = load(folder, cpu, reporter).judge(QUESTIONS[:1])
    text = f"user: {TEMPLATE.render(QUESTIONS[0])}{tokenizer.eos_token}assistant: <thought>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    options = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "AB"]
    with torch.no_grad():
        logits = load_model(folder, cpu, quantization="none")(torch.tensor([ids])).logits[0, -1, options]
    assert found.p_a == pytest.approx(logits.softmax(-1)[0].item(), abs=1e-5)


def test_a_judge_that_is_missing_or_pickled_is_refused(
    project: Path, tiny_folder: Path, cpu: Any, reporter: Any, tmp_path: Path
) -> None:
    with pytest.raises(MachineError, match="the judge's model directory .* is missing"):
        load(tmp_path / "nowhere", cpu, reporter)
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(MachineError, match="only pickled weights"):
        load(folder, cpu, reporter)


def test_a_judge_of_the_policys_family_is_warned_of(
    project: Path, tiny_folder: Path, cpu: Any, reporter: Any, tmp_path: Path, make_llama: Callable[..., Any]
) -> None:
    same, twin, cousin = (tmp_path / name for name in ("same", "twin", "cousin"))
    shutil.copytree(tiny_folder, same)
    make_llama(768, seed=5).save_pretrained(twin)
    load_model(tiny_folder, cpu, quantization="none").config.save_pretrained(twin)
    make_llama(90, hidden_size=32).save_pretrained(cousin)
    assert kinship_of(tiny_folder, same) == "the judge is the base model of what it judges"
    assert "same configuration" in str(kinship_of(tiny_folder, twin))
    assert "of the same family" in str(kinship_of(tiny_folder, cousin))
    assert kinship_of(tiny_folder, tmp_path) is None
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    config = other / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"llama"', '"qwen2"'), encoding="utf-8")
    assert kinship_of(tiny_folder, other) is None
    load(tiny_folder, cpu, reporter, policy=same)
    assert any("a judge favors answers like its own" in warning for warning in reporter.warned)
