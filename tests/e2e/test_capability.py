"""``dpo-cli capability`` on small projects: the figures of three models are those of a plain computation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dpo_cli.cli.app import app

NUM_ITEMS = 24
MAX_NEW = 6
ITEMS = [
    {"question": f"What comes after {n}?", "choices": [str(n + 1), str(n), "red", "a tree"][:: 1 if n % 2 else -1]}
    for n in range(NUM_ITEMS)
]
CHOICE = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: items.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: 0
{more}
"""
ACC = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"
LOGP = (
    "process_results: !function figures.first_logp\n"
    "metric_list: [{metric: first_logp, aggregation: mean, higher_is_better: true}]"
)
FIGURES = "def first_logp(doc, results):\n    return {'first_logp': results[0][0]}\n"
GENERATE = f"""\
task: say
dataset_path: json
dataset_kwargs: {{data_files: {{test: items.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{said}}}}"
generation_kwargs: {{until: ["\\n\\n\\n"], max_gen_toks: {MAX_NEW}, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module", params=["lora", "full"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, train_tiny: Any) -> Path:
    """A project that was trained; not to be changed."""
    folder = tmp_path_factory.mktemp(request.param)
    train_tiny(folder, {"sft.learning_rate": 1e-2, "train.learning_rate": 1e-2, "sft.method": request.param})
    return folder


@pytest.fixture
def project(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the trained project, which is the working directory."""
    folder = tmp_path / "project"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    return folder


def plain_models(project: Path, tiny_folder: Path) -> dict[str, Any]:
    """The three models as transformers and PEFT load them by themselves."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    whole = not (project / "models/sft/adapter_config.json").exists()
    under = project / "models/sft" if whole else tiny_folder
    sft = load(under) if whole else PeftModel.from_pretrained(load(tiny_folder), project / "models/sft")
    models = {
        "base": load(tiny_folder),
        "sft": sft,
        "dpo": PeftModel.from_pretrained(load(under), project / "models/dpo"),
    }
    return {name: model.eval() for name, model in models.items()}


def plain_logp(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Log-probability of the answer's tokens behind the prompt, nats."""
    import torch

    ids = tokenizer.encode(f"{prompt} {answer}")
    start = len(tokenizer.encode(prompt))
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logps[at - 1, ids[at]]) for at in range(start, len(ids)))


def plain_answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """The likeliest token again and again."""
    import torch

    ids = tokenizer.encode(prompt)
    said: list[int] = []
    for _ in range(MAX_NEW):
        with torch.no_grad():
            said.append(int(model(torch.tensor([ids + said])).logits[0, -1].argmax()))
        if said[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(said, skip_special_tokens=True)


def write_tasks(folder: Path, **files: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "items.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in ITEMS), encoding="utf-8")
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["capability", *arguments])


def test_figures_are_those_of_a_plain_computation(project: Path, tiny_folder: Path, tokenizer: Any) -> None:
    models = plain_models(project, tiny_folder)
    logps = {
        name: [[plain_logp(model, tokenizer, item["question"], each) for each in item["choices"]] for item in ITEMS]
        for name, model in models.items()
    }
    answers = {
        name: [plain_answer(model, tokenizer, item["question"]) for item in ITEMS] for name, model in models.items()
    }
    assert len({tuple(found) for found in answers.values()}) == 3, "the models are three"
    write_tasks(
        Path("tasks"),
        choose=CHOICE.format(name="choose", more=ACC),
        weigh=CHOICE.format(name="weigh", more=LOGP),
        say=GENERATE,
    )
    Path("tasks/figures.py").write_text(FIGURES, encoding="utf-8")
    targets = [answers[("base", "sft", "dpo")[at % 3]][at] for at in range(NUM_ITEMS)]
    rows = [item | {"said": said} for item, said in zip(ITEMS, targets, strict=True)]
    Path("tasks/items.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    result = invoke("tasks", "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures == json.loads(Path("reports/capability/metrics.json").read_text(encoding="utf-8"))
    told = [
        json.loads(line) for line in Path("reports/capability/items.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    expected = {
        "choose": ("acc", {name: [float(max(row) == row[0]) for row in logps[name]] for name in models}),
        "weigh": ("first_logp", {name: [row[0] for row in logps[name]] for name in models}),
        "say": ("exact_match", {n: [float(a == b) for a, b in zip(answers[n], targets, strict=True)] for n in models}),
    }
    assert list(figures["capability"]["tasks"]) == sorted(expected)
    for task, (metric, scores) in expected.items():
        mine = [row for row in told if row["task"] == task]
        assert [row["item"] for row in mine] == list(range(NUM_ITEMS))
        found = figures["capability"]["tasks"][task]
        assert (found["metric"], found["num_items"]) == (metric, NUM_ITEMS)
        for name in models:
            assert [row[name] for row in mine] == pytest.approx(scores[name], abs=2e-4)
            assert found[name] == pytest.approx(sum(scores[name]) / NUM_ITEMS, abs=2e-4)
        for ours, theirs in (("dpo", "sft"), ("sft", "base")):
            low, high = found[f"{ours}_minus_{theirs}_ci"]
            assert found[f"{ours}_minus_{theirs}"] == pytest.approx(found[ours] - found[theirs])
            assert low <= found[f"{ours}_minus_{theirs}"] <= high
    assert all(len(set(map(tuple, scores.values()))) > 1 for _, scores in expected.values()), "tuning changed something"


def test_the_first_items_of_named_tasks_and_what_is_said_of_them(project: Path, tiny_folder: Path) -> None:
    write_tasks(Path("tasks"), choose=CHOICE.format(name="choose", more=ACC), say=GENERATE)
    result = invoke("tasks", "--tasks", "choose", "--limit", "7")
    assert result.exit_code == 0, result.output
    rows = Path("reports/capability/items.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["item"] for row in rows] == list(range(7))
    assert list(json.loads(Path("reports/capability/metrics.json").read_text())["capability"]["tasks"]) == ["choose"]
    shown = " ".join(result.stdout.split())
    for words in ("DPO - SFT", "SFT - base", "95% intervals of the difference, paired by item (200 draws of items)"):
        assert words in shown
    assert "DPO is worse than SFT on" in shown
    assert "capability: DPO on choose: 28/28 requests" in result.stderr
    assert "it/s" not in result.output, "no bars of the harness"
