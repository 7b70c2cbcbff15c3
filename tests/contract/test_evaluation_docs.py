"""docs/metrics.md, evaluation.md, judges.md: every metric and line of the verdict is there; quotes are the code's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from dpo_cli.core.params import EvaluateParams, JudgeName, TrainParams
from dpo_cli.data.schema import Messages
from dpo_cli.evaluation import BASE, DPO, SFT
from dpo_cli.evaluation.flags import (
    FEWEST,
    LESS_DISTINCT,
    LESS_ENTROPY,
    LONGER,
    MORE_REPETITION,
    MORE_UNFINISHED,
    RISING_WITH_LENGTH,
    judge_quality,
)
from dpo_cli.evaluation.kl import ALARM_STANDARD_ERRORS, SequenceKl
from dpo_cli.evaluation.metrics import (
    against_chosen_metrics,
    answer_metrics,
    answer_reward_metrics,
    cheaper_step,
    divergence_metrics,
    form_metrics,
    held_out_metrics,
    judge_metrics,
    win_metrics,
)
from dpo_cli.evaluation.rewards import ScoredGroup, pair_losses
from dpo_cli.evaluation.steps import _MODELS_KEPT
from dpo_cli.evaluation.verdict import (
    FORGETS,
    HARDLY_MOVED,
    HIGH_KL,
    WELL_FORMED,
    WORST_CALIBRATION,
    headline,
    verdict,
)
from dpo_cli.judging.answers import Answer
from dpo_cli.judging.judge import Judgment
from dpo_cli.judging.known_reward import MAX_SENTENCE_CHARACTERS, RULES
from dpo_cli.judging.prepare import API_KEY, JUDGE_PATH
from dpo_cli.judging.templates import TEMPLATES
from dpo_cli.judging.win_rate import MAX_INVALID_RATE, Comparison, ComparisonResult, summarize
from dpo_cli.statistics.calibration import NUM_BINS
from dpo_cli.statistics.intervals import Sampling

ROOT = Path(__file__).resolve().parents[2]
PAGES_OF_EVALUATION = [ROOT / "docs" / f"{name}.md" for name in ("evaluation", "metrics", "judges")]
PAGE = "\n".join(page.read_text(encoding="utf-8") for page in PAGES_OF_EVALUATION)
TEXT = re.sub(r"\s+", " ", PAGE)
SECTIONS = {part.split("\n", 1)[0]: part for part in re.split(r"^#+ ", PAGE, flags=re.MULTILINE)[1:]}
SAMPLING = Sampling(draws=100, confidence=0.95, seed=0)


def rows_of(*sections: str) -> dict[str, str]:
    """The rows of the sections' tables by their first cell."""
    lines = [line for name in sections for line in SECTIONS[name].splitlines() if line.startswith("| ")]
    return {re.split(r"(?<!\\)\|", line)[1].strip(): line for line in lines}


def documented_metrics() -> set[str]:
    first_cells = rows_of("Held-out pairs", "Single answers", "Divergence and text", "Win rates")
    # length_ratio stands in the row of the lengths that it is made of
    return {name for cell in first_cells for name in re.findall(r"`([a-z0-9_]+)`", cell)} | {"length_ratio"}


QUESTION: Messages = [{"role": "user", "content": "question"}]


def answer(id: str, num_tokens: int, text: str = "") -> Answer:
    return Answer(id, id, (5,), (tuple(range(num_tokens)),), QUESTION, text)


def result(num_wins: int = 3) -> ComparisonResult:
    """Four prompts, of which ours wins some, by a judge that is asked."""
    ours, theirs = (
        {str(n): answer(str(n), n + size, text) for n in range(4)} for text, size in (("good", 2), ("bad", 1))
    )
    comparisons = {
        id: Comparison(Judgment.of(float(int(id) < num_wins)), Judgment.of(float(int(id) >= num_wins))) for id in ours
    }
    wins = [each.win or 0.0 for each in comparisons.values()]
    return ComparisonResult(
        ours, theirs, comparisons, summarize(list(comparisons.values()), ""), SAMPLING.interval(wins, [*ours])
    )


