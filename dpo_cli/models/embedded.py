"""The embedded model: a llama of about one million parameters, made from code.

It stands for the large model of a real project: a base that has read plenty of mixed text,
good answers and bad ones alike, and knows the chat format. Tokenizer and weights are a pure
function of the seed and the number of steps (and, in their last bits, of the machine).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_cli.core.params import WORLD_HELD_OUT
from dpo_cli.data import world
from dpo_cli.data.schema import split_position, user

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

PackedRows = list[list[tuple[list[int], list[int]]]]
"""Rows of a batch, each of them some (prompt, answer) in token ids."""

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


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int, num_layers: int = 4) -> LlamaForCausalLM:
    """The model with fresh weights, float32. Widths are multiples of 64, the nf4 block."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=num_layers,
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


def pretraining_optimizer(model: LlamaForCausalLM, num_steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimizer of pretraining, and its schedule: a linear warm-up, then a cosine from 1 to 0.05."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    return optimizer, LambdaLR(optimizer, lambda step: _share_of_peak(step, num_steps))


def _share_of_peak(step: int, num_steps: int) -> float:
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


def pretraining_batch(tokenizer: PreTrainedTokenizerFast, seed: int, step: int, num_steps: int) -> PackedRows:
    """The examples of one step, packed into rows; a function of seed and step alone."""
    return pack_rows(_examples(tokenizer, seed, step, num_steps))


def pack_rows(examples: Iterable[tuple[list[int], list[int]]]) -> PackedRows:
    """Endless examples, as many as go into the rows of a batch until one does not."""
    rows: PackedRows = [[] for _ in range(_ROWS)]
    free = [_ROW_LENGTH] * _ROWS
    for prompt, answer in examples:
        length = len(prompt) + len(answer)
        fitting = [row for row in range(_ROWS) if free[row] >= length]
        if not fitting:
            break
        rows[fitting[0]].append((prompt, answer))
        free[fitting[0]] -= length
    return rows


def pretraining_loss(model: LlamaForCausalLM, rows: PackedRows) -> torch.Tensor:
    """Mean negative log-probability of the answers' tokens in one packed batch (float32, nats a token)."""
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
