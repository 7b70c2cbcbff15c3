"""The embedded model: a llama of about one million parameters, made from code.

It stands for the large model of a real project: a base that has read plenty of mixed text,
good answers and bad ones alike, and knows the chat format. Tokenizer and weights are a pure
function of the seed and the number of steps (and, in their last bits, of the machine).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_cli.core.errors import Interrupted
from dpo_cli.core.interrupts import graceful_stop
from dpo_cli.core.params import WORLD_HELD_OUT
from dpo_cli.core.progress import Reporter
from dpo_cli.data import world
from dpo_cli.data.schema import user
from dpo_cli.data.splits import split_position

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_ROWS, _ROW_LENGTH = 4, 128
"""Shape of a pretraining batch: rows into which examples are packed, and their length in tokens."""
_PEAK_LEARNING_RATE = 8e-3
_WARMUP_STEPS = 50
_GOOD_SHARE = 0.5
_COPY_SHARE, _COPY_UNTIL = 0.15, 0.4
"""Share of examples that are random strings to copy, in this first share of the steps: it makes
the model learn early to look back."""

# Words with the space before them, numbers of at most two digits, signs, line ends, spaces.
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which every word of the world is one token.

    Any other text becomes bytes, so no text is unknown.
    """
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=2,
        special_tokens=[PAD, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([word for word in world.words() for _ in range(2)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The model with fresh weights, float32. Widths are multiples of 64, the nf4 block."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            pad_token_id=_special_id(tokenizer, PAD),
            eos_token_id=_special_id(tokenizer, END),
            bos_token_id=None,
        )
    )


def _special_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(token_id, int)
    return token_id


def build_embedded(
    folder: Path, work: Path, seed: int, num_steps: int, checkpoint_s: float, reporter: Reporter
) -> None:
    """Build tokenizer and weights into ``folder``, in Hugging Face layout.

    Args:
        folder: An empty folder to write to.
        work: Where an interrupted pretraining is kept, and found again.
        seed: Of weights and text.
        num_steps: Optimizer steps of pretraining.
        checkpoint_s: Seconds of work that a kill may cost.
        reporter: Shows progress.

    Raises:
        Interrupted: The user asked to stop; the state is in ``work``.
    """
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    _pretrain(model, tokenizer, work / "pretraining.pt", seed, num_steps, checkpoint_s, reporter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    state_file: Path,
    seed: int,
    num_steps: int,
    checkpoint_s: float,
    reporter: Reporter,
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    first_step = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
        reporter.say(f"going on with the pretraining at step {first_step} of {num_steps}")

    def save(step: int) -> None:
        temporary = state_file.with_suffix(".tmp")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, temporary)
        temporary.replace(state_file)

    model.train()
    saved_at = time.monotonic()
    with graceful_stop() as stop, reporter.meter("pretraining the embedded model", num_steps, "steps") as meter:
        meter.advance(first_step)
        for step in range(first_step, num_steps):
            for group in optimizer.param_groups:
                group["lr"] = _PEAK_LEARNING_RATE * _schedule(step, num_steps)
            loss = _batch_loss(model, _examples(tokenizer, seed, step, num_steps))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            meter.advance(1)
            if step % 10 == 0:
                meter.note(f"loss {loss.item():.3f}")
            if stop.requested:
                save(step + 1)
                raise Interrupted(f"base: stopped and saved at step {step + 1} of {num_steps}; run it again to go on")
            if time.monotonic() - saved_at > checkpoint_s:
                save(step + 1)
                saved_at = time.monotonic()
    model.eval()


def _schedule(step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine from 1 to 0.05."""
    decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / num_steps))
    return min(1.0, (step + 1) / _WARMUP_STEPS) * decay


def _examples(
    tokenizer: PreTrainedTokenizerFast, seed: int, step: int, num_steps: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Endless (prompt, answer) token ids for one step, a function of seed and step alone.

    No prompt that the split could hold out (position below WORLD_HELD_OUT) is ever drawn.
    """
    rng = random.Random(f"pretraining {seed} {step}")
    begin, end, answer = (_special_id(tokenizer, name) for name in (USER, END, ASSISTANT))
    copying = step < _COPY_UNTIL * num_steps

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]

    while True:
        if copying and rng.random() < _COPY_SHARE:
            string = [rng.randrange(5, len(tokenizer)) for _ in range(rng.randint(4, 14))]
            yield [begin, *string, end, answer], [*string, end]
            continue
        task = world.draw_task(rng)
        if split_position([user(task.prompt)]) < WORLD_HELD_OUT:
            continue
        text = task.good if rng.random() < _GOOD_SHARE else rng.choice(task.bad)
        yield [begin, *encode(task.prompt), end, answer], [*encode(text), end]


def _batch_loss(model: LlamaForCausalLM, examples: Iterator[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Mean negative log-probability of the answers' tokens in one packed batch (float32, nats a token)."""
    rows: list[list[tuple[list[int], list[int]]]] = [[] for _ in range(_ROWS)]
    free = [_ROW_LENGTH] * _ROWS
    for prompt, answer in examples:
        length = len(prompt) + len(answer)
        fitting = [row for row in range(_ROWS) if free[row] >= length]
        if not fitting:
            break
        rows[fitting[0]].append((prompt, answer))
        free[fitting[0]] -= length
    shape = (_ROWS, _ROW_LENGTH)
    tokens = torch.zeros(shape, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    scored = torch.zeros(shape, dtype=torch.bool)
    segments = torch.full(shape, -1)
    for row, packed in enumerate(rows):
        offset = 0
        for segment, (prompt, answer) in enumerate(packed):
            end = offset + len(prompt) + len(answer)
            tokens[row, offset:end] = torch.tensor(prompt + answer)
            positions[row, offset:end] = torch.arange(end - offset)
            scored[row, offset + len(prompt) : end] = True
            segments[row, offset:end] = segment
            offset = end
    causal = torch.ones(_ROW_LENGTH, _ROW_LENGTH, dtype=torch.bool).tril()
    mask = (segments[:, :, None] == segments[:, None, :]) & causal
    hidden = model.model(input_ids=tokens, position_ids=positions, attention_mask=mask[:, None]).last_hidden_state
    row, column = torch.nonzero(scored, as_tuple=True)
    logits = model.lm_head(hidden[row, column - 1])
    return torch.nn.functional.cross_entropy(logits, tokens[row, column])
