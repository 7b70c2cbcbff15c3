"""The embedded model: made from code, the same every time, and blind to what is held out."""

from __future__ import annotations

import signal
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo_cli.core.errors import Interrupted
from dpo_cli.core.params import WORLD_HELD_OUT
from dpo_cli.data import world
from dpo_cli.data.schema import user
from dpo_cli.data.splits import split_position
from dpo_cli.models import embedded
from dpo_cli.models.embedded import build_embedded, build_model, build_tokenizer

STEPS = 5


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


def test_fresh_weights_depend_on_the_seed_alone(tokenizer: Any) -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.rand(3)
        return torch.cat([parameter.flatten() for parameter in build_model(tokenizer, seed).parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


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


def test_a_steps_examples_depend_on_seed_and_step_alone(tokenizer: Any) -> None:
    assert examples(tokenizer, 7, 50) == examples(tokenizer, 7, 50)
    assert examples(tokenizer, 7, 50) != examples(tokenizer, 8, 50)


def test_packed_rows_do_not_see_each_other(tokenizer: Any) -> None:
    """The loss of a packed batch is that of its examples, each read alone."""
    model = build_model(tokenizer, seed=0).eval()
    pairs = examples(tokenizer, 99, 12)
    with torch.no_grad():
        packed = embedded._batch_loss(model, iter([*pairs, ([1] * 200, [2])]))
        total, count = 0.0, 0
        for prompt, answer in pairs:
            logps = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            begin = len(prompt) - 1
            total -= sum(logps[begin + i, token].item() for i, token in enumerate(answer))
            count += len(answer)
    assert packed.item() == pytest.approx(total / count, rel=1e-5)


# --- building -----------------------------------------------------------------------------


def build(folder: Path, reporter: Any, checkpoint_s: float = 1e9, seed: int = 0) -> dict[str, torch.Tensor]:
    (folder / "out").mkdir(parents=True, exist_ok=True)
    build_embedded(folder / "out", folder, seed, STEPS, checkpoint_s, reporter)
    return load_file(folder / "out" / "model.safetensors")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    from contextlib import nullcontext
    from unittest.mock import MagicMock

    reporter = MagicMock()
    reporter.meter.return_value = nullcontext(MagicMock())
    folder = tmp_path_factory.mktemp("embedded")
    build(folder, reporter)
    return folder / "out"


def test_the_same_seed_builds_the_same_bytes(built: Path, tmp_path: Path, reporter: Any) -> None:
    build(tmp_path, reporter)
    names = sorted(path.name for path in built.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [name for name in names if (built / name).read_bytes() != (tmp_path / "out" / name).read_bytes()] == []
    (meter,) = reporter.meters
    assert meter.done == meter.total == STEPS


def test_another_seed_builds_another_model(built: Path, tmp_path: Path, reporter: Any) -> None:
    other = build(tmp_path, reporter, seed=1)
    assert not torch.equal(other["model.norm.weight"], load_file(built / "model.safetensors")["model.norm.weight"])


@pytest.mark.parametrize("stop_at", [1, 3])
def test_stopped_and_run_again_it_builds_the_same_weights(
    built: Path, tmp_path: Path, reporter: Any, make_reporter: Any, stop_at: int
) -> None:
    def stop(done: int) -> None:
        if done == stop_at:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match=rf"stopped and saved at step {stop_at} of {STEPS}"):
        build(tmp_path, make_reporter(stop))
    build(tmp_path, reporter)
    assert reporter.said == [f"going on with the pretraining at step {stop_at} of {STEPS}"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (built / "model.safetensors").read_bytes()


def test_killed_and_run_again_it_builds_the_same_weights(
    built: Path, tmp_path: Path, reporter: Any, make_reporter: Any
) -> None:
    def kill(done: int) -> None:
        if done == 4:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        build(tmp_path, make_reporter(kill), checkpoint_s=0)
    build(tmp_path, reporter)
    assert reporter.said == [f"going on with the pretraining at step 3 of {STEPS}"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (built / "model.safetensors").read_bytes()


def test_what_is_built_can_be_loaded(built: Path, cpu: Any) -> None:
    from dpo_cli.data.chat import ChatEncoder
    from dpo_cli.models.load import context_length, load_model, load_tokenizer

    encoder = ChatEncoder(load_tokenizer(built))
    assert encoder.stop_ids == [1]
    assert context_length(built) == 8192
    assert load_model(built, cpu, quantization="nf4").config.vocab_size > 1000
