"""Decoding for GPUs: shapes that do not change from step to step, and nothing that the device is waited for.

Legend: R rows, L tokens of the longest prompt, S new tokens at most, K places of the cache, V vocabulary.

Where a cache grows and every token is looked at, a step costs what the host needs to start some hundred kernels, and
the device waits. Here keys and values have all their places from the beginning, a step works on tensors alone, and
the host looks only now and then whether all answers have ended; what comes behind an answer's end is cut off by the
caller. So CUDA can record a step once for a batch and play it back.

Nothing of it is taken on trust. For a model, steps are held against a forward pass without a cache; a recorded step is
held against the same step computed, at another token than it was recorded at.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticSlidingWindowLayer

from dpo_cli.core.errors import first_line, is_out_of_memory
from dpo_cli.evaluation.static_cache import PlacesCache
from dpo_cli.scoring.limits import causal_of

_STEPS_A_LOOK = 8
"""Steps after which the host asks whether all answers have ended."""
_STEPS_WORTH_A_RECORD = 16
"""New tokens from which a step is recorded; to record and to check it takes the host about four steps."""
_RECORDED_STEP = 2
_TRIED_STEPS = 3
_TRIED_TOKENS = 32
"""Tokens of the texts on which a model's steps are tried, where no window makes it more."""
_TOLERANCES = {torch.float32: 1e-3}
_NARROW_TOLERANCE = 0.05
"""Probability by which a next-token distribution may differ in 16 bits."""
_NOISE_FACTOR = 3.0
_MAX_TOLERANCE = 0.2
"""The most that is allowed, however much rounding alone moves a distribution."""


Listener = Callable[[list[list[int]]], bool]
"""Hears the tokens so far of each row of a batch, and says whether that is enough; behind an answer's end there may be
anything."""


@dataclass(frozen=True)
class Decoding:
    """How an answer is sampled.

    Attributes:
        temperature: 0 takes the likeliest token.
        max_new_tokens: S.
        stop_ids: Tokens that end an answer.
        seed: With the prompt's id and ``stream`` it fixes the random stream.
        stream: Name of the model that answers, so that two models get different streams.
        top_p: A token is drawn from the fewest likeliest ones that together have this probability; 1: from all.
    """

    temperature: float
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    seed: int = 0
    stream: str = ""
    top_p: float = 1.0


def pick(logits_RV: torch.Tensor, uniforms_R: torch.Tensor, temperature: float, top_p: float = 1.0) -> torch.Tensor:
    """The tokens int64 [R] that uniforms of [0, 1), float64, pick by inverting the cumulative distribution.

    With ``top_p`` below 1 it is that of the nucleus (Holtzman et al. 2020): the fewest likeliest tokens whose
    probabilities sum to at least ``top_p``.
    """
    probabilities_RV = (logits_RV.float() / temperature).softmax(-1).double()
    if top_p < 1:
        ordered_RV, places_RV = probabilities_RV.sort(dim=-1, descending=True, stable=True)
        is_outside_RV = ordered_RV.cumsum(-1) - ordered_RV >= top_p
        probabilities_RV = ordered_RV.scatter(-1, places_RV, ordered_RV.masked_fill(is_outside_RV, 0.0))
    cumulative = probabilities_RV.cumsum(-1)
    targets = uniforms_R[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).clamp(max=logits_RV.shape[1] - 1)[:, 0]


