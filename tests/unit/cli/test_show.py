"""One row, as the conversion reads it and as the model sees it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.cli.data_pages import print_row
from dpo_cli.core.data_params import PreferenceSource, SftSource, Source
from dpo_cli.core.params import PairTokenChecks
from dpo_cli.core.text import visible
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.checks import TokenView
from dpo_cli.data.inspect import describe_row
from dpo_cli.data.schema import assistant, content_id, user

PAIR = {"prompt": "2 + 2 =", "chosen": "4", "rejected": "5"}


@pytest.fixture
def view(tokenizer: Any) -> TokenView:
    return TokenView(ChatEncoder(tokenizer), 64, PairTokenChecks().model_dump(), "embedded")


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def source_of(folder: Path, *rows: Any, **settings: Any) -> Source:
    kind = (
        PreferenceSource if any(set(row) - {"instruction", "input", "output", "history"} for row in rows) else SftSource
    )
    return kind(path=str(write(folder, *rows)), **settings)


def printed(found: dict[str, Any], *, whole: bool = False, **options: Any) -> str:
    file = io.StringIO()
    print_row(found, Console(file=file, width=80, highlight=False, **options), whole=whole)
    return file.getvalue()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["data", "show", *arguments])


def test_nothing_is_hidden_and_nothing_steers_the_terminal() -> None:
    assert visible("a\x1b[31m\r\n\tb\u202e\u200bc\x9b") == "a␛[31m␍\n\tb\\u202e\\u200bc\\u009b"
    assert visible("👩‍💻 你好") == "👩‍💻 你好"


# --- without a model ----------------------------------------------------------------------


def test_a_pair_has_its_facts_prompt_and_answers(project: Path) -> None:
    row = {**PAIR, "prompt": "1 + 1 =", "chosen": "2!", "id": 7, "note": None, "lang": "en"}
    found = describe_row(source_of(project, PAIR, row), 1, None)
    [part] = found["parts"]
    assert (found["row"], found["line"], found["format"], found["left_out"]) == (1, 2, "pairs", [])
    assert part["id"] == content_id([user("1 + 1 =")], [assistant("2!")], [assistant("5")])
    assert part["checks"] == {"longer_chosen": "keep"}
    assert "tokens" not in part
    text = printed(found)
    order = ["── user ", "1 + 1 =", "━━ the prompt ends here", "── chosen ", "2!", "── rejected ", "\n5\n"]
    assert [text.index(word) for word in order] == sorted(text.index(word) for word in order)
    assert "longer_chosen (keep)" in text
    assert "not read id, lang" in text
    assert "pairs: 2 of the first 2 rows have prompt" in text


def test_a_ranking_shows_its_answers_best_first_with_rank_and_score(project: Path) -> None:
    row = {"prompt": "q", "completions": ["bad", "good", "same"], "scores": [1, 3, 3]}
    found = describe_row(source_of(project, row), 0, None)
    text = printed(found)
    order = ["answer 1 (rank 1, score 3) ", "\ngood\n", "answer 2 (rank 1, score 3) ", "answer 3 (rank 2, score 1) "]
    assert [text.index(word) for word in order] == sorted(text.index(word) for word in order)
    assert [pair["name"] for pair in found["parts"][0]["pairs"]] == ["answers 1 > 3", "answers 2 > 3"]


def test_parts_of_a_row_are_shown_under_their_names(project: Path) -> None:
    row = {"messages": [{"role": role, "content": text} for role, text in
                        (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]}  # fmt: skip
    source = SftSource(path=str(write(project, row)), turns="all")
    found = describe_row(source, 0, None)
    assert [part["part"] for part in found["parts"]] == ["messages[1]", "messages[3]"]
    text = printed(found)
    assert text.index("part messages[1]") < text.index("part messages[3]")


def test_texts_are_no_markup(project: Path) -> None:
    row = {**PAIR, "prompt": "[bold]x[/bold] :smile: [/]", "chosen": "a" * 200 + "\x1b[2J"}
    text = printed(describe_row(source_of(project, row), 0, None))
    assert "[bold]x[/bold] :smile: [/]\n" in text
    assert "a" * 200 + "␛[2J\n" in text  # in one line, for a pipe


# --- rows that are left out ---------------------------------------------------------------


def test_a_malformed_row_is_shown_raw_and_shortened(project: Path) -> None:
    row = {"prompt": "q", "chosen": 7, "rejected": "x" * 5000, "more": list(range(50))}
    found = describe_row(source_of(project, PAIR, row), 1, None)
    [dropped] = found["left_out"]
    assert (dropped["by"], dropped["part"]) == ("convert-preferences", "")
    assert found["raw"] == row
    text = printed(found)
    assert text.startswith(f"row 1 is left out by convert-preferences: {dropped['reason']}: {dropped['detail']}\n")
    assert '  "chosen": 7,\n' in text
    assert "… (5000 characters)" in text
    assert "… (50 in all)" in text
    assert len(text) < 2000


def test_a_long_prompt_is_shown_by_its_ends(project: Path, view: TokenView) -> None:
    prompt = "begin " + "word " * 2000 + "end"
    found = describe_row(source_of(project, {**PAIR, "prompt": prompt}), 0, view)
    text = printed(found)
    assert f"… {len(prompt) - 2400} characters are left out here; --whole shows them …" in text
    assert f"… {found['parts'][0]['tokens']['prompt']['count'] - 300} tokens are left out here" in text
    assert "begin word" in text
    assert "word end" in text
    text = printed(found, whole=True)
    assert prompt in text
    assert "left out here" not in text


RANKED = {"prompt": "q", "completions": ["a", "b"], "scores": [1, 1]}


@pytest.mark.parametrize(
    ("row", "left_out", "words"),
    [
        ({**PAIR, "rejected": " "}, {"": "empty_rejected"}, "(empty: ' ')"),
        ({**PAIR, "chosen": "half \ud83d"}, {"": "bad_unicode"}, "half \\ud83d"),
        (RANKED, {"": "tie"}, "answer 2 (rank 1, score 1)"),
        ({**RANKED, "completions": ["a", "b", "a"], "scores": [3, 2, 1]}, {"answer 3": "equal_sides"}, "answers 1 > 2"),
        (
            {**RANKED, "completions": ["a", "b", "c " * 80], "scores": [3, 2, 1]},
            {"answers 1 > 3": "over_long", "answers 2 > 3": "over_long"},
            "answers 1 > 2",
        ),
    ],
)
def test_what_is_left_out_of_a_row_is_named_and_shown(
    project: Path, view: TokenView, row: Any, left_out: dict[str, str], words: str
) -> None:
    found = describe_row(source_of(project, {**RANKED, "scores": [1, 2]}, row), 1, view)
    assert {dropped["part"]: dropped["reason"] for dropped in found["left_out"]} == left_out
    assert words in printed(found)


def test_weight_and_max_rows_leave_rows_out(project: Path) -> None:
    source = source_of(project, PAIR, {**PAIR, "prompt": "q"}, weight=1e-9, split="train", max_rows=1)
    assert [dropped["reason"] for dropped in describe_row(source, 0, None)["left_out"]] == ["sampled_out"]
    assert [dropped["reason"] for dropped in describe_row(source, 1, None)["left_out"]] == ["max_rows", "sampled_out"]


# --- with a model -------------------------------------------------------------------------


def test_prompt_and_answers_are_the_very_tokens_of_the_encoder(project: Path, view: TokenView) -> None:
    row = {**PAIR, "prompt": "第一行\n[b]第二行[/b]", "chosen": "好😀\n"}
    found = describe_row(source_of(project, row), 0, view)
    tokens = found["parts"][0]["tokens"]

    def ids(shown: dict[str, Any]) -> list[int]:
        return [token_id for piece in shown["pieces"] for token_id in piece["ids"]]

    prompt = [user(row["prompt"])]
    assert ids(tokens["prompt"]) == view.encoder.encode_prompt(prompt)
    chosen, rejected = tokens["answers"]
    assert ids(chosen) == view.encoder.encode_completion(prompt, [assistant(row["chosen"])])
    assert ids(rejected) == view.encoder.encode_completion(prompt, [assistant("5")])
    assert chosen["count"] == len(ids(chosen))
    assert chosen["with_prompt"] == len(ids(tokens["prompt"])) + len(ids(chosen))
    assert [piece["text"] for piece in chosen["pieces"][-2:]] == ["\n", "<|end|>"]
    text = printed(found)
    assert "\ufffd" not in text
    assert "😀⁴" in text or "😀³" in text or "😀²" in text  # its tokens are counted
    assert "⏎\n│<|end|>⟧" in text  # line ends are visible, and are line ends


def test_what_is_scored_stands_between_brackets_with_its_end(project: Path, view: TokenView) -> None:
    lines = printed(describe_row(source_of(project, {**PAIR, "prompt": "q"}), 0, view)).splitlines()
    prompt = lines.index("<|user|>│q│<|end|>│<|assistant|>")
    boundary = next(number for number, line in enumerate(lines) if "what follows is scored" in line)
    chosen, rejected = lines.index("⟦4│<|end|>⟧"), lines.index("⟦5│<|end|>⟧")
    assert prompt < boundary < chosen < rejected
    assert "tokens   prompt: 4; chosen: 2 (6 with the prompt); rejected: 2 (6 with the prompt)" in lines
    assert "longest  6, within the 64 of max_length" in lines


def test_colors_tell_scored_from_not_scored(project: Path, view: TokenView) -> None:
    found = describe_row(source_of(project, {**PAIR, "prompt": "q"}), 0, view)
    text = printed(found, force_terminal=True, color_system="standard")
    assert "\x1b[36mq\x1b[0m" in text.split("not scored")[1]  # cyan
    assert "\x1b[32m4\x1b[0m" in text.split("not scored")[1]  # green
    assert "\x1b[1;7;32m<|end|>\x1b[0m" in text  # a special token that is scored


def test_special_tokens_within_a_text_are_seen(project: Path, view: TokenView) -> None:
    found = describe_row(source_of(project, {**PAIR, "chosen": "4<|end|>"}), 0, view)
    assert found["parts"][0]["token_checks"] == {"double_eos": "keep"}
    assert found["left_out"] == []
    assert "double_eos (keep)" in printed(found)


def test_a_row_over_max_length_is_left_out_by_its_tokens(project: Path, view: TokenView) -> None:
    found = describe_row(source_of(project, {**PAIR, "chosen": "4 " * 80}), 0, view)
    [dropped] = found["left_out"]
    assert (dropped["by"], dropped["reason"]) == ("precompute-ref", "over_long")
    chosen, rejected = found["parts"][0]["tokens"]["answers"]
    assert (chosen["over_long"], rejected["over_long"]) == (True, False)
    assert dropped["detail"] == f"has {chosen['with_prompt']} tokens, more than 64"
    assert f"longest  {chosen['with_prompt']}, MORE than the 64 of max_length" in printed(found)


def test_a_template_that_refuses_the_messages(project: Path, view: TokenView) -> None:
    view.encoder._rendered = "{{ raise_exception('no system turn') }}"
    found = describe_row(source_of(project, PAIR), 0, view)
    assert [dropped["reason"] for dropped in found["left_out"]] == ["template_refused"]
    assert "none: the row is refused by the model's chat template: no system turn" in printed(found)


# --- the command --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "code", "words"),
    [
        (0, 0, "── chosen "),
        (1, 4, "row 1 is left out by convert-preferences: empty_chosen"),
        (2, 4, "row 2 is left out by convert-preferences: missing_field"),
        (7, 4, "rows.jsonl: --row 7 is beyond its 3 rows, which are counted from 0 to 2"),
    ],
)
def test_the_exit_code_says_whether_the_row_is_taken(project: Path, row: int, code: int, words: str) -> None:
    result = run(str(write(project, PAIR, {**PAIR, "chosen": ""}, {"prompt": "q"})), "--row", str(row))
    assert result.exit_code == code, result.output
    assert words in result.output


def test_json_is_one_object_with_the_tokens(project: Path) -> None:
    path = write(project, PAIR, {**PAIR, "chosen": "half \ud83d"})
    result = run(str(path), "--model", "embedded", "--max-length", "5", "--json")
    assert result.exit_code == 4
    found = json.loads(result.stdout)
    assert found["model"] == {
        "path": "embedded",
        "max_length": 5,
        "bos": None,
        "eos": "<|end|>",
        "end_of_turn": "<|end|>",
        "stops_at": ["<|end|>"],
        "opener": "",
        "warnings": [],
    }
    assert found["parts"][0]["tokens"]["answers"][0]["pieces"][-1] == {"text": "<|end|>", "ids": [1], "special": True}
    assert found["left_out"][0]["reason"] == "over_long"
    half = run(str(path), "--row", "1", "--json")
    assert json.loads(half.stdout)["parts"][0]["answers"][0]["messages"][0]["content"] == "half \ud83d"


def test_a_template_by_its_name(project: Path) -> None:
    result = run(str(write(project, PAIR)), "--model", "embedded", "--template", "plain")
    assert result.exit_code == 0, result.output
    assert "4│<|end|>⟧" in result.stdout
    assert "<|user|>" not in result.stdout


def test_a_project_says_how_long_rows_may_be(project: Path) -> None:
    (project / "params.yaml").write_text("reference:\n  max_length: 5\ndata:\n  checks:\n    longer_chosen: error\n")
    path = write(project, PAIR, {**PAIR, "chosen": "44"})
    result = run(str(path), "--model", "embedded")
    assert result.exit_code == 4
    assert "more than 5" in result.stdout
    result = run(str(path), "--row", "1")
    assert result.exit_code == 4
    assert "longer_chosen (error)" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--template", "plain"], 3, "--template has no effect without --model"),
        (["--max-length", "5"], 3, "--max-length has no effect without --model"),
        (["--model", "embedded", "--template", "none"], 3, "--template must be one of auto, plain"),
        (["--model", "nowhere"], 6, "--model nowhere: there is no such folder"),
        (["--model", "."], 6, "no tokenizer is there"),
    ],
)
def test_options_that_cannot_be(arguments: list[str], code: int, words: str, project: Path) -> None:
    result = run(str(write(project, PAIR)), *arguments)
    assert result.exit_code == code
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_model_folder_without_weights_is_enough(project: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(project / "model")
    result = run(str(write(project, PAIR)), "--model", "model")
    assert result.exit_code == 0, result.output
    assert "⟦4│<|end|>⟧" in result.stdout
