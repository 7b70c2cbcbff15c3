"""Sampling answers, each from a random stream of its own.

Every prompt has its own stream of uniforms, and a token is drawn by inverting the cumulative
distribution. So what is sampled depends on the seed, the prompt and the model, and on which prompts
share its batch only as far as that moves the probabilities: not in float32, in 16 bits by a last
digit now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from dpo_cli.core.artifacts import digest_json
from dpo_cli.core.environment import is_gpu
from dpo_cli.core.progress import Meter
from dpo_cli.data.schema import Messages
from dpo_cli.evaluation.decoding import Decoding, Listener, StaticDecoder, describe, pick
from dpo_cli.models.lora import cast_adapters
from dpo_cli.scoring.budget import TokenBudget, in_micro_batches
from dpo_cli.scoring.limits import is_in_4_bit
from dpo_cli.scoring.scorer import restore_attention

GENERATION_VERSION = 1
"""Raised when a change here may move what is sampled; part of the key under which answers are kept."""

CACHE_FACTOR = 8
"""Tokens whose keys and values are held at once, as a multiple of those that go through the model at once."""
_ROWS_OF_FOUR_BITS = 64
"""Most prompts at once where weights have 4 bits and lie on a GPU.

With about so many rows bitsandbytes multiplies with packed weights (by its own measurements on cards of compute
capability 8.6 and 8.9); with more it unpacks every weight at every step, which moves nine times the bytes.
"""


@dataclass(frozen=True)
class PromptTokens:
    """A prompt to answer: its content id, its token ids and its messages."""

    id: str
    tokens: tuple[int, ...]
    messages: Messages = field(default_factory=list)


class Sampled(NamedTuple):
    """The tokens of a sampled answer, the stop token included where one came, and whether one came in time."""

    tokens: tuple[int, ...]
    finished: bool


class _InverseCdf(LogitsProcessor):
    """Leaves one token possible in each row: the one that the row's next uniform picks."""

    def __init__(self, uniforms_RS: torch.Tensor, decoding: Decoding) -> None:
        self._uniforms = uniforms_RS
        self._decoding = decoding
        self._step = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:  # type: ignore[override]
        """Scores [R, V] to minus infinity everywhere but at the sampled token."""
        tokens = pick(scores, self._uniforms[:, self._step], self._decoding.temperature, self._decoding.top_p)
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)  # type: ignore[return-value]


class _Told(StoppingCriteria):
    """Tells a listener of every token, and stops where it says so."""

    def __init__(self, listener: Listener, prompt_length: int) -> None:
        self._listener = listener
        self._length = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:  # type: ignore[override]
        """Whether each row [R] ends here."""
        is_over = self._listener(input_ids[:, self._length :].tolist())
        return torch.full(input_ids.shape[:1], is_over, device=input_ids.device)  # type: ignore[return-value]


def sample_answers(
    model: Any,
    prompts: Sequence[PromptTokens],
    decoding: Decoding,
    *,
    budget: TokenBudget,
    autocast_dtype: torch.dtype,
    meter: Meter,
    keep: Callable[[Mapping[str, Sampled]], None] | None = None,
    listener: Listener | None = None,
) -> dict[str, Sampled]:
    """Sample one answer to each prompt; the distribution is cut by ``top_p`` alone.

    Args:
        model: A causal LM in eval mode.
        prompts: What to answer.
        decoding: How.
        budget: Tokens of a micro-batch; prompts and answers together may have :data:`CACHE_FACTOR` times as many.
        autocast_dtype: Compute dtype.
        meter: Called with every answer.
        keep: Gets each batch's answers by prompt id as they are made; what it raises ends the sampling.
        listener: Hears a batch's tokens as they come, and may end its answers; the tokens are the same without it.

    Returns:
        The answers by prompt id.
    """
    temperature, max_new_tokens, stop_ids = decoding.temperature, decoding.max_new_tokens, decoding.stop_ids
    restore_attention(model)
    model.generation_config = GenerationConfig()
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids), pad_token_id=stop_ids[0]
    )
    answers: dict[str, Sampled] = {}
    device = model.get_input_embeddings().weight.device
    decoder = StaticDecoder(model, decoding, autocast_dtype) if is_gpu(device) else None

    def sample(batch: list[PromptTokens]) -> list[list[int]]:
        length = max(len(prompt.tokens) for prompt in batch)
        tokens = torch.zeros(len(batch), length, dtype=torch.long)
        mask = torch.zeros(len(batch), length, dtype=torch.long)
        for row, prompt in enumerate(batch):
            tokens[row, length - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
            mask[row, length - len(prompt.tokens) :] = 1
        tokens, mask, uniforms = tokens.to(device), mask.to(device), None
        if temperature > 0:
            rows = np.stack([_uniforms(decoding, prompt.id) for prompt in batch])
            uniforms = torch.from_numpy(rows).to(device)
        dtype = autocast_dtype if autocast_dtype != torch.float32 else None
        # a cast that is kept for the next step has no place in a recorded one
        with torch.no_grad(), torch.autocast(device.type, dtype, dtype is not None, cache_enabled=decoder is None):
            found = None if decoder is None else decoder.decode(tokens, mask, uniforms, listener)
            if found is not None:
                return found.tolist()
            processors = LogitsProcessorList()
            if uniforms is not None:
                processors.append(_InverseCdf(uniforms, decoding))
            output = model.generate(
                input_ids=tokens,
                attention_mask=mask,
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([_Told(listener, length)] if listener is not None else []),
            )
        return output[:, length:].tolist()

    is_packed = is_in_4_bit(model.parameters())
    max_rows = _ROWS_OF_FOUR_BITS if is_packed and is_gpu(device) else len(prompts)

    def split(left: Sequence[PromptTokens], max_tokens: int) -> list[list[int]]:
        return _batches(left, max_new_tokens, CACHE_FACTOR * max_tokens, max_rows)

    with cast_adapters(model, autocast_dtype):
        for batch, rows in in_micro_batches(prompts, budget, split, sample):
            new = {prompt.id: _cut(row, stop_ids) for prompt, row in zip(batch, rows, strict=True)}
            answers |= new
            if keep is not None:
                keep(new)
            if decoder is not None and (how := describe(decoder)):
                meter.note(how)
            meter.advance(len(batch))
    return answers


def _batches(prompts: Sequence[PromptTokens], max_new_tokens: int, max_tokens: int, max_rows: int) -> list[list[int]]:
    """Indices of prompts, those of like length together, prompts and answers within the budget."""
    batches: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda index: (len(prompts[index].tokens), prompts[index].id)):
        cost = len(prompts[index].tokens) + max_new_tokens
        if batches and len(batches[-1]) < max_rows and (len(batches[-1]) + 1) * cost <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _uniforms(decoding: Decoding, prompt_id: str) -> np.ndarray:
    """float64 [max_new_tokens] in [0, 1), from a counter-based generator keyed by what fixes the stream."""
    key = int(digest_json([decoding.seed, decoding.stream, prompt_id]), 16)
    return np.random.Generator(np.random.Philox(key=key)).random(decoding.max_new_tokens)


def _cut(tokens: Sequence[int], stop_ids: Sequence[int]) -> Sampled:
    for index, token in enumerate(tokens):
        if token in stop_ids:
            return Sampled(tuple(tokens[: index + 1]), finished=True)
    return Sampled(tuple(tokens), finished=False)