class StaticDecoder:
    """Decodes batches of one model.

    Args:
        model: A causal LM in eval mode, or a PEFT model around one.
        decoding: How.
        dtype: What is computed in.

    Attributes:
        refused: Why the model is not decoded so; None where it is, or has not been tried.
        unrecorded: Why steps are not played back from a record; None where they are, or need not be.
    """

    def __init__(self, model: Any, decoding: Decoding, dtype: torch.dtype) -> None:
        causal = causal_of(model)
        self._model = model
        self._config = causal.config.get_text_config(decoder=True)
        self._known = inspect.signature(causal.forward).parameters
        self._sampling = decoding
        self._dtype = dtype
        self._num_tried = 0
        self.refused: str | None = None
        self.unrecorded: str | None = None

    def decode(
        self,
        tokens_RL: torch.Tensor,
        mask_RL: torch.Tensor,
        uniforms_RS: torch.Tensor | None,
        listener: Listener | None = None,
    ) -> torch.Tensor | None:
        """Answers to a batch of prompts.

        Args:
            tokens_RL: int64, prompts padded at their beginning, on the device.
            mask_RL: int64, 0 for padding.
            uniforms_RS: float64 in [0, 1); None takes the likeliest tokens.
            listener: Called at every eighth step with the tokens so far; True ends the answers.

        Returns:
            int64 [R, up to S]; behind an answer's first stop token there may be anything. None where :attr:`refused`.
        """
        length = tokens_RL.shape[1] + self._sampling.max_new_tokens
        if not self._is_tried(length, tokens_RL.device):
            return None
        while True:
            run = _Run(
                self._forward, PlacesCache(self._config, length), tokens_RL, mask_RL, uniforms_RS, self._sampling
            )
            run.begin()
            num_tokens = self._go_on(run, listener)
            if num_tokens is not None:
                return run.answers_RS[:, :num_tokens]

    def _go_on(self, run: _Run, listener: Listener | None) -> int | None:
        """Take the steps behind the first token.

        Returns:
            How many tokens there are; None where a record that is not right may have spoiled the run.
        """
        num_steps = self._sampling.max_new_tokens
        is_recorded = num_steps >= _STEPS_WORTH_A_RECORD and self.unrecorded is None
        step: Callable[[], object] = run.step
        record: _Record | None = None
        for done in range(1, num_steps):
            if done % _STEPS_A_LOOK == 0:
                is_enough = listener is not None and listener(run.answers_RS[:, :done].tolist())
                if is_enough or bool(run.ended_R.all()):
                    return done
            if is_recorded and done == _RECORDED_STEP:  # libraries have made by now what they need
                found = _reason_to_wait(run) or _record(run.step)
                record, self.unrecorded = (None, found) if isinstance(found, str) else (found, None)
            elif record is not None and done == _RECORDED_STEP + 1:
                self.unrecorded = _reason_against_record(run, record)
                if self.unrecorded is not None:
                    return None
                step = record.replay
                continue
            step()
        return num_steps

    def _forward(self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, **more: Any) -> torch.Tensor:
        """Logits of the last tokens [R, _TRIED_STEPS or L, V]."""
        if "position_ids" in self._known:
            more["position_ids"] = positions
        if "logits_to_keep" in self._known:
            more.setdefault("logits_to_keep", 1)
        return self._model(input_ids=tokens, attention_mask=mask, **more).logits

    # --- whether it is right --------------------------------------------------------------

    def _is_tried(self, length: int, device: torch.device) -> bool:
        """Whether texts of so many tokens may be decoded so; tries it where windows make that another question."""
        if self.refused is not None:
            return False
        try:
            layers = StaticCache(config=self._config, max_cache_len=length).layers
            windows = [layer.max_cache_len for layer in layers if isinstance(layer, StaticSlidingWindowLayer)]
            passed = [window for window in windows if window < length]
            needed = min(length, max(_TRIED_TOKENS, *(window + 2 * _TRIED_STEPS for window in passed), 0))
            if needed > self._num_tried:
                self.refused = self._reason_against(needed, device)
                self._num_tried = needed
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a family that keeps no keys and values makes of it
            if is_out_of_memory(error):
                raise
            self.refused = f"it fails ({first_line(error)})"
        return self.refused is None

    def _reason_against(self, num_tokens: int, device: torch.device) -> str | None:
        """Why steps give other distributions than a forward pass without a cache; None where they do not.

        On two texts, of which one is padded. A cache that grows says how far rounding goes.
        """
        generator = torch.Generator().manual_seed(0)
        size = max(_TRIED_STEPS + 2, num_tokens)
        tokens = torch.randint(self._config.vocab_size, (2, size), generator=generator).to(device)
        mask = torch.ones_like(tokens)
        mask[1, : size // 3] = 0
        positions, prompt = _positions(mask), size - _TRIED_STEPS

        def grown() -> torch.Tensor:
            """What a cache that grows gives: as right as can be, and off by rounding."""
            cache, begin, found = DynamicCache(config=self._config), 0, []
            for end in range(prompt, size + 1):
                part = slice(begin, end)
                logits = self._forward(
                    tokens[:, part], mask[:, :end], positions[:, part], past_key_values=cache, use_cache=True
                )
                found.append(logits[:, -1])
                begin = end
            return torch.stack(found, 1)

        keep = {"logits_to_keep": _TRIED_STEPS + 1} if "logits_to_keep" in self._known else {}
        expected = self._forward(tokens, mask, positions, use_cache=False, **keep)[:, -_TRIED_STEPS - 1 :]
        decoding = Decoding(0.0, _TRIED_STEPS + 1, ())
        run = _Run(self._forward, PlacesCache(self._config, size), tokens[:, :prompt], mask[:, :prompt], None, decoding)
        run.begin()
        found = [run.logits_RV]
        for step in range(_TRIED_STEPS):
            run.token_R1.copy_(tokens[:, prompt + step, None])
            found.append(run.step())
        noise = _distance(grown(), expected)
        floor = _TOLERANCES.get(self._dtype, _NARROW_TOLERANCE)
        allowed = min(max(floor, _NOISE_FACTOR * noise), max(floor, _MAX_TOLERANCE))
        off = _distance(torch.stack(found, 1), expected)
        return None if off <= allowed else f"a next-token distribution is off by {off:.2g}"


# --- a batch on its way ---------------------------------------------------------------------


class _Run:
    """A batch on its way: all that a step reads and writes, in tensors that stay where they are.

    Attributes:
        token_R1: int64, each row's last token.
        logits_RV: The prompts' last logits.
        answers_RS: int64.
        ended_R: bool, whether a stop token came.
        state: What a step changes of these, but for ``answers_RS`` and the cache: they take the same twice.
    """

    def __init__(
        self,
        forward: Callable[..., torch.Tensor],
        cache: PlacesCache,
        tokens_RL: torch.Tensor,
        mask_RL: torch.Tensor,
        uniforms_RS: torch.Tensor | None,
        decoding: Decoding,
    ) -> None:
        rows, prompt = tokens_RL.shape
        device = tokens_RL.device
        self._forward, self._cache, self._sampling = forward, cache, decoding
        self._uniforms_RS = uniforms_RS
        self._tokens_RL = tokens_RL
        self._mask_RK = mask_RL.new_ones(rows, cache.length)
        self._mask_RK[:, :prompt] = mask_RL
        self._positions_RL = _positions(mask_RL)
        self._stop_ids = torch.tensor(decoding.stop_ids, dtype=torch.long).to(device, non_blocking=True)
        self._position_R1 = self._positions_RL[:, -1:].clone()
        self._place_1 = torch.full((1,), prompt - 1, device=device)
        self._step_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.token_R1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.ended_R = torch.zeros(rows, dtype=torch.bool, device=device)
        self.answers_RS = torch.zeros(rows, decoding.max_new_tokens, dtype=torch.long, device=device)
        self.state = [self.token_R1, self._position_R1, self._place_1, self._step_1, self.ended_R]

    def begin(self) -> None:
        """Let the prompts through the model and take the first tokens."""
        prompt = self._tokens_RL.shape[1]
        mask_RL = self._mask_RK[:, :prompt]
        logits = self._forward(
            self._tokens_RL, mask_RL, self._positions_RL, past_key_values=self._cache, use_cache=True
        )
        self.logits_RV = logits[:, -1]
        self._cache.begin_steps(self._place_1)
        self._take(self.logits_RV)

    def saved(self) -> list[torch.Tensor]:
        """A copy of the state."""
        return [tensor.clone() for tensor in self.state]

    def restore(self, saved: list[torch.Tensor]) -> None:
        """Make the state what it was."""
        for tensor, value in zip(self.state, saved, strict=True):
            tensor.copy_(value)

    def step(self) -> torch.Tensor:
        """Let the last tokens through the model and take the next ones; returns the logits [R, V]."""
        logits_RV = self._forward(
            self.token_R1, self._mask_RK, self._position_R1, past_key_values=self._cache, use_cache=True
        )[:, -1]
        self._take(logits_RV)
        return logits_RV

    def _take(self, logits_RV: torch.Tensor) -> None:
        if self._uniforms_RS is None:
            tokens_R = logits_RV.float().argmax(-1)
        else:
            uniforms_R = self._uniforms_RS.index_select(1, self._step_1)[:, 0]
            tokens_R = pick(logits_RV, uniforms_R, self._sampling.temperature, self._sampling.top_p)
        self.answers_RS.index_copy_(1, self._step_1, tokens_R[:, None])
        self.ended_R |= (tokens_R[:, None] == self._stop_ids).any(1)
        self.token_R1.copy_(tokens_R[:, None])
        for number in (self._position_R1, self._place_1, self._step_1):
            number += 1


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions in texts that are padded at their beginning, like the mask."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


# --- records --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    """A recorded step.

    Attributes:
        replay: Takes it again, on what its tensors hold then.
        logits_RV: What it writes its logits to.
    """

    replay: Callable[[], None]
    logits_RV: torch.Tensor


def _reason_to_wait(run: _Run) -> str | None:
    """Why a step cannot be recorded, since it waits for the device; the run is as before.

    To find that out by recording would end the record in an error, behind which PyTorch refuses to draw random numbers
    on the device for the rest of the process.
    """
    before = run.saved()
    try:
        torch.cuda.set_sync_debug_mode("error")
        try:
            run.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    except Exception as error:  # whatever a model does
        if is_out_of_memory(error):
            raise
        return f"it cannot be recorded ({first_line(error)})"
    finally:
        run.restore(before)
    return None


def _record(step: Callable[[], torch.Tensor]) -> _Record | str:
    """A record of a step, which is not taken; or why there is none."""
    pool: Any = None
    try:
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        # the outer one puts the stream back where recording ends in an error
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool):
            logits_RV = step()
    except Exception as error:  # whatever a model does that cannot be recorded
        if pool is not None:
            _end_record(pool)
        cause = error.__context__ or error  # the end of the record complains of it once more
        if is_out_of_memory(cause) or is_out_of_memory(error):
            raise cause from None
        return f"it cannot be recorded ({first_line(cause)})"
    return _Record(graph.replay, logits_RV)


def _end_record(pool: Any) -> None:
    """Have PyTorch's allocator forget a record that ended in an error.

    Up to version 2.12 it goes on as if steps were recorded: nothing cached is given back any more, and to ask for it
    (``torch.cuda.empty_cache``) is an error (https://github.com/pytorch/pytorch/pull/180395).
    """
    with suppress(RuntimeError):  # it knows already
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)


def _reason_against_record(run: _Run, record: _Record) -> str | None:
    """Take a step by its record and again without it, and say why the record will not do; None where it does.

    It is another step than the one that was recorded, with another token at another place.
    """
    before = run.saved()
    record.replay()
    found, state = record.logits_RV.clone(), run.saved()
    run.restore(before)
    off = _distance(found, run.step())
    if not off <= _NARROW_TOLERANCE:
        return f"its record gives a distribution that is off by {off:.2g}"
    moved = [tensor for tensor, value in zip(run.state[1:4], state[1:4], strict=True) if not torch.equal(tensor, value)]
    return "its record does not go on" if moved else None


def _distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest total variation distance of next-token distributions; infinite where there is no number."""
    found, wanted = (each.float().softmax(-1) for each in (logits, expected))
    return (found - wanted).abs().sum(-1).nan_to_num(nan=float("inf")).max().item() / 2


def describe(decoder: StaticDecoder) -> str:
    """How a model's answers are decoded, for the user."""
    if decoder.refused is not None:
        return f"with a cache that grows, since places that stay are not right for this model: {decoder.refused}"
    return "" if decoder.unrecorded is None else f"step by step, since {decoder.unrecorded}"
