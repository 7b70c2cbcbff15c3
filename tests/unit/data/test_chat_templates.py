"""Templates of the kinds that real models bring: where the answer begins, what it shows, how it ends.

They are short, and do what the models' own do in what matters here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dpo_cli.core.errors import MachineError, ParamsError
from dpo_cli.core.params import PairTokenChecks
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.checks import TokenView, check_tokens
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import (
    PREFERENCE_SCHEMA,
    Messages,
    PreferenceExample,
    assistant,
    full_schema,
    table_of,
    user,
    with_tools,
)
from dpo_cli.data.tokenize import TokenTable, tokenize_table

SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = '[{"type":"function","function":{"name":"add"}}]'
CALL = '[{"type":"function","function":{"name":"add","arguments":{"x":2}}}]'

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# no generation prompt, as in templates of early ChatML models
CHATML_BARE = CHATML.partition("{% if add_generation_prompt %}")[0]
# tools in the system turn, calls between tags, tool turns as the user's
QWEN2 = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n{{ m.content or '' }}"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# reasoning in a field or in the text; a thought, perhaps an empty one, before the last answer; none is asked for
# where thinking is off
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set text = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in text %}{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ text }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# a thought between tags where there is one, and an empty one in the generation prompt where thinking is off
TAGGED = (
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% else %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
# the generation prompt opens a thought, answers are cut behind it
R1 = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}"
    "<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
# answers are cut behind a thought, the generation prompt opens none
QWQ = R1.replace("<think>\n", "")
# the generation prompt opens a thought, and answers stand as they are
OPENED = R1.replace(".split('</think>')[-1]", "")
# a thought is opened before every answer, whatever it says itself
DOUBLED = OPENED.replace("<|Assistant|>{{", "<|Assistant|><think>\n{{")
LLAMA3 = (
    "{% for m in messages %}<|User|>{{ m.role }}<|Assistant|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|User|>assistant<|Assistant|>\n\n{% endif %}"
)
# the system prompt goes into the last user turn, where that ends the conversation; there is no generation prompt
MISTRAL = (
    "{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ system if loop.last else '' }}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
GEMMA2 = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|User|>", "<|Assistant|>", "<|eot|>", "<|/call|>"]


@pytest.fixture
def encoder(tokenizer: Any) -> Callable[..., ChatEncoder]:
    """``encoder(template, ...)``: a template on a tokenizer that has its tokens."""

    def make(template: str, **settings: Any) -> ChatEncoder:
        own = copy.deepcopy(tokenizer)
        own.add_special_tokens({"additional_special_tokens": SPECIAL})
        own.chat_template = template
        return ChatEncoder(own, **settings)

    return make


def seen(encoder: ChatEncoder, prompt: Messages, *answers: Messages) -> tuple[str, ...]:
    """Prompt and answers as the model sees them."""
    found = encoder.encode(prompt, answers)
    return tuple(encoder.tokenizer.decode(ids) for ids in (found.prompt, *found.completions))


def checked(encoder: ChatEncoder, prompt: Messages, *answers: Messages) -> list[str]:
    """The checks that a row fails."""
    return check_tokens(encoder, prompt, answers, encoder.encode(prompt, answers))


def thought(reasoning: str, text: str) -> Messages:
    return [{**assistant(text), "reasoning_content": reasoning}]


Q, A, B = [user("q")], [assistant("5")], [assistant("6")]


# --- where the answer begins --------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "prompt", "answer"),
    [
        (CHATML, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "5<|im_end|>"),
        (QWEN2, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "5<|im_end|>"),
        (QWEN3, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "5<|im_end|>"),
        (R1, "<|User|>q<|Assistant|>", "5<|im_end|>"),
        (QWQ, "<|User|>q<|Assistant|>", "5<|im_end|>"),
        (LLAMA3, "<|User|>user<|Assistant|>\n\nq<|eot|><|User|>assistant<|Assistant|>\n\n", "5<|eot|>"),
        (MISTRAL, "[INST] q[/INST]", " 5<|im_end|>"),
        (GEMMA2, "<|im_start|>user\nq<|im_end|>\n<|im_start|>model\n", "5<|im_end|>"),
    ],
    ids=["chatml", "qwen2", "qwen3", "r1", "qwq", "llama3", "mistral", "gemma2"],
)
def test_what_stands_before_every_answer_is_prompt(template: str, prompt: str, answer: str, encoder: Any) -> None:
    made = encoder(template)
    assert seen(made, Q, A, B) == (prompt, answer, answer.replace("5", "6"))
    assert made.tokenizer.decode(made.encode_prompt(Q)).startswith(prompt)
    assert checked(made, Q, A, B) == []


def test_a_thought_that_one_side_has_is_no_part_of_the_prompt(encoder: Any) -> None:
    made = encoder(QWEN3)
    assert seen(made, Q, thought("sum", "5"), B) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
        "<think>\nsum\n</think>\n\n5<|im_end|>",
        "<think>\n\n</think>\n\n6<|im_end|>",
    )
    in_text = [assistant("<think>\nsum\n</think>\n\n5")]
    assert seen(made, Q, in_text, B) == seen(made, Q, thought("sum", "5"), B)
    assert checked(made, Q, in_text, B) == checked(made, Q, thought("sum", "5"), B) == []


def test_thinking_that_is_switched_off_is_off_in_the_template_that_is_saved(encoder: Any) -> None:
    made = encoder(QWEN3, options={"enable_thinking": False})
    assert made.warnings == []
    assert made.opener == ""
    prompt = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert seen(made, Q, A) == (prompt, "5<|im_end|>")
    served = copy.deepcopy(made.tokenizer)
    served.chat_template = made.template
    told = {"tokenize": False, "add_generation_prompt": True}
    assert served.apply_chat_template(Q, **told) == prompt
    assert served.apply_chat_template(Q, enable_thinking=True, **told) == prompt.replace("<think>\n\n</think>\n\n", "")


@pytest.mark.parametrize(
    ("template", "header", "block"),
    [
        (QWEN3, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "<think>\n{}\n</think>\n\n"),
        (TAGGED, "<|User|>q<|Assistant|>", "<think>{}</think>"),
        (TAGGED.replace("<think></think>", "</think>"), "<|User|>q<|Assistant|>", "<think>{}</think>"),
    ],
    ids=["a block", "without line ends", "a closing alone"],
)
def test_a_thought_is_scored_from_its_beginning_where_the_generation_prompt_closes_one(
    template: str, header: str, block: str, encoder: Any
) -> None:
    made = encoder(template, options={"enable_thinking": False})
    one, other = thought("sum", "5"), thought("no", "6")
    assert seen(made, Q, one, other) == (
        header,
        f"{block.format('sum')}5<|im_end|>",
        f"{block.format('no')}6<|im_end|>",
    )
    assert checked(made, Q, one, other) == []
    for rows in ([one, B], [B, one]):
        found = made.encode(Q, rows)
        wholes = [made.render(Q + answer).removesuffix("\n") for answer in rows]
        assert [f"{found.prompt_text}{text}".removesuffix("\n") for text in found.texts] == wholes
        assert found.prompt_text == header
    assert seen(made, Q, A, B)[1:] == ("5<|im_end|>", "6<|im_end|>")


def test_a_thought_is_scored_behind_a_prompt_that_is_written_otherwise_before_an_answer(encoder: Any) -> None:
    closed = MISTRAL.replace("[/INST]{% elif", "[/INST]{{ '<think></think>' if loop.last }}{% elif").replace(
        " {{ m.content }}<|im_end|>", "<think>{{ m.reasoning_content }}</think>{{ m.content }}<|im_end|>"
    )
    assert seen(encoder(closed), [SYSTEM, *Q], thought("sum", "5"), B) == (
        "[INST] Be brief.\n\nq[/INST]",
        "<think>sum</think>5<|im_end|>",
        "<think></think>6<|im_end|>",
    )


def test_an_opener_that_the_generation_prompt_lacks_is_told(encoder: Any) -> None:
    assert [warning for warning in encoder(QWEN3).warnings if "enable_thinking" in warning]
    assert encoder(R1).warnings == [
        "the model's chat template ends its generation prompt with '<think>\\n', with which its answers do not begin:"
        " answers that do are trained as they are generated, others begin before it"
    ]


def test_an_answer_goes_on_from_the_thought_that_the_generation_prompt_opens(encoder: Any) -> None:
    """As the model generates it: the opener once, in the prompt, and the reasoning scored."""
    for template in (R1, OPENED):
        made = encoder(template)
        for text in ("<think>\nsum\n</think>5", "<think>sum\n</think>5"):
            found = seen(made, Q, [assistant(text)], [assistant(text.replace("5", "6"))])
            assert found[0] == "<|User|>q<|Assistant|><think>\n"
            assert found[1:] == ("sum\n</think>5<|im_end|>", "sum\n</think>6<|im_end|>")
            assert checked(made, Q, [assistant(text)]) == []


def test_a_template_without_a_generation_prompt_gets_one(encoder: Any) -> None:
    made = encoder(CHATML_BARE)
    assert "no generation prompt; '<|im_start|>assistant\\n'" in made.warnings[0]
    with_one = encoder(CHATML)
    assert with_one.warnings == encoder(MISTRAL).warnings == []
    assert seen(made, Q, A, B) == seen(with_one, Q, A, B)
    served = copy.deepcopy(made.tokenizer)
    served.chat_template = made.template
    asked = served.apply_chat_template(Q, tokenize=False, add_generation_prompt=True)
    assert asked.endswith("q<|im_end|>\n<|im_start|>assistant\n")


def test_a_prompt_that_is_written_otherwise_before_an_answer_is_the_one_that_generation_sees(encoder: Any) -> None:
    made = encoder(MISTRAL)
    assert seen(made, [SYSTEM, *Q], A) == ("[INST] Be brief.\n\nq[/INST]", " 5<|im_end|>")
    assert checked(made, [SYSTEM, *Q], A) == []


# --- what is lost -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "prompt", "answers", "found"),
    [
        (QWQ, Q, [[assistant("<think>a</think>54")], [assistant("<think>b</think>54")]], ["lost_text", "equal_sides"]),
        (R1, Q, [[assistant("<think>a</think>54")], B], ["lost_text"]),
        (DOUBLED, Q, [[assistant("<think>a</think>5")]], ["doubled_opener"]),
        (CHATML, with_tools(Q, TOOLS), [A], ["tools_not_shown"]),
        (QWEN2, with_tools(Q, TOOLS), [A], []),
        (CHATML, Q, [[{**assistant(""), "tool_calls": CALL}], B], ["tools_not_shown"]),
        (QWEN2, Q, [[{**assistant(""), "tool_calls": CALL}], B], []),
        (CHATML, [*Q, {**assistant(""), "tool_calls": CALL}, {"role": "tool", "content": "4"}], [A],
         ["tools_not_shown"]),
        (CHATML, Q, [thought("sum", "5"), B], ["reasoning_not_shown"]),
        (QWEN3, [*Q, *thought("sum", "5"), user("r")], [A], []),
        (MISTRAL, [*Q, *A, {"role": "tool", "content": "4"}], [B], ["lost_text"]),
        (LLAMA3, Q, [[assistant(" 5")], [assistant("5 ")]], ["equal_sides"]),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_model_would_not_see_is_found(
    template: str, prompt: Messages, answers: list[Messages], found: list[str], encoder: Any
) -> None:
    assert checked(encoder(template), prompt, *answers) == found


def test_an_end_of_turn_that_is_the_unknown_token_too_is_no_lost_text(encoder: Any) -> None:
    """As GPT-2, OPT and Pythia have it."""
    made = encoder(CHATML)
    own = made.tokenizer
    own.unk_token = "<|im_end|>"
    for tokenizer, template in ((own, "auto"), (own, "plain")):
        made = ChatEncoder(tokenizer, template)
        assert checked(made, Q, A, B) == []
        assert checked(made, Q, [assistant("𒀀 5")]) == []


@pytest.mark.parametrize("unknown", ["<unk>", "<|im_end|>"])
def test_text_for_which_the_tokenizer_has_no_token_is_lost(unknown: str) -> None:
    """Also where the unknown token ends the turn, and where it would be the answer's last one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys(["<unk>", "<|im_end|>", "user", "assistant", "question", "answer", "q", "5", "6", "and"])
    base = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token=unknown))
    base.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    own = PreTrainedTokenizerFast(tokenizer_object=base, unk_token=unknown, eos_token="<|im_end|>")
    own.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    made = ChatEncoder(own)
    assert checked(made, Q, A, B) == []
    for lost in ("和 5", "5 和", "5 和 6", "5 <|im_end|> 和"):
        assert "lost_text" in checked(made, Q, [assistant(lost)])
    assert "lost_text" not in checked(made, Q, [assistant(f"5 {unknown} 6")])


