"""The one way from token groups to log-probabilities: SFT, reference, DPO and evaluation use it.

Legend: B groups, K completions, R rows, T tokens a row, N scored tokens, M completion tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel

from dpo_cli.core.errors import MachineError
from dpo_cli.data.tokenise import TokenGroup
from dpo_cli.scoring.attention import IMPLEMENTATION, Attending, attend
from dpo_cli.scoring.head import DEFAULT_HEAD_BYTES, GPU_HEAD_BYTES, LogitTransform, max_logit_rows, token_logps
from dpo_cli.scoring.layout import Layout, LayoutName, lay_out, split_by_tokens

ENGINE_VERSION = 2
"""Raised when a change here may move a log-probability; part of the reference cache's identity."""


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of some groups' completions.

    Attributes:
        logps_BK: float64 [B, K], sum over the completion's tokens, nats.
        num_tokens_BK: int64 [B, K], tokens of each completion, end of turn included.
        token_logps_M: float32 [M], all completion tokens, completion after completion.
    """

    logps_BK: torch.Tensor
    num_tokens_BK: torch.Tensor
    token_logps_M: torch.Tensor

    @classmethod
    def join(cls, scores: Sequence[Scores]) -> Scores:
        """Those of some micro-batches as one."""
        return cls(*(torch.cat([getattr(each, name.name) for each in scores]) for name in fields(cls)))


class Scorer:
    """Scores token groups with a causal language model.

    Args:
        model: A Hugging Face causal LM, or a PEFT model around one.
        compute_dtype: The dtype of matrix products; bfloat16 through autocast, or float32.
        layout: How groups go through the model. Every model can do ``padded``; which one is
            right for a model is what :func:`dpo_cli.scoring.probe.open_scorer` finds out.
        head_bytes: Bytes of logits that are held at once; None takes what suits the device.

    Gradients flow where they are enabled. At construction eight tokens are scored both here and
    by the model's own forward; where they differ, the model's own head is used from then on.

    Attributes:
        layout: How groups go through the model.
        config: The text model's configuration.
        compute_dtype: The dtype of matrix products.
        head_bytes: Bytes of logits that are held at once.
        last_attended: What the last forward of one row attended to.

    For layouts of one row the model's attention is switched to this package's, and stays so for
    the backward pass and the next batch, until :meth:`close` or the end of a ``with`` block.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        compute_dtype: torch.dtype,
        layout: LayoutName = "padded",
        head_bytes: int | None = None,
    ) -> None:
        causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self._causal = causal
        self._backbone = _backbone(causal)
        self.compute_dtype = compute_dtype
        self.config: Any = causal.config.get_text_config()
        self._autocast_dtype = compute_dtype if compute_dtype != torch.float32 else None
        self._head = causal.get_output_embeddings()
        self.head_bytes = head_bytes or (GPU_HEAD_BYTES if self.device.type == "cuda" else DEFAULT_HEAD_BYTES)
        self._transform = LogitTransform.of(self.config)
        self._own_attention = _own_attention(causal)
        self.layout: LayoutName = layout
        self.last_attended: Attending | None = None
        self._own_head = self._backbone is None or not self._head_agrees()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the model its own attention back."""
        self._use_attention(self._own_attention)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._head.weight.device

    @property
    def uses_own_head(self) -> bool:
        """Whether logits come from the model's own forward, since ours gives others."""
        return self._own_head

    def split(self, groups: Sequence[TokenGroup], max_tokens: int) -> list[list[int]]:
        """Micro-batches of at most ``max_tokens`` tokens in this layout, as indices of groups."""
        return split_by_tokens(groups, max_tokens, self.layout)

    def score(self, groups: Sequence[TokenGroup], layout: LayoutName | None = None) -> Scores:
        """Score all completions of some groups in one forward pass.

        Args:
            groups: Groups with one number of completions.
            layout: Another layout than the scorer's.

        Returns:
            Sums in float64 over float32 token log-probabilities.
        """
        laid_out = lay_out(groups, layout or self.layout).to(self.device)
        with self._autocast():
            token_logps_M = self._token_logps(laid_out)[laid_out.scored_M]
        shape = (laid_out.num_groups, laid_out.num_completions)
        sums = torch.zeros(shape, dtype=torch.float64, device=self.device).view(-1)
        sums = sums.index_add(0, laid_out.owners_M, token_logps_M.double())
        lengths = [len(completion) for group in groups for completion in group.completions]
        counts = torch.tensor(lengths).to(self.device, non_blocking=True)
        return Scores(sums.view(shape), counts.view(shape), token_logps_M)

    def last_hidden(self, groups: Sequence[TokenGroup], layout: LayoutName | None = None) -> torch.Tensor:
        """What the backbone makes of each completion as a whole: the hidden state at its last token, with gradients.

        The last token does not go through the model as long as nothing comes behind it; so one more is laid out
        behind each completion. Which one makes no difference: it does not go through the model itself.

        Args:
            groups: Groups with one number of completions.
            layout: Another layout than the scorer's.

        Returns:
            [B, K, D], in the dtype that the backbone gives.

        Raises:
            MachineError: The model has no backbone of its own.
        """
        if self._backbone is None:
            raise MachineError(f"{type(self._causal).__name__} has no part that gives hidden states, as a head needs")
        longer = [
            replace(group, completions=tuple((*completion, 0) for completion in group.completions)) for group in groups
        ]
        laid_out = lay_out(longer, layout or self.layout)
        lengths = torch.tensor([len(completion) for group in longer for completion in group.completions])
        predictors = laid_out.predictors_N[laid_out.scored_M[lengths.cumsum(0) - 1]]
        with self._autocast():
            hidden = self._hidden(replace(laid_out, predictors_N=predictors).to(self.device))
        return hidden.view(laid_out.num_groups, laid_out.num_completions, -1)

    @property
    def max_distribution_tokens(self) -> int:
        """Token budget within which whole next-token distributions fit into memory."""
        return max_logit_rows(self._head.weight.shape[0], GPU_HEAD_BYTES, 8)

    @torch.no_grad()
    def next_token_logps(self, groups: Sequence[TokenGroup]) -> list[torch.Tensor]:
        """Whole next-token distributions along each group's only completion.

        Returns:
            For each group float32 [N, V], log-probabilities, one row for each token of its completion.
        """
        laid_out = lay_out(groups, self.layout).to(self.device)
        with self._autocast():
            logps_NV = self._logits(laid_out).log_softmax(-1)
        return list(logps_NV.split([len(group.completions[0]) for group in groups]))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=self._autocast_dtype or torch.bfloat16, enabled=self._autocast_dtype is not None
        )

    def _use_attention(self, name: str | None) -> None:
        if self._causal.config._attn_implementation != name:
            self._causal.set_attn_implementation(name)

    def _forward(self, model: Any, layout: Layout) -> Any:
        """The output of the backbone or of the whole model; a padded row needs no mask: the padding is behind."""
        if not layout.blocks:
            self._use_attention(self._own_attention)
            return model(input_ids=layout.tokens_RT, use_cache=False)
        self._use_attention(IMPLEMENTATION)
        self.last_attended = Attending(layout)
        with attend(self.last_attended):
            return model(input_ids=layout.tokens_RT, position_ids=layout.positions_RT, use_cache=False)

    def _hidden(self, layout: Layout) -> torch.Tensor:
        """[N, D], hidden states of the predictors."""
        return self._forward(self._backbone, layout)[0].flatten(0, 1)[layout.predictors_N]

    def _own_logits(self, layout: Layout) -> torch.Tensor:
        return self._forward(self._causal, layout).logits.flatten(0, 1)[layout.predictors_N].float()

    def _logits(self, layout: Layout) -> torch.Tensor:
        return self._own_logits(layout) if self._own_head else self._transform(self._head(self._hidden(layout)))

    def _token_logps(self, layout: Layout) -> torch.Tensor:
        if self._own_head:
            logits = self._own_logits(layout)
            return logits.gather(1, layout.targets_N[:, None]).squeeze(1) - logits.logsumexp(1)
        return token_logps(self._hidden(layout), layout.targets_N, self._head, self._transform, self.head_bytes)

    @torch.no_grad()
    def _head_agrees(self) -> bool:
        """Whether head and transform give the model's own logits on eight tokens."""
        with evaluating(self._causal):
            return self._head_agrees_without_dropout()

    def _head_agrees_without_dropout(self) -> bool:
        probe = TokenGroup("probe", "probe", (1,), (tuple(range(2, 9)),))
        layout = lay_out([probe], "padded").to(self.device)
        with self._autocast():
            ours, own = self._transform(self._head(self._hidden(layout))), self._own_logits(layout)
        tolerance = 1e-4 if self._autocast_dtype is None else 1e-2
        return bool(((ours - own).abs() <= tolerance * own.abs().clamp(min=1.0)).all())


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """A model in eval mode for as long as the context lasts; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


_own_attentions: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def _own_attention(causal: Any) -> str:
    """The attention a model had before any scorer switched it; eager, which all have, for a copy of a switched one."""
    if causal.config._attn_implementation != IMPLEMENTATION:
        _own_attentions[causal] = causal.config._attn_implementation
    return _own_attentions.get(causal, "eager")


def _backbone(causal: Any) -> Any:
    """The part of a causal LM that gives hidden states; None where it has no such part of its own."""
    for candidate in (causal.base_model, causal.get_decoder()):
        if candidate is not None and candidate is not causal:
            return candidate
    return None
