"""Public files convert as docs/public-files.md says, with the quirks that were counted in them by other means.

Without these files, which are no part of the repository, the tests are skipped.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from ruamel.yaml import YAML

from dpo_cli.core.data_params import DataChecks, PreferenceSource, SftSource, Source
from dpo_cli.core.errors import DataError
from dpo_cli.data.account import SPLITS, Conversion
from dpo_cli.data.convert import convert
from dpo_cli.data.plan import Treatment
from tests.public_files import PUBLIC_DATA, digests, needs_public_data

ROOT = Path(__file__).resolve().parents[2]
POLICIES = DataChecks().model_dump()

pytestmark = needs_public_data

_ROW = re.compile(r"^\| ([\w-]+/[^|]+) \|(.*)\|$", re.MULTILINE)


def documented() -> Iterator[Any]:
    """The rows of docs/public-files.md's table."""
    for match in _ROW.finditer((ROOT / "docs" / "public-files.md").read_text(encoding="utf-8")):
        cells = [cell.strip() for cell in match[2].split("|")]
        yield pytest.param(match[1], cells, id=match[1])


def source_of(name: str, settings: str) -> Source:
    given = YAML(typ="safe").load("{" + settings.strip("`") + "}")
    instructions = name.startswith("sft/") or re.search(r"msswift|_sft_|_completion\.", name)
    return (SftSource if instructions else PreferenceSource)(path=str(PUBLIC_DATA / name), **given)


class Converted:
    """A conversion of one file, and its rows."""

    def __init__(self, name: str, settings: str, folder: Path) -> None:
        (folder / "out").mkdir()
        (folder / "work").mkdir()
        self.report: Conversion = convert(
            [source_of(name, settings)],
            Treatment(POLICIES, 0.5, rows_listed=10_000),
            folder / "work",
            folder / "out",
            folder / "rejects.jsonl",
        )
        self.tables = {split: pl.read_parquet(folder / "out" / f"{split}.parquet") for split in SPLITS}
        self.rows = [row for table in self.tables.values() for row in table.to_dicts()]

    def numbers(self, check: str) -> list[int]:
        return [row for _, row in self.report.checks[check].rows]


@pytest.fixture
def converted(tmp_path: Path) -> Callable[..., Converted]:
    """Convert a public file with both splits of equal size."""
    return lambda name, settings="": Converted(name, settings, tmp_path)


def raw(name: str) -> list[Any]:
    """The file's rows, read in the plainest way."""
    data = (PUBLIC_DATA / name).read_bytes()
    text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    return (
        json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.split("\n") if line]
    )


# --- the table ----------------------------------------------------------------------------


def test_every_public_file_is_what_its_list_says_and_in_the_table() -> None:
    listed = digests()
    assert {name: hashlib.sha256((PUBLIC_DATA / name).read_bytes()).hexdigest() for name in listed} == listed
    whole = {name for name in listed if not name.startswith("broken/")}
    assert {name for (name,) in (parameters.values[:1] for parameters in documented())} == whole
    assert len(whole) > 40


@pytest.mark.parametrize(("name", "cells"), documented())
def test_a_public_file_converts_as_documented(name: str, cells: list[str], tmp_path: Path) -> None:
    num_rows, settings, formats, used, left_out, notes, unread = cells
    (tmp_path / "work").mkdir()
    source = source_of(name, settings)
    run = lambda: convert([source], Treatment(POLICIES, 0.1), tmp_path / "work", None, tmp_path / "rejects")  # noqa: E731
    if formats == "refused":
        with pytest.raises(DataError, match="unpaired, as KTO takes them"):
            run()
        return
    report = run()
    assert report.num_read == int(num_rows) == report.num_used + report.num_rejected_rows
    assert ", ".join(report.files[0].formats) == formats
    assert report.num_used == int(used)
    reasons = ", ".join(f"{reason} {count}" for reason, count in report.rejected.items())
    assert f"{report.num_rejected_rows}" + (f" ({reasons})" if reasons else "") == left_out
    found = []
    pairs, rankings = sum(report.num_written.values()), sum(report.num_rankings.values())
    found += [f"{pairs} pairs"] if pairs != report.num_used else []
    found += [f"{rankings} rankings"] if rankings else []
    found += [f"{report.num_ties} tied pairs"] if report.num_ties else []
    found += [
        f"{check} {finding.count}"
        for check, finding in report.checks.items()
        if finding.policy == "keep" and finding.count and check != "longer_chosen"
    ]
    assert ", ".join(found) == notes
    assert report.files[0].unread_text() == unread
    # what is listed adds up: every row left out whole is listed at least once
    listed = [json.loads(line) for line in (tmp_path / "rejects").read_text(encoding="utf-8").splitlines()]
    assert len(listed) == sum(report.rejected.values())
    assert len({reject["row"] for reject in listed if "part" not in reject}) <= report.num_rejected_rows


