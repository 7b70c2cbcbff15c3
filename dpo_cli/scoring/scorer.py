"""The one way from token groups to log-probabilities: SFT, reference, DPO and evaluation use it.

Legend: B groups, K completions, R = B * K rows, T padded length, N scored tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from dpo_cli.data.tokenise import TokenGroup
from dpo_cli.scoring.head import LogitTransform, max_logit_rows, token_logps
from dpo_cli.scoring.layout import Layout, pad_groups

ENGINE_VERSION = 1
"""Raised when a change here may move a log-probability; part of the reference cache's identity."""


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of some groups' completions.

    Attributes:
        logps_BK: float64 [B, K], sum over the completion's tokens, nats.
        num_tokens_BK: int64 [B, K], tokens of each completion, end of turn included.
        token_logps_N: float32 [N], all scored tokens, row after row.
    """

    logps_BK: torch.Tensor
    num_tokens_BK: torch.Tensor
    token_logps_N: torch.Tensor


class Scorer:
    """Scores token groups with a causal language model.

    Args:
        model: A Hugging Face causal LM, or a PEFT model around one.
        compute_dtype: The dtype of matrix products; bfloat16 through autocast, or float32.

    Gradients flow where they are enabled. At construction eight tokens are scored both here and
    by the model's own forward; where they differ, the model's own head is used from then on.
    """

    def __init__(self, model: torch.nn.Module, compute_dtype: torch.dtype) -> None:
        self._model = model
        causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self._causal = causal
        self._autocast_dtype = compute_dtype if compute_dtype != torch.float32 else None
        self._head = causal.get_output_embeddings()
        self._transform = LogitTransform.of(causal.config.get_text_config())
        self._own_head = not self._head_agrees()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._head.weight.device

    def score(self, groups: Sequence[TokenGroup]) -> Scores:
        """Score all completions of some groups in one forward pass.

        Returns:
            Sums in float64 over float32 token log-probabilities.
        """
        layout = pad_groups(groups).to(self.device)
        with self._autocast():
            token_logps_N = self._token_logps(layout)
        num_rows = layout.num_groups * layout.num_completions
        sums = torch.zeros(num_rows, dtype=torch.float64, device=self.device)
        sums = sums.index_add(0, layout.rows_N, token_logps_N.double())
        counts = torch.bincount(layout.rows_N, minlength=num_rows)
        shape = (layout.num_groups, layout.num_completions)
        return Scores(sums.view(shape), counts.view(shape), token_logps_N)

    @property
    def max_distribution_tokens(self) -> int:
        """Token budget within which whole next-token distributions fit into memory."""
        return max_logit_rows(self._head.weight.shape[0])

    @torch.no_grad()
    def next_token_logps(self, groups: Sequence[TokenGroup]) -> list[torch.Tensor]:
        """Whole next-token distributions along each group's only completion.

        Returns:
            For each group float32 [N, V], log-probabilities, one row for each token of its completion.
        """
        layout = pad_groups(groups).to(self.device)
        with self._autocast():
            logps_NV = self._logits(layout).log_softmax(-1)
        return list(logps_NV.split([len(group.completions[0]) for group in groups]))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=self._autocast_dtype or torch.bfloat16, enabled=self._autocast_dtype is not None
        )

    def _hidden(self, layout: Layout) -> torch.Tensor:
        """[N, D], hidden states of the predictors; the padding is behind them and needs no mask."""
        hidden_RTD = self._causal.base_model(input_ids=layout.tokens_RT, use_cache=False)[0]
        return hidden_RTD.flatten(0, 1)[layout.predictors_N]

    def _own_logits(self, layout: Layout) -> torch.Tensor:
        logits_RTV = self._causal(input_ids=layout.tokens_RT, use_cache=False).logits
        return logits_RTV.flatten(0, 1)[layout.predictors_N].float()

    def _logits(self, layout: Layout) -> torch.Tensor:
        return self._own_logits(layout) if self._own_head else self._transform(self._head(self._hidden(layout)))

    def _token_logps(self, layout: Layout) -> torch.Tensor:
        if self._own_head:
            logits = self._own_logits(layout)
            return logits.gather(1, layout.targets_N[:, None]).squeeze(1) - logits.logsumexp(1)
        return token_logps(self._hidden(layout), layout.targets_N, self._head, self._transform)

    @torch.no_grad()
    def _head_agrees(self) -> bool:
        """Whether head and transform give the model's own logits on eight tokens."""
        probe = TokenGroup("probe", "probe", (1,), (tuple(range(2, 9)),))
        layout = pad_groups([probe]).to(self.device)
        with self._autocast():
            ours, own = self._transform(self._head(self._hidden(layout))), self._own_logits(layout)
        tolerance = 1e-4 if self._autocast_dtype is None else 1e-2
        return bool(((ours - own).abs() <= tolerance * own.abs().clamp(min=1.0)).all())
