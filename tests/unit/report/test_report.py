"""The report: whole, offline, deterministic, and deaf to what its samples try to inject."""

from __future__ import annotations

import base64
import hashlib
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.core import paths
from dpo_cli.core.artifacts import write_text
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.report import steps
from dpo_cli.report.browser import MOST_BYTES, make_browser, pack_log_ratios
from dpo_cli.report.figures import DARK, LIGHT
from dpo_cli.report.inputs import evaluation_table, steps_file
from dpo_cli.report.page import write_report
from dpo_cli.report.style import page_environment
from tests.report_folder import (
    ATTACK,
    METRICS,
    OPTIONAL,
    Elements,
    make_samples,
    sample_id,
    write_csv,
    write_metrics,
    write_reports,
    write_samples,
)

FIGURES = {
    "loss", "accuracy", "margin", "rewards", "entropy", "gradient", "sft", "frontier", "reward-frontier",
    "temperatures", "margins", "reliability", "accuracy-by", "length", "agreement-1", "agreement-2",
}  # fmt: skip


@pytest.fixture
def reports(project: Path) -> Path:
    """A project folder with the reports of all stages."""
    write_reports()
    return project


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are empty, which saves most of the time, where they are not what is tested."""
    monkeypatch.setattr("dpo_cli.report.figures.draw", lambda *arguments: '<svg viewBox="0 0 2 1"></svg>')


def render() -> str:
    write_report(paths.REPORT_HTML)
    return paths.REPORT_HTML.read_text(encoding="utf-8")


def figures() -> set[str]:
    return {path.stem for path in paths.FIGURES.iterdir()}


# --- what is on the page --------------------------------------------------------------------


@pytest.mark.usefixtures("reports")
def test_shows_verdict_figures_samples_and_account() -> None:
    page = Elements(render())
    assert "The tuned model is better than the SFT model." in page.text
    assert page.count("figure", "chart") == page.count("svg") == len(FIGURES)
    assert "Of 100 held-out prompts the tuned model wins 79, ties 10, loses 10 against the SFT model" in page.text
    assert "1 has no verdict" in page.text
    assert "All of them are on this page, and are in reports/evaluate/samples.json" in page.text
    counts = [
        METRICS[stage][name] for stage in ("convert_sft", "convert_preferences") for name in ("num_read", "num_train")
    ]
    for shown in (*(f"{count:,}" for count in counts), "0.693147", "a-judge-8b", "87.0%", "81.0% [76.0%, 85.0%]"):
        assert shown in page.text
    assert "0 held-out prompts are in the training data" in page.text
    assert "NaN" not in page.text
    assert "nan" not in page.text.split()


@pytest.mark.usefixtures("reports", "undrawn")
def test_a_task_is_marked_where_its_interval_leaves_out_zero() -> None:
    rows = re.findall(r'<tr class="(\w+)">\s*<th scope="row">(\w+)</th>\s*<td>', render())
    assert rows == [("plain", "arithmetic"), ("bad", "facts"), ("good", "reading")]


@pytest.mark.usefixtures("reports")
def test_every_figure_is_a_file_of_its_own() -> None:
    page = render()
    assert figures() == FIGURES
    for path in paths.FIGURES.iterdir():
        text = path.read_text(encoding="utf-8")
        root = ET.fromstring(text)
        name = "{http://www.w3.org/2000/svg}"
        assert root.findtext(f"{name}title")
        assert "prefers-color-scheme:dark" in (root.findtext(f"{name}style") or "")
        assert re.search(rf'<h3 id="{path.stem}-title">', page)
        used = set(re.findall(r"(?:fill|stroke)-(?:muted|line|ink|card|a|b)\b", re.sub(r"<style.*</style>", "", text)))
        assert used <= set(re.findall(r"\.([\w-]+)\{", text))
        assert "#01fe" not in text
        assert "url(http" not in text
        assert text.count("://") == 1  # the namespace


def test_files_have_the_colors_of_the_page() -> None:
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w+)", part))
        for part in page_environment().get_template("theme.css.jinja").render().split("@media")[:2]
    )

    def short(colors: Mapping[str, str]) -> dict[str, str]:
        return {name: "#fff" if color == "#ffffff" else color for name, color in colors.items()}

    assert short(LIGHT).items() <= light.items()
    assert short(DARK).items() <= dark.items()


@pytest.mark.usefixtures("reports", "undrawn")
@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("reliability", {"reliability"}),
        ("accuracy_by", {"accuracy-by"}),
        ("temperatures", {"temperatures"}),
        ("frontier", {"frontier", "reward-frontier"}),
        ("length", {"length"}),
    ],
)
def test_a_figure_without_numbers_is_left_out(name: str, gone: set[str]) -> None:
    path = evaluation_table(name)
    render()
    path.write_text(path.read_text(encoding="utf-8").split("\n")[0] + "\n", encoding="utf-8")
    pages = [Elements(render())]
    path.unlink()
    pages.append(Elements(render()))
    assert figures() == FIGURES - gone  # what the first report left is gone, too
    for page in pages:
        assert page.count("svg") == len(FIGURES) - len(gone)
        for figure, setting in {"temperatures": "evaluate.temperatures", "frontier": "evaluate.scales"}.items():
            assert (setting in page.text) == (figure == name)


@pytest.mark.usefixtures("reports")
def test_all_that_is_optional_may_be_missing() -> None:
    for name in (*OPTIONAL, "pairs"):
        (evaluation_table(name)).unlink()
    for command in ("agreement", "capability"):
        paths.metrics_file(command).unlink()
    optional = ("win_rate_chosen", "perplexity_", "judge_agreement", "judge_consistency", "judge_first", "cheaper_")
    needed = {name: value for name, value in METRICS["evaluate"].items() if not name.startswith(optional)}
    write_metrics("evaluate", needed)
    page = Elements(render())
    assert page.count("svg") == 8
    assert "judge" in page.ids
    assert "capability" not in page.ids


@pytest.mark.usefixtures("project", "undrawn")
def test_without_a_judge_there_are_no_outcomes() -> None:
    write_reports(judged=False)
    page = Elements(render())
    assert "no judge compared the answers" in page.text
    assert "evaluate.judge in params.yaml" in page.text
    assert all("win" not in sample for sample in page.data["samples"])
    assert not {"frontier", "temperatures", "length"} & figures()


@pytest.mark.usefixtures("reports", "undrawn")
def test_rounds_stand_beside_each_other() -> None:
    """Those of earlier projects, as far as anything is known of them, and this one."""
    assert "Rounds" not in Elements(render()).text
    first = {"project": "<first>"}
    second = {"project": "second", "win_rate": 0.7, "win_rate_ci": [0.6, 0.8], "kl": 1.234, "num_pairs": 1200}
    write_metrics("sft", {**METRICS["sft"], "rounds": [first, {**second, "reward_sft": 0.25, "reward_dpo": 0.5}]})
    section = re.search(r'<section id="rounds".*?</section>', render(), flags=re.DOTALL)
    assert section is not None
    rows = [
        re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", row)).strip()
        for row in re.findall(r"<tr>(.*?)</tr>", section[0], flags=re.DOTALL)
    ]
    assert rows[1:3] == ["1: &lt;first&gt; – – – –", "2: second 1,200 70.0% [60.0%, 80.0%] 1.23 0.250 → 0.500"]
    assert rows[3].startswith("3: this project 3,039 74.6% [")


@pytest.mark.usefixtures("reports", "undrawn")
def test_without_sft_there_is_no_sft_curve() -> None:
    write_metrics("sft", {"method": "none"})
    write_text(steps_file("sft"), steps_file("sft").read_text(encoding="utf-8").split("\n")[0] + "\n")
    page = Elements(render())
    assert figures() == FIGURES - {"sft"}
    assert "the base model as it is" in page.texts


@pytest.mark.parametrize(
    ("chosen", "spans"),
    [
        ([0.0, 1.0, 2.0], []),
        ([0.0, 1.0, -1.0, -2.0], [(1.5, 3.0)]),
        ([0.0, -1.0, 1.0, -1.0], [(0.0, 1.5), (2.5, 3.0)]),
        ([-1.0, -1.0, -1.0], [(0.0, 2.0)]),
    ],
)
def test_displacement_is_where_the_chosen_reward_is_below_zero(
    chosen: list[float], spans: list[tuple[float, float]]
) -> None:
    """Between two points the reward is taken for a straight line."""
    for column in ("eval_rewards/chosen", "rewards/chosen"):
        assert steps.displaced([{"step": float(step), column: reward} for step, reward in enumerate(chosen)]) == spans


def test_a_long_series_keeps_its_spikes() -> None:
    points = [(float(step), 0.0) for step in range(20_000)]
    points[7_003] = (7_003.0, 9.0)
    points[7_010] = (7_010.0, -9.0)
    shown = steps.thinned(points)
    assert len(shown) <= 500
    assert {points[0], points[7_003], points[7_010]} <= set(shown)
    assert list(shown) == sorted(shown)
    assert steps.thinned(points[:500]) == points[:500]


# --- texts of models and data ---------------------------------------------------------------


@pytest.mark.usefixtures("reports", "undrawn")
def test_what_a_model_or_a_file_says_stays_text() -> None:
    clean = Elements(render())
    samples = make_samples(100)
    for sample in samples[4:9]:
        sample["prompt"] = [{"role": ATTACK, "content": ATTACK}] * 3
        sample["chosen"] = sample["rejected"] = sample["sft"]["text"] = sample["dpo"]["text"] = ATTACK
        sample["dpo"]["heat"] = [[ATTACK, 0.1], ["<!--<script>", -1], ["]]>", 0]]
    write_samples(samples)
    write_csv("accuracy_by", "kind,label,num_pairs,accuracy,low,high", [("source", '"<script>"', 9, 0.9, 0.8, 1.0)] * 2)
    write_metrics("evaluate", METRICS["evaluate"] | {"judge_name": ATTACK})
    attacked = Elements(render())
    assert ATTACK in attacked.texts  # the judge's name
    assert attacked.count("script") == clean.count("script") == 2
    assert attacked.count("img") == 0
    assert {sample["id"]: sample for sample in attacked.data["samples"]}[sample_id(5)]["prompt"][0]["content"] == ATTACK
    assert "<" not in attacked.raw["script"][0]


@pytest.mark.usefixtures("reports", "undrawn")
def test_whitespace_and_scripts_of_all_kinds_survive_and_half_a_surrogate_pair_is_a_mark() -> None:
    texts = [
        "  def f():\n\n\treturn 1  ",
        "早上好，小明",
        "صباح الخير",
        "👩‍🚀 \u202e",
        "\u2028\u2029\x00\x7f",
        "\ufffd",
    ]
    samples = make_samples(10)
    for sample, text in zip(samples, texts, strict=False):
        sample["dpo"]["text"] = text
    write_samples(samples)
    path = paths.report_dir("evaluate") / "samples.json"
    path.write_text(path.read_text(encoding="utf-8").replace("Question 4:", "Question \\ud83d 4:"), encoding="utf-8")
    shown = {sample["id"]: sample for sample in Elements(render()).data["samples"]}
    assert set(texts) <= {sample["dpo"]["text"] for sample in shown.values()}
    assert shown[sample_id(4)]["prompt"][0]["content"].startswith("Question \ufffd 4:")


@pytest.mark.usefixtures("reports")
def test_nothing_is_fetched_and_one_script_may_run() -> None:
    source = render()
    page = Elements(source)
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "img", "object", "embed", "base"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "#").startswith("#")
    without_data = source.replace(page.raw["script"][0], "")
    for target in re.findall(r"url\(([^)]*)\)", without_data):
        assert target.startswith("#")
    assert "@import" not in without_data
    assert "://" not in without_data
    assert "innerHTML" not in source
    policies = [attributes["content"] or "" for _, attributes in page.elements if "http-equiv" in attributes]
    digest = base64.b64encode(hashlib.sha256(page.raw["script"][1].encode()).digest()).decode()
    assert len(policies) == 1
    assert "default-src 'none'" in policies[0]
    assert f"script-src 'sha256-{digest}';" in policies[0]
    assert source.index("http-equiv") < source.index("<script")


@pytest.mark.usefixtures("reports")
def test_ids_are_unique_and_references_hold() -> None:
    source = render()
    ids = Elements(source).ids
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:aria-labelledby="|href="#|url\(#)([^")]+)', source)
    assert set(references) <= set(ids)


def test_equal_reports_give_equal_bytes_wherever_they_lie(
    reports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written() -> dict[str, bytes]:
        write_report(paths.REPORT_HTML)
        return {path.name: path.read_bytes() for path in (paths.REPORT_HTML, *paths.FIGURES.iterdir())}

    first = written()
    assert written() == first
    assert tmp_path.name.encode() not in b"".join(first.values())
    moved = tmp_path / "elsewhere"
    reports.rename(moved)
    monkeypatch.chdir(moved)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    assert written() == first


# --- which samples are on the page, and how they are packed ---------------------------------


@pytest.mark.usefixtures("project")
def test_a_long_report_keeps_its_size_and_all_that_went_wrong() -> None:
    write_reports(900, num_tokens=200)
    page = Elements(render())
    assert paths.REPORT_HTML.stat().st_size < 3_000_000
    ids = [sample["id"] for sample in page.data["samples"]]
    assert len(ids) == 500
    assert ids == sorted(ids)
    samples = make_samples(900, num_tokens=200)
    first = {sample["id"] for sample in samples if sample.get("win", 1) < 0.5 or sample.get("consistent") is False}
    assert first < set(ids)
    rest = sorted(sample["id"] for sample in samples if sample["id"] not in first)
    assert sorted(set(ids) - first) == rest[: 500 - len(first)]
    assert "500 of 900 are on this page" in page.text


def test_very_long_answers_make_fewer_samples_and_at_least_one() -> None:
    browser = make_browser(make_samples(60, num_tokens=9000))
    assert 0 < browser.num_shown < 60
    assert len(browser.data.encode()) < 1.01 * MOST_BYTES
    [sample] = make_samples(5)[4:]
    sample["sft"]["text"] = "x" * (MOST_BYTES + 1)
    assert make_browser([sample]).num_shown == 1


def unpack(answer: str, packed: dict[str, Any]) -> list[tuple[str, float | None]]:
    """The inverse of packing, written again after its description."""
    units = (packed["text"] if "text" in packed else answer + packed["rest"]).encode("utf-16-le")
    ends = list(accumulate(packed["lengths"], initial=0))
    texts = [units[2 * begin : 2 * end].decode("utf-16-le") for begin, end in pairwise(ends)]
    ratios = [None if ratio is None else ratio / 100 for ratio in packed["ratios"]]
    return list(zip(texts, ratios, strict=True))


@pytest.mark.parametrize(
    ("answer", "heat"),
    [
        ("a b", [("a", 0.0), (" b", -1.25), ("<end>", 40.49)]),
        ("👩‍🚀好", [("👩", 0.01), ("\u200d🚀", -40.49), ("好", None), ("", 0.5)]),
        ("x" * 89 + "y" * 200, [("x" * 89, 1.0), ("y" * 200, 2.0)]),
        ("déjà", [("d\ufffd", 0.1), ("\ufffdj\ufffd", 0.2)]),
    ],
)
def test_log_ratios_are_packed_without_loss(answer: str, heat: list[tuple[str, float | None]]) -> None:
    assert unpack(answer, pack_log_ratios(answer, heat)) == heat
    assert pack_log_ratios("c", [("c", float("nan"))])["ratios"] == [None]


# --- damaged files --------------------------------------------------------------------------


NEEDED = [
    ("convert_sft/metrics.json", "convert-sft"),
    ("convert_preferences/metrics.json", "convert-preferences"),
    ("sft/metrics.json", "sft"),
    ("sft/steps.tsv", "sft"),
    ("precompute_ref/metrics.json", "precompute-ref"),
    ("train/metrics.json", "train"),
    ("train/steps.tsv", "train"),
    ("evaluate/metrics.json", "evaluate"),
    ("evaluate/margins.csv", "evaluate"),
    ("evaluate/samples.json", "evaluate"),
]
FURTHER = [
    *((f"evaluate/{name}.csv", "evaluate") for name in ("pairs", *OPTIONAL)),
    ("agreement/metrics.json", "agreement"),
    ("capability/metrics.json", "capability"),
]


@pytest.mark.usefixtures("reports")
@pytest.mark.parametrize(("name", "command"), NEEDED)
def test_a_missing_file_names_the_stage_to_run(name: str, command: str) -> None:
    (paths.REPORTS / name).unlink()
    with pytest.raises(StaleArtifactError, match=rf"{name}.* run: dpo-cli {command}$"):
        write_report(paths.REPORT_HTML)
    assert not paths.REPORT_HTML.exists()


@pytest.mark.usefixtures("reports")
@pytest.mark.parametrize(("name", "command"), [*NEEDED, *FURTHER])
@pytest.mark.parametrize("content", ["", "{}"], ids=repr)
def test_a_damaged_file_names_the_stage_to_run(name: str, command: str, content: str) -> None:
    (paths.REPORTS / name).write_text(content, encoding="utf-8")
    with pytest.raises(StaleArtifactError, match=rf"{name}.* run: dpo-cli {command}$"):
        write_report(paths.REPORT_HTML)
    assert not paths.REPORT_HTML.exists()
    assert not paths.FIGURES.exists()


@pytest.mark.usefixtures("reports")
@pytest.mark.parametrize("row", ["0.5,x", "0.5", "0.5,sft,1,2,3,4,5,6,7,8,9"])
def test_a_damaged_row_of_a_table_is_an_error(row: str) -> None:
    path = evaluation_table("temperatures")
    write_text(path, path.read_text(encoding="utf-8") + f"{row}\n")
    with pytest.raises(StaleArtifactError, match="temperatures.csv is damaged"):
        write_report(paths.REPORT_HTML)