# --- quirks, counted in the raw files by other means ----------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("sft/llamafactory_alpaca_en_demo.json", 14),
        ("sft/llamafactory_alpaca_zh_demo.json", 8),
        ("sft/oaast_sft_zh.rows0-339.json.gz", 3),
        ("pairs/llamafactory_dpo_en_demo.json.gz", 5),
        ("pairs/llamafactory_dpo_zh_demo.json", 11),
    ],
)
def test_exact_repeats_are_the_duplicates(converted: Callable[..., Converted], name: str, count: int) -> None:
    seen: set[str] = set()
    repeats = []
    for number, row in enumerate(raw(name)):
        text = json.dumps(row, sort_keys=True)
        if text in seen:
            repeats.append(number)
        seen.add(text)
    assert len(repeats) == count
    assert converted(name).numbers("duplicate") == repeats


def test_a_repeat_may_differ_by_an_empty_input(converted: Callable[..., Converted]) -> None:
    name = "sft/hikariming_mixed_schema.first1000.json.gz"
    counts = Counter((row["instruction"], row.get("input") or "", row["output"]) for row in raw(name))
    assert converted(name).report.checks["duplicate"].count == sum(counts.values()) - len(counts) == 12


def test_empty_answers_of_hh_are_named(converted: Callable[..., Converted]) -> None:
    done = converted("pairs/hh_harmless-base_test.rows0-1199.jsonl.gz")
    assert done.numbers("empty_chosen") == [86, 516, 925, 1103]
    assert done.report.checks["longer_chosen"].count == 523


def test_equal_sides_are_named_and_the_output_field_is_never_taken_for_the_chosen_one(
    converted: Callable[..., Converted],
) -> None:
    name = "pairs/raschka_instruction-data-with-preference.json"
    done = converted(name)
    assert done.numbers("equal_sides") == [122, 226, 400, 566, 628, 676]
    chosen = {row["chosen"] for row in raw(name)}
    assert {row["chosen"][0]["content"] for row in done.rows} <= chosen
    assert done.report.checks["longer_chosen"].count == 564


def test_replacement_characters_survive(converted: Callable[..., Converted]) -> None:
    name = "pairs/llamafactory_dpo_zh_demo.json"
    holders = [number for number, row in enumerate(raw(name)) if "\ufffd" in json.dumps(row, ensure_ascii=False)]
    done = converted(name)
    assert done.numbers("replacement_characters") == holders
    assert len(holders) == 6
    assert sum("\ufffd" in json.dumps(row, ensure_ascii=False) for row in done.rows) == 6


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("sft/oaast_sft_zh.rows0-339.json.gz", "", 176),
        ("kwise/oaast_rm_zh.rows0-387.json.gz", "format: kwise", 191),
    ],
)
def test_history_becomes_turns(converted: Callable[..., Converted], name: str, settings: str, count: int) -> None:
    rows = raw(name)
    assert sum(bool(row["history"]) for row in rows) == count
    used = [row for row in rows if row["history"] and (isinstance(row["output"], str) or len(set(row["output"])) > 1)]
    turns = {tuple(text for pair in row["history"] for text in pair) for row in used}
    written = {
        tuple(message["content"] for message in row["prompt"][:-1])
        for row in converted(name, settings).rows
        if len(row["prompt"]) > 1
    }
    assert written == turns


def test_systems_turns_of_the_demos_are_kept(converted: Callable[..., Converted]) -> None:
    name = "pairs/llamafactory_dpo_en_demo.json.gz"
    first = [row["conversations"][0] for row in raw(name)]
    assert sum(turn["from"] == "system" for turn in first) == 80
    seen = {row["prompt"][0]["content"] for row in converted(name).rows if row["prompt"][0]["role"] == "system"}
    assert seen == {turn["value"] for turn in first if turn["from"] == "system"}


def test_pandalm_votes_are_counted_and_empty_answers_lose(converted: Callable[..., Converted]) -> None:
    name = "pairs/pandalm_testset.rows499-998.json.gz"
    rows = raw(name)
    empty = sum(not row["response1"].strip() for row in rows) + sum(not row["response2"].strip() for row in rows)
    assert empty == 21 + 25
    votes = [Counter(row[f"annotator{number}"] for number in (1, 2, 3)).most_common() for row in rows]
    ties = sum(best[0][0] == 0 or (len(best) > 1 and best[0][1] == best[1][1]) for best in votes)
    done = converted(name)
    assert done.report.checks["tie"].count == ties == 21
    assert done.report.checks["empty_rejected"].count == empty
    assert done.report.checks["contradiction"].count == 0