def all_metrics() -> dict[str, Any]:
    """Every key that the functions in metrics.py can add, and those that the stage adds itself."""
    policy = {"a": (-1.0, -2.0), "b": (-2.0, -1.0)}
    pairs = [ScoredGroup.implicit((id, id), logps, (-1.5, -1.5), (3, 4), 0.1) for id, logps in policy.items()]
    kls = {"a": SequenceKl(1.0, 1.1, 1.0, 2.0, 2.5, 0.3, 3), "b": SequenceKl(0.5, 0.4, 0.6, 1.0, 1.5, 0.2, 2)}
    answers = {name: {id: answer(id, size) for id, size in (("a", 3), ("b", 2))} for name in (SFT, DPO)}
    points = [(1.0, 2.0, result()), (0.5, 1.0, result())]
    by_stage = {
        **{f"perplexity_{name}": 2.0 for name in (BASE, SFT, DPO)},
        **{f"{figure}_{name}": 1.0 for figure in ("reward", "well_formed") for name in (SFT, DPO)},
        "num_generated_prompts": 4,
        "temperature": 1.0,
        "max_new_tokens": 8,
        "reward_length_correlation": 0.0,
        "judge": "hf",
        "judge_name": "a model",
        "win_rate_ceiling": 0.8,
        "num_leaked_prompts": 0,
        "peak_mem_gib": 1.0,
        "peak_mem_reserved_gib": 1.5,
        "learns_log_ratio": True,
        "training": {"learning_rate": 1e-4},
    }
    return {
        **held_out_metrics(pairs, pair_losses(pairs, 0.1), SAMPLING),
        **answer_reward_metrics(pairs, {"a": True, "b": False}, TrainParams(), SAMPLING),
        **divergence_metrics(kls, SAMPLING),
        **answer_metrics(answers),
        **win_metrics(result(), SAMPLING, reads=True),
        **against_chosen_metrics(result()),
        **judge_metrics(result()),
        **cheaper_step(points, SAMPLING),
        **form_metrics([(True, False), (True, True)], SAMPLING.confidence),
        **by_stage,
    }


ALL = all_metrics()
COMMITTED = json.loads((ROOT / "reports" / "evaluate" / "metrics.json").read_text(encoding="utf-8"))["evaluate"]


def undocumented(metrics: dict[str, Any]) -> list[str]:
    """Keys without a row; an interval stands in the row of what it is the interval of."""
    return [key for key in metrics if key.removesuffix("_ci") not in documented_metrics()]


def test_every_metric_has_a_row() -> None:
    assert undocumented(ALL) == []
    assert undocumented(COMMITTED) == []
    assert undocumented({"kl": 1.0, "new_ci": [0, 1]}) == ["new_ci"]


def test_every_row_is_a_metric() -> None:
    assert documented_metrics() - {*ALL, *COMMITTED} == set()


def test_every_line_of_the_verdict_has_a_row_in_its_order() -> None:
    rows = rows_of("The lines of the verdict")
    names = [finding.name for finding in verdict(ALL)]
    assert [name for name in rows if name in names] == names


@pytest.mark.parametrize(
    ("row", "quoted"),
    [
        ("held-out loss", ["`learns_log_ratio`"]),
        ("calibration", [f"above {WORST_CALIBRATION:g}"]),
        ("KL from the reference", [f"below {HARDLY_MOVED:g}", f"above {HIGH_KL:g} nats"]),
        ("well-formed answers", [f"at least {WELL_FORMED:.0%}"]),
        ("perplexity of SFT text", [f"above {FORGETS:g} times"]),
        ("reward of chosen answers", ["below 0:", f"entropy below {LESS_ENTROPY:g} times"]),
        ("length of answers", [f"above {LONGER:g} times", f"above {RISING_WITH_LENGTH:g}"]),
        (
            "form of answers",
            [
                f"fall by more than {MORE_UNFINISHED:g}",
                f"rises by more than {MORE_REPETITION:g}",
                f"distinct-2 or entropy is below {LESS_DISTINCT:g} times",
            ],
        ),
    ],
)
def test_thresholds_are_those_of_the_code(row: str, quoted: list[str]) -> None:
    assert LESS_DISTINCT == LESS_ENTROPY  # the page says them in one breath
    assert [words for words in quoted if words not in rows_of("The lines of the verdict")[row]] == []


def test_a_judge_is_doubted_below_the_consistency_that_the_page_names() -> None:
    [limit] = re.findall(r"consistency below ([\d.]+)", rows_of("The lines of the verdict")["the judge"])
    for consistency, status in ((float(limit) - 0.01, "warn"), (float(limit), "plain")):
        finding = judge_quality({**ALL, "judge_agreement_ci": [0.6, 0.8], "judge_consistency": consistency})
        assert finding is not None
        assert finding.status == status


