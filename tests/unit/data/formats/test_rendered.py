"""Texts that chat templates made: taken apart into the very messages they were made of, or left alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dpo_cli.data.formats.rendered import unwrap
from dpo_cli.data.schema import Messages, PreferenceExample, RankingExample, SftExample, assistant, user

SYSTEM = {"role": "system", "content": "be kind"}
Q, A, B = user("q:\n  two lines"), assistant("    indented()\n\nend"), assistant("b")

TEMPLATES = {
    "ChatML": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "Llama 3": "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "Gemma": "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "Zephyr": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "DeepSeek": "<｜begin▁of▁sentence｜>{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}",
    "Llama 2": "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] "
    "{% if loop.index0 == 1 and messages[0].role == 'system' %}<<SYS>>\n{{ messages[0].content }}\n<</SYS>>\n\n"
    "{% endif %}"
    "{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }} </s>{% endif %}{% endfor %}",
    "Alpaca": "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n{% else %}### Response:\n{{ m.content }}</s>\n\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}",
    "Vicuna": "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}"
    "USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "plain": "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}",
}


def render(name: str, messages: Messages, *, is_open: bool = False) -> str:
    template = ImmutableSandboxedEnvironment().from_string(TEMPLATES[name])
    return template.render(messages=messages, add_generation_prompt=is_open)


def plainer(messages: Messages) -> Messages:
    """Messages without what a template by words cannot keep: white space at their ends."""
    return [{**message, "content": message["content"].strip()} for message in messages]


CONVERSATIONS = [[Q, A], [SYSTEM, Q, A], [Q, A, Q, B], [SYSTEM, user("1"), assistant("2"), user("3"), A]]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_rendered_conversation_is_the_messages_it_was_made_of(name: str, messages: Messages) -> None:
    exact = name in ("ChatML", "Llama 3", "Gemma", "Zephyr", "DeepSeek")
    found = unwrap(render(name, messages))
    assert found is not None
    assert (found.template, found.is_open) == (name, False)
    assert (found.turns if exact else plainer(found.turns)) == (messages if exact else plainer(messages))
    opened = unwrap(render(name, messages[:-1], is_open=True))
    assert opened is not None
    assert (opened.is_open, plainer(opened.turns)) == (True, plainer(messages[:-1]))


@pytest.mark.parametrize(
    "text",
    [
        "What does <|im_start|>user mean?",
        "<|im_start|>user\nq<|im_end|> and more<|im_start|>assistant\na<|im_end|>",
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>narrator\na<|im_end|>",
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|> and more",
        "### Instruction:\nhow to",
        "User: name of the user",
        "The Assistant: a film",
        "USER: what is an ASSISTANT: good for? ASSISTANT:",
        "USER: the word USER: in a sentence ASSISTANT:",
        "USER: say ASSISTANT: twice USER: please ASSISTANT:",
        "### Instruction:\nq\n\n### Response:\na\n\n### Response:\nb",
        "a [INST] b",
        "",
    ],
)
def test_a_text_that_is_no_whole_conversation_is_left_alone(text: str) -> None:
    assert unwrap(text) is None


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"Llama 2"}))
def test_pairs_of_rendered_texts_are_the_pairs_they_were_made_of(name: str, auto: Callable[..., Any]) -> None:
    """The prompt apart and bare or marked answers, or whole conversations on both sides."""
    prompt, a, b = [SYSTEM, user("q")], assistant("a"), assistant("b")
    whole = {"chosen": render(name, [*prompt, a]), "rejected": render(name, [*prompt, b])}
    opened = render(name, prompt, is_open=True)
    rows = [whole, {"prompt": opened, "chosen": "a", "rejected": "b"}, {"prompt": opened, **whole}]
    if whole["chosen"].startswith(opened):
        rows.append({"prompt": opened, **{side: text.removeprefix(opened) for side, text in whole.items()}})
    for row in rows:
        read = auto(row, unwrap=True)
        stripped = PreferenceExample(plainer(read.only.prompt), plainer(read.only.chosen), plainer(read.only.rejected))
        assert stripped == PreferenceExample(prompt, [a], [b]), row


def test_llama_2_pairs(auto: Callable[..., Any]) -> None:
    row = {"prompt": "<s>[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nq [/INST]", "chosen": " a </s>", "rejected": " b </s>"}
    read = auto(row, unwrap=True).only
    assert PreferenceExample(read.prompt, plainer(read.chosen), plainer(read.rejected)) == PreferenceExample(
        [SYSTEM, user("q")], [assistant("a")], [B]
    )


def test_rankings_outputs_and_instructions_are_taken_apart_too(auto: Callable[..., Any]) -> None:
    prompt = [SYSTEM, user("q")]
    opened, end = render("ChatML", prompt, is_open=True), "<|im_end|>"
    a, b = [assistant("a")], [assistant("b")]
    ranked = {"prompt": opened, "completions": [f"b{end}", f"a{end}\n"], "ranks": [2, 1]}
    assert auto(ranked, unwrap=True).only == RankingExample(prompt, [a, b], [1, 2])
    two = {"prompt": opened, "output_1": f"b{end}", "output_2": f"a{end}", "label": "b"}
    labels = {"b": "second"}
    assert auto(two, unwrap=True, labels=labels).only == PreferenceExample(prompt, a, b)
    for row in (
        {"instruction": opened, "output": f"a{end}"},
        {"prompt": opened, "completion": f"a{end}"},
        {"messages": render("ChatML", [*prompt, *a])},
    ):
        assert auto(row, kind="sft", unwrap=True).only == SftExample(prompt, a)
    mapped = auto({"text": render("Zephyr", [*prompt, *a])}, kind="sft", columns={"messages": "text"}, unwrap=True)
    assert mapped.only == SftExample(prompt, a)
    assert mapped.unwrapped == {"Zephyr": 1}


OPENED = "### Instruction:\nSolve.\n\n### Input format\nOne line n.\n\n### Response:\n"


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (OPENED, "Solve.\n\n### Input format\nOne line n."),
        ("### Instruction:\nq ### Response: r\n\n### Response:\n", "q ### Response: r"),
        ("### Instruction\nq\n\n### Response time\nr\n\n### Response\n", "q\n\n### Response time\nr"),
        ("### Instruction:\nq\n\n### Input:\ni\n\n### Response:", "q\ni"),
        ("### Human: q### Assistant:", "q"),
        ("USER: q\nASSISTANT:", "q"),
    ],
)
def test_a_heading_or_a_word_of_a_sentence_begins_no_turn(text: str, prompt: str) -> None:
    found = unwrap(text)
    assert found is not None
    assert (found.turns, found.is_open) == ([user(prompt)], True)


def test_no_heading_of_an_answer_is_lost_beside_a_prompt_that_is_taken_apart(auto: Callable[..., Any]) -> None:
    answers = {"chosen": "# T\n### Response time\nshort</s>", "rejected": "### Response time\nabc"}
    found = auto({"prompt": OPENED, **answers}, unwrap=True).only
    assert (found.chosen, found.rejected) == (
        [assistant("# T\n### Response time\nshort")],
        [assistant(answers["rejected"])],
    )
    whole = {name: f"{OPENED}{text}" for name, text in answers.items()}
    assert auto(whole, unwrap=True).only == found
    kept = {"prompt": "USER: q is what an ASSISTANT: says", "chosen": "a", "rejected": "b"}
    assert auto(kept, unwrap=True).only == PreferenceExample([user(kept["prompt"])], [assistant("a")], [B])


def test_a_users_turn_that_is_a_rendered_conversation_is_taken_apart(auto: Callable[..., Any]) -> None:
    prompt = [SYSTEM, user("q")]
    asked, a, b = user(render("ChatML", prompt, is_open=True)), assistant("a<|im_end|>"), assistant("b")
    pair = PreferenceExample(prompt, [assistant("a")], [B])
    rows: list[dict[str, Any]] = [
        {"prompt": [asked], "chosen": [a], "rejected": [b]},
        {"prompt": asked, "chosen": a, "rejected": "b"},
        {"prompt": [asked], "chosen": "a<|im_end|>", "rejected": [b]},
        {"chosen": [asked, a], "rejected": [asked, b]},
        {"conversations": [asked], "chosen": {"from": "gpt", "value": a["content"]}, "rejected": b},
        {"input": {"messages": [asked]}, "preferred_output": [a], "non_preferred_output": [b]},
    ]
    for row in rows:
        assert auto(row, unwrap=True).found == [pair]
    ranked = {"prompt": [asked], "completions": [{"text": a["content"], "score": 1}, {"text": "b", "score": 0}]}
    assert auto(ranked, unwrap=True).only.pair(0, 1) == replace(pair, chosen_score=1.0, rejected_score=0.0)
    second = user(render("ChatML", [user("r")], is_open=True))
    read = auto({"messages": [asked, a, second, b]}, kind="sft", unwrap=True)
    assert (read.only, read.unwrapped) == (SftExample([*prompt, assistant("a"), user("r")], [B]), {"ChatML": 1})
    again = user(render("ChatML", [*prompt, assistant("a"), user("r")], is_open=True))
    for turns in ([asked, a, again, b], [asked, a, user("r"), b], [user(render("ChatML", [*prompt, a])), b]):
        assert auto({"messages": turns}, kind="sft", unwrap=True).unwrapped == {}


def test_without_the_setting_texts_stay_as_they_are(auto: Callable[..., Any]) -> None:
    opened = render("ChatML", [user("q")], is_open=True)
    read = auto({"prompt": opened, "chosen": "a<|im_end|>", "rejected": "b"})
    assert read.only == PreferenceExample([user(opened)], [assistant("a<|im_end|>")], [B])
    assert read.unwrapped == {}