def test_such_rows_are_left_out_by_name_with_what_helps(tmp_path: Path, encoder: Any) -> None:
    examples = [
        PreferenceExample(with_tools(Q, TOOLS), A, B),
        PreferenceExample(Q, thought("sum", "5"), B),
        PreferenceExample(Q, A, B),
    ]
    rows = [{**example.row(""), "tools": example.prompt[0].get("tools")} for example in examples]
    path = tmp_path / "train.parquet"
    pq.write_table(table_of(rows, full_schema(PREFERENCE_SCHEMA)), path)

    def table(template: str, **policies: str) -> TokenTable:
        view = TokenView(encoder(template), 99, PairTokenChecks().model_dump() | policies)
        return tokenize_table(path, ("chosen", "rejected"), view, "run: x")

    left = table(CHATML)
    assert [(reject["row"], reject["reason"]) for reject in left.rejects] == [
        (0, "tools_not_shown"),
        (1, "reasoning_not_shown"),
    ]
    assert "set the check to keep" in left.rejects[1]["detail"]
    assert table(CHATML, reasoning_not_shown="keep").found == {"reasoning_not_shown": [1]}
    assert [reject["row"] for reject in table(QWEN3).rejects] == [0]
    assert left.prompts == {examples[2].row("")["group"]: Q}