def test_a_smaller_scale_is_cheaper_up_to_the_kl_that_the_page_names() -> None:
    [limit] = re.findall(r"KL is at most ([\d.]+) times", rows_of("The lines of the verdict")["over-optimization"])
    for kl, is_cheaper in ((float(limit), True), (float(limit) + 0.01, False)):
        found = cheaper_step([(1.0, 1.0, result()), (0.5, kl, result())], SAMPLING)
        assert ("cheaper_scale" in found) is is_cheaper


def metrics_with(**changes: Any) -> dict[str, Any]:
    """Metrics of a good run, changed; None takes a metric away."""
    good = {
        "kl": 1.0,
        "kl_ci": [0.9, 1.1],
        "win_rate_ci": [0.6, 0.8],
        "win_rate_lc_ci": [0.6, 0.8],
        "reward_accuracy_ci": [0.7, 0.9],
        "loss": 0.5,
        "loss_ci": [0.4, 0.6],
        "well_formed_dpo": 1.0,
        "num_decided": 100,
        "num_prompts": 100,
    }
    return {key: value for key, value in {**ALL, **good, **changes}.items() if changes.get(key, 0) is not None}


@pytest.mark.parametrize(
    ("changes", "row", "color"),
    [
        ({"kl_estimates_disagree": True}, 0, "red"),
        ({"kl": HARDLY_MOVED / 2, "training": None}, 1, "amber"),
        ({"win_rate": None, "reward_accuracy_ci": [0.1, 0.4]}, 2, "red"),
        ({"win_rate": None}, 3, "green"),
        ({"win_rate": None, "num_prompts": FEWEST - 1}, 4, "amber"),
        ({"win_rate": None, "reward_accuracy_ci": [0.4, 0.6]}, 5, "amber"),
        ({}, 6, "green"),
        ({"win_rate_ci": [0.2, 0.4]}, 7, "red"),
        ({"well_formed_dpo": 0.1, "num_form_decided": 9, "form_win_rate_ci": [0.0, 0.4]}, 7, "red"),
        ({"win_rate": None, "reward_accuracy": None, "auc_ci": [0.6, 0.8], "num_answer_prompts": 100}, 3, "green"),
        ({"num_decided": FEWEST - 1}, 8, "amber"),
        ({"win_rate_ci": [0.4, 0.6]}, 9, "amber"),
    ],
)
def test_headlines_are_those_of_the_code(changes: dict[str, Any], row: int, color: str) -> None:
    table = SECTIONS["The headline"].split("| | headline | |\n|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    assert len(table) == 10
    text, status = headline(metrics_with(**changes))
    assert {"good": "green", "warn": "amber", "bad": "red"}[status] == color
    red = ", ".join(finding.name for finding in verdict(metrics_with(**changes)) if finding.status == "bad")
    shown = text.replace(f": {red}.", ": ... (the red lines by name)") if status == "bad" and row else text
    assert table[row].endswith(f"| {shown} | {color} |")


def test_other_figures_are_those_of_the_code() -> None:
    defaults = EvaluateParams()
    for words in (
        f"σ(\\|m\\|) over {NUM_BINS} bins",
        f"more than {ALARM_STANDARD_ERRORS:g} standard errors",
        f"above {MAX_INVALID_RATE:.0%}",
        f"the model at hand and {_MODELS_KEPT} others",
        f"The default ({defaults.num_prompts} prompts, T = {defaults.temperature:g}, no curve)",
        f"makes {2 * defaults.num_prompts} answers and at most {2 * defaults.num_prompts} judgments",
        API_KEY,
        JUDGE_PATH,
        *(f"`{name}`" for name in (*TEMPLATES, *RULES)),
        f"one line of at most {MAX_SENTENCE_CHARACTERS} characters",
    ):
        assert words in TEXT
    assert (defaults.temperatures, defaults.scales, defaults.opponents) == ([], [], ["sft"])
    assert [kind for kind in get_args(JudgeName)[1:] if f"| `{kind}` |" not in PAGE] == []


def test_the_table_of_powers_is_what_its_command_prints() -> None:
    [code] = re.findall(r'^python -c "\n(.*?)^"$', SECTIONS["How many prompts"], flags=re.MULTILINE | re.DOTALL)
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed
    assert printed in SECTIONS["How many prompts"]
    assert printed.count("\n") == len(re.findall(r"^\| \d", SECTIONS["How many prompts"], flags=re.MULTILINE))


def anchors(path: Path) -> set[str]:
    """What a link may point at, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "examples/smollm2/README.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]


@pytest.mark.parametrize("name", PAGES)
def test_links_point_at_something(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(file), f"{name}: {target}"
