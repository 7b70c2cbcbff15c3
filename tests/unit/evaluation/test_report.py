"""The report: whole, offline, deterministic, and deaf to what its samples try to inject."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.core import paths
from dpo_cli.core.artifacts import write_json, write_json_lines, write_text
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.evaluation.report.page import choose_samples, write_report
from dpo_cli.training.history import write_tsv

ATTACK = "</script><script>alert(1)</script><img src=https://evil.example/x onerror=alert(1)>\"'&amp;"
SFT_COLUMNS = ("step", "loss", "eval_loss", "grad_norm", "learning_rate")
JUDGED = ("win_rate", "win_rate_ci", "tie_rate", "win_rate_ceiling", "well_formed_sft", "well_formed_dpo")

METRICS: dict[str, dict[str, Any]] = {
    "convert_sft": {
        "num_read": 1600,
        "num_train": 1431,
        "num_eval": 161,
        "num_rejected": 8,
        "rejected": {"empty_completion": 5, "duplicate": 3},
    },
    "convert_preferences": {
        "num_read": 3600,
        "num_train": 3218,
        "num_eval": 355,
        "num_rejected": 27,
        "rejected": {"equal_sides": 17, "duplicate": 10},
    },
    "sft": {
        "method": "lora",
        "num_rows": 1429,
        "num_eval": 160,
        "num_rejected": 3,
        "num_steps": 540,
        "loss": 0.31,
        "eval_loss_start": 4.8,
        "eval_loss": 0.35,
        "eval_perplexity": 1.42,
        "rows_per_s": 92.0,
        "logical_tokens_per_s": 4123.0,
        "peak_mem_gib": 0.9,
    },
    "precompute_ref": {
        "num_completions": 7142,
        "num_computed": 0,
        "num_reused": 7142,
        "num_rejected": 2,
        "completions_per_s": 0.0,
        "completion_tokens_per_s": 0.0,
        "peak_mem_gib": 0.8,
    },
    "train": {
        "num_pairs": 3217,
        "num_eval": 354,
        "num_rejected": 2,
        "num_steps": 603,
        "step0_loss": 0.6931471805599453,
        "step0_max_abs_margin": 0.0,
        "step0_max_abs_logp_difference": 1.9e-6,
        "loss": 0.2,
        "eval_loss_start": 0.6931,
        "eval_loss": 0.27,
        "eval_accuracy": 0.9,
        "eval_margin": 3.4,
        "pairs_per_s": 38.0,
        "logical_tokens_per_s": 2950.0,
        "peak_mem_gib": 1.1,
    },
    "evaluate": {
        "win_rate": 0.79,
        "win_rate_ci": [0.75, 0.83],
        "tie_rate": 0.3,
        "win_rate_ceiling": 0.865,
        "well_formed_sft": 1.0,
        "well_formed_dpo": 0.99,
        "reward_accuracy": 0.9,
        "reward_accuracy_ci": [0.87, 0.93],
        "loss": 0.27,
        "loss_ci": [0.24, 0.3],
        "loss_at_reference": 0.6931,
        "learns_log_ratio": True,
        "chosen_reward": -0.1,
        "rejected_reward": -3.3,
        "reference_accuracy": 0.5,
        "longer_accuracy": 0.47,
        "num_ties": 0,
        "num_pairs": 354,
        "num_generated_prompts": 100,
        "temperature": 0.7,
        "kl": 4.2,
        "kl_k1": 4.3,
        "kl_estimates_disagree": False,
        "finished_sft": 1.0,
        "finished_dpo": 1.0,
        "answer_tokens_sft": 14.0,
        "answer_tokens_dpo": 15.0,
        "num_leaked_prompts": 0,
        "peak_mem_gib": 1.2,
    },
}


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def count(self, tag: str, name: str = "") -> int:
        """Elements of this tag, and of this class where one is given."""
        return sum(tag == found and name in (attrs.get("class") or "").split(" ") for found, attrs in self.elements)


def write_metrics(stage: str, metrics: dict[str, Any]) -> None:
    write_json(paths.metrics_file(stage), {stage: metrics})


def make_samples(count: int, judged: bool = True) -> list[dict[str, Any]]:
    """Samples with wins, ties and losses in turn: 8 wins and 1 tie for each loss."""
    samples = []
    for number in range(count):
        sample: dict[str, Any] = {
            "id": f"{number:032x}",
            "prompt": [{"role": "user", "content": f"prompt {number}"}],
            "sft": {"text": f"plain {number}", "num_tokens": 3, "finished": True},
            "dpo": {"text": f"tuned {number}", "num_tokens": 3, "finished": True},
        }
        if judged:
            sample["win"] = {0: 0.0, 1: 0.5}.get(number % 10, 1.0)
            for name in ("sft", "dpo"):
                sample[name] |= {"reward": 1.0, "well_formed": True}
        samples.append(sample)
    return samples


def write_samples(samples: list[dict[str, Any]]) -> None:
    write_json_lines(paths.report_dir("evaluate") / "samples.jsonl", samples)


def train_rows() -> list[dict[str, Any]]:
    """Six logged steps; the held-out pass is at every other one."""
    names = ("loss", *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")))
    rows = []
    for step in range(6):
        row: dict[str, Any] = {"step": step}
        if step:
            row |= dict.fromkeys(names, 0.1 * step)
        if step % 2 == 0:
            row |= {f"eval_{name}": 0.11 * step for name in names}
        rows.append(row)
    return rows


@pytest.fixture
def reports(project: Path) -> Path:
    """A project folder with the reports of all stages."""
    for stage, metrics in METRICS.items():
        write_metrics(stage, metrics)
    rows = train_rows()
    write_tsv(paths.report_dir("train") / "steps.tsv", rows, rows[0] | rows[1] | rows[2])
    sft = [{"step": step, "loss": 1.0 / (step + 1), "eval_loss": 1.1 / (step + 1)} for step in range(5)]
    write_tsv(paths.report_dir("sft") / "steps.tsv", sft, SFT_COLUMNS)
    write_text(paths.report_dir("evaluate") / "margins.csv", "margin,share\n-1,0.1\n0.5,0.4\n2,0.5\n")
    write_samples(make_samples(100))
    return project


def render() -> str:
    write_report(paths.REPORT_HTML)
    return paths.REPORT_HTML.read_text(encoding="utf-8")


@pytest.mark.usefixtures("reports")
def test_shows_verdict_curves_samples_and_account() -> None:
    page = Elements(render())
    text = re.sub(r"\s+", " ", " ".join(page.texts))
    assert "The tuned model is better than the SFT model." in text
    assert page.count("svg") == 6
    assert page.count("article", "sample") == 40
    assert "wins 80, ties 10 and loses 10" in text
    assert "first 20 wins, 10 ties and 10 losses" in text
    assert "the other 60 are not shown" in text
    assert "reports/evaluate/samples.jsonl" in text
    for number in ("1,600", "3,600", "1,431", "3,218", "3,217", "17", "0.693147"):
        assert number in text
    assert "0 held-out prompts are in the training data" in text
    assert "NaN" not in text
    assert "nan" not in text.split()


@pytest.mark.usefixtures("reports")
def test_what_a_model_or_a_file_says_stays_text() -> None:
    clean = Elements(render())
    samples = make_samples(100)
    samples[0]["prompt"] = [{"role": "system", "content": ATTACK}, {"role": "user", "content": ATTACK}]
    samples[0]["dpo"]["text"] = ATTACK
    samples[2]["sft"]["text"] = ATTACK
    write_samples(samples)
    attacked = Elements(render())
    assert sum(ATTACK in text for text in attacked.texts) == 4
    assert attacked.count("script") == attacked.count("img") == 0
    assert len(attacked.elements) == len(clean.elements) + 3  # one more turn: its division, role and text


@pytest.mark.usefixtures("reports")
def test_whitespace_and_scripts_of_all_kinds_survive() -> None:
    texts = ["  def f():\n\n\treturn 1  ", "早上好，小明", "صباح الخير", "👩‍🚀 \u202e"]
    samples = make_samples(10)
    for sample, text in zip(samples, texts, strict=False):
        sample["dpo"]["text"] = text
    write_samples(samples)
    assert set(texts) <= set(Elements(render()).texts)


@pytest.mark.usefixtures("reports")
def test_nothing_is_fetched_and_no_script_may_run() -> None:
    source = render()
    page = Elements(source)
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "iframe", "img", "object", "embed", "base"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "#").startswith("#")
    for target in re.findall(r"url\(([^)]*)\)", source):
        assert target.startswith("#")
    assert "@import" not in source
    assert "://" not in source
    policies = [attributes["content"] or "" for _, attributes in page.elements if "http-equiv" in attributes]
    assert len(policies) == 1
    assert "default-src 'none'" in policies[0]
    assert "script-src" not in policies[0]


@pytest.mark.usefixtures("reports")
def test_ids_are_unique_and_references_hold() -> None:
    source = render()
    ids = [attributes["id"] for _, attributes in Elements(source).elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:aria-labelledby="|href="#|url\(#)([^")]+)', source)
    assert set(references) <= set(ids)


def test_equal_reports_give_equal_bytes_wherever_they_lie(
    reports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(paths.REPORT_HTML)
    first = paths.REPORT_HTML.read_bytes()
    write_report(paths.REPORT_HTML)
    assert paths.REPORT_HTML.read_bytes() == first
    assert tmp_path.name.encode() not in first
    moved = tmp_path / "elsewhere"
    reports.rename(moved)
    monkeypatch.chdir(moved)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    write_report(paths.REPORT_HTML)
    assert paths.REPORT_HTML.read_bytes() == first


@pytest.mark.usefixtures("reports")
def test_without_a_judge_there_are_no_badges_and_no_filter() -> None:
    write_metrics("evaluate", {name: value for name, value in METRICS["evaluate"].items() if name not in JUDGED})
    write_samples(make_samples(100, judged=False))
    page = Elements(render())
    assert page.count("article", "sample") == 60
    assert page.count("article", "win") == page.count("fieldset") == 0
    assert "no judge compared" in " ".join(page.texts)


@pytest.mark.usefixtures("reports")
def test_without_sft_there_is_no_sft_curve() -> None:
    write_metrics("sft", {"method": "none"})
    write_tsv(paths.report_dir("sft") / "steps.tsv", [], SFT_COLUMNS)
    page = Elements(render())
    assert page.count("svg") == 5
    assert "the base model as it is" in page.texts


@pytest.mark.usefixtures("reports")
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("convert_sft/metrics.json", "convert-sft"),
        ("convert_preferences/metrics.json", "convert-preferences"),
        ("sft/metrics.json", "sft"),
        ("sft/steps.tsv", "sft"),
        ("precompute_ref/metrics.json", "precompute-ref"),
        ("train/metrics.json", "train"),
        ("train/steps.tsv", "train"),
        ("evaluate/metrics.json", "evaluate"),
        ("evaluate/margins.csv", "evaluate"),
        ("evaluate/samples.jsonl", "evaluate"),
    ],
)
@pytest.mark.parametrize("content", [None, "", "{", "loss\tx\n1\n", "\n\n{}"], ids=repr)
def test_a_missing_or_damaged_file_names_the_stage_to_run(name: str, command: str, content: str | None) -> None:
    path = paths.REPORTS / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(StaleArtifactError, match=rf"{name}.* run: dpo-cli {command}$"):
        write_report(paths.REPORT_HTML)
    assert not paths.REPORT_HTML.exists()


def test_samples_are_the_first_of_each_outcome_by_id() -> None:
    samples = make_samples(300)
    chosen = choose_samples(samples[::-1])
    assert [sample["id"] for sample, _ in chosen.shown] == sorted(sample["id"] for sample, _ in chosen.shown)
    assert [sample["id"] for sample, outcome in chosen.shown if outcome == "loss"] == [
        f"{number:032x}" for number in range(0, 200, 10)
    ]
    assert [(outcome.num_prompts, outcome.num_shown) for outcome in chosen.outcomes] == [(240, 20), (30, 20), (30, 20)]


def test_samples_are_all_shown_when_few() -> None:
    chosen = choose_samples(json.loads(json.dumps(make_samples(7))))
    assert len(chosen.shown) == chosen.num_prompts == 7