def test_calls_reach_the_template_as_objects(encoder: Any) -> None:
    prompt = with_tools([*Q, {**assistant(""), "tool_calls": CALL}, {"role": "tool", "content": "4"}], TOOLS)
    text, _ = seen(encoder(QWEN2), prompt, A)
    assert json.loads(text.split("system\n")[1].split("<|im_end|>")[0]) == json.loads(TOOLS)
    assert json.loads(text.split("<tool_call>")[1].split("</tool_call>")[0]) == {"name": "add", "arguments": {"x": 2}}


# --- how it ends --------------------------------------------------------------------------


def test_generation_stops_at_the_end_tokens_of_template_tokenizer_and_model(encoder: Any) -> None:
    tokenizer = encoder(LLAMA3).tokenizer
    other = tokenizer.convert_tokens_to_ids("<|/call|>")
    made = encoder(LLAMA3, end_ids=[other])
    assert tokenizer.convert_ids_to_tokens(made.end_id) == "<|eot|>"
    assert made.stop_ids == sorted([made.end_id, tokenizer.eos_token_id, other])


def test_an_answer_that_ends_in_a_special_token_of_its_own_keeps_its_end_of_turn(encoder: Any) -> None:
    answer = [assistant("<tool>add<|/call|>")]
    assert seen(encoder(CHATML), Q, answer)[1] == "<tool>add<|/call|><|im_end|>"
    assert checked(encoder(CHATML), Q, answer) == []