@pytest.mark.parametrize(("name", "longer"), [("llmbar_Natural", 56), ("llmbar_Adversarial_Neighbor", 16)])
def test_llmbar_labels_name_the_winner(converted: Callable[..., Converted], name: str, longer: int) -> None:
    rows = raw(f"pairs/{name}.json")
    winners = {(row["input"], row[f"output_{row['label']}"], row[f"output_{3 - row['label']}"]) for row in rows}
    done = converted(f"pairs/{name}.json")
    columns = ("prompt", "chosen", "rejected")
    assert {tuple(row[column][0]["content"] for column in columns) for row in done.rows} == winners
    assert done.report.checks["longer_chosen"].count == longer


def test_booleans_give_every_decidable_pair_once(converted: Callable[..., Converted]) -> None:
    name = "kwise/gsm8k_model_solutions.rows0-659.jsonl.gz"
    models = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    right = [sum(row[model]["is_correct"] for model in models) for row in raw(name)]
    assert Counter(right) == {0: 219, 1: 145, 2: 113, 3: 95, 4: 88}
    settings = next(parameters.values[1][1] for parameters in documented() if parameters.values[0] == name)
    done = converted(name, settings)
    assert sum(num * (4 - num) for num in right) == 1172
    # four rows say the same twice: the worse one is left out, and with it the pairs it would be in
    pairs = equal = 0
    for row in raw(name):
        answers = sorted((row[model] for model in models), key=lambda answer: not answer["is_correct"])
        first = {answer["solution"].strip(): answer["is_correct"] for answer in reversed(answers)}
        equal += 4 - len(first)
        pairs += sum(first.values()) * (len(first) - sum(first.values()))
    assert equal == 4
    assert len(done.rows) == pairs == 1169
    assert done.report.num_items == pairs + 219 + 88 + equal
    assert {(row["chosen_score"], row["rejected_score"]) for row in done.rows} == {(1.0, 0.0)}


def test_pairwise_verdicts_give_the_decided_pairs(converted: Callable[..., Converted]) -> None:
    name = "kwise/finegrained_qa_feedback.rows0-99.json.gz"
    verdicts = Counter(verdict for row in raw(name) for verdict in row["preference"])
    assert verdicts == {0: 44, 1: 378, 2: 178}
    done = converted(name)
    assert len(done.rows) == 378 + 178
    assert done.report.num_ties == 44
    row = raw(name)[0]
    texts = {(chosen["chosen"][0]["content"], chosen["rejected"][0]["content"]) for chosen in done.rows}
    assert row["preference"] == [0, 1, 2, 1, 0, 2]
    assert (row["prediction 1"], row["prediction 3"]) in texts  # verdict 2 of the order 1-2, 1-3, ...
    assert (row["prediction 4"], row["prediction 1"]) in texts
    assert (row["prediction 4"], row["prediction 3"]) in texts


def test_a_list_in_order_is_read_best_first(converted: Callable[..., Converted]) -> None:
    name = "kwise/oaast_rm_zh.rows0-387.json.gz"
    sizes = Counter(len(row["output"]) for row in raw(name))
    assert sizes == {2: 210, 3: 132, 4: 39, 5: 6, 6: 1}
    done = converted(name, "format: kwise")
    distinct = [len({answer.strip() for answer in row["output"]}) for row in raw(name)]
    assert done.report.num_items == sum(size * (size - 1) // 2 for size in distinct) + 4
    assert done.report.checks["equal_sides"].count == 4
    orders = {tuple(row["output"]) for row in raw(name)}
    pairs = {(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in done.rows}
    assert all(any(o.index(c) < o.index(r) for o in orders if c in o and r in o) for c, r in pairs)


def test_ranked_nodes_of_a_tree_are_rankings(converted: Callable[..., Converted]) -> None:
    name = "kwise/openassistant_en_100_tree.jsonl.gz"
    sizes: Counter[int] = Counter()
    unranked = 0
    waiting = [row["prompt"] for row in raw(name)]
    while waiting:
        node = waiting.pop()
        answers = [reply for reply in node["replies"] if reply["role"] == "assistant"]
        if len(answers) > 1:
            sizes[len(answers)] += 1
            unranked += any(reply.get("rank") is None for reply in answers)
        waiting += node["replies"]
    assert (sum(sizes.values()), unranked) == (214, 3)
    done = converted(name)
    assert sum(done.report.num_rankings.values()) == 212
    assert done.report.rejected == {"no_rank": 3}
