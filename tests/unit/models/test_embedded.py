"""The embedded model: made from code, the same every time, and blind to what is held out."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from dpo_cli.core.params import WORLD_HELD_OUT
from dpo_cli.data import world
from dpo_cli.data.schema import split_position, user
from dpo_cli.models import embedded
from dpo_cli.models.embedded import build_model, build_tokenizer, pretraining_loss

# --- tokenizer ----------------------------------------------------------------------------


def test_the_tokenizer_is_the_same_every_time(tokenizer: Any) -> None:
    assert build_tokenizer().backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_every_word_of_the_world_is_one_token(tokenizer: Any) -> None:
    split = [word for word in world.words() if len(tokenizer(word, add_special_tokens=False)["input_ids"]) != 1]
    assert split == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        "Tom has 5 cats.",
        "小明有21本书。",
        "naïve 😀 \u200b\t\r\n  x",
        "12345",
        "中" * 3,
        "a<|end|>b",
        "\x00",
    ],
)
def test_any_text_comes_back_as_it_was(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < len(tokenizer)


def test_special_tokens_are_one_token_each(tokenizer: Any) -> None:
    names = [embedded.PAD, embedded.END, embedded.SYSTEM, embedded.USER, embedded.ASSISTANT]
    assert [tokenizer(name, add_special_tokens=False)["input_ids"] for name in names] == [[i] for i in range(5)]
    assert (tokenizer.pad_token, tokenizer.eos_token) == (embedded.PAD, embedded.END)
    assert {embedded.END, embedded.PAD} <= set(tokenizer.all_special_tokens)


# --- model --------------------------------------------------------------------------------


def test_widths_suit_4_bit_blocks(tokenizer: Any) -> None:
    model = build_model(tokenizer, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) < 3e6
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
            assert (module.in_features % 64, module.out_features % 64) == (0, 0)


# --- what it reads ------------------------------------------------------------------------


def examples(tokenizer: Any, step: int, count: int, num_steps: int = 100) -> list[tuple[list[int], list[int]]]:
    return list(islice(embedded._examples(tokenizer, 0, step, num_steps), count))


def test_no_prompt_that_may_be_held_out_is_ever_read(tokenizer: Any) -> None:
    prompts = set()
    for step in range(90, 100):
        for prompt, _ in examples(tokenizer, step, 100):
            text = tokenizer.decode(prompt[1:-2])
            assert world.task_of(text) is not None
            assert split_position([user(text)]) >= WORLD_HELD_OUT
            prompts.add(text)
    assert len(prompts) > 800


def test_examples_are_answers_good_and_bad_in_the_chat_format(tokenizer: Any) -> None:
    rewards = []
    for prompt, answer in examples(tokenizer, 99, 400):
        task = world.task_of(tokenizer.decode(prompt[1:-2]))
        assert task is not None
        assert tokenizer.apply_chat_template([user(task.prompt)], add_generation_prompt=True, tokenize=False) == (
            tokenizer.decode(prompt)
        )
        assert answer[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(answer[:-1])
        assert text in (task.good, *task.bad)
        rewards.append(task.reward(text))
    assert 0.4 < sum(rewards) / len(rewards) < 0.6


def test_only_early_steps_copy_random_strings(tokenizer: Any) -> None:
    def num_copies(step: int) -> int:
        found = examples(tokenizer, step, 300)
        return sum(prompt[1:-2] == answer[:-1] and len(answer) > 4 for prompt, answer in found)

    assert num_copies(0) > 20
    assert num_copies(39) > 20
    assert num_copies(40) < 3


def test_packed_rows_do_not_see_each_other(tokenizer: Any) -> None:
    """The loss of a packed batch is that of its examples, each read alone."""
    model = build_model(tokenizer, seed=0).eval()
    pairs = examples(tokenizer, 99, 12)
    with torch.no_grad():
        packed = pretraining_loss(model, [pairs[row :: embedded._ROWS] for row in range(embedded._ROWS)])
        total, count = 0.0, 0
        for prompt, answer in pairs:
            logps = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            begin = len(prompt) - 1
            total -= sum(logps[begin + i, token].item() for i, token in enumerate(answer))
            count += len(answer)
    assert packed.item() == pytest.approx(total / count, rel=1e-5)