# --- what cannot be used ------------------------------------------------------------------


def test_a_refusal_has_the_templates_words_and_a_way_out(encoder: Any) -> None:
    with pytest.raises(RowProblem, match="System role not supported; say model.system: fold"):
        encoder(GEMMA2).encode_prompt([SYSTEM, *Q])
    with pytest.raises(RowProblem, match="must alternate; two turns of the user follow each other"):
        encoder(GEMMA2).encode_prompt([*Q, *Q])
    made = encoder(GEMMA2, system="fold")
    assert seen(made, [SYSTEM, *Q], A)[0] == ("<|im_start|>user\nBe brief.\n\nq<|im_end|>\n<|im_start|>model\n")
    assert checked(made, [SYSTEM, *Q], A) == []


def test_an_option_that_the_template_does_not_read_is_refused(encoder: Any) -> None:
    with pytest.raises(ParamsError, match=r"model\.template_options\.enable_thinking has no effect"):
        encoder(CHATML, options={"enable_thinking": False})


def test_chatml_needs_its_tokens(tokenizer: Any) -> None:
    with pytest.raises(MachineError, match=r"writes <\|im_start\|> and <\|im_end\|>, which .* set it to plain"):
        ChatEncoder(tokenizer, "chatml")


def test_an_end_of_turn_in_letters_is_told(tokenizer: Any) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = CHATML
    assert "ends a turn with <|im_end|>, which its tokenizer does not have" in ChatEncoder(own).warnings[0]
