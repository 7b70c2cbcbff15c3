"""The one way from token groups to log-probabilities: SFT, reference, DPO and evaluation use it.

Legend: B groups, K completions, R rows, T tokens a row, N scored tokens, M completion tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch

from dpo_cli.core.environment import is_gpu
from dpo_cli.core.errors import MachineError
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.scoring.attention import IMPLEMENTATION, Attending, ReadRows, attend
from dpo_cli.scoring.head import (
    DEFAULT_HEAD_BYTES,
    GPU_HEAD_BYTES,
    LogitTransform,
    TokenStatistics,
    linear_logits,
    logps_of_logits,
    max_logit_rows,
    token_logps,
)
from dpo_cli.scoring.layout import Layout, LayoutName, lay_out, num_row_tokens, split_by_tokens
from dpo_cli.scoring.limits import causal_of

ENGINE_VERSION = 5
"""See :func:`engine_version`."""
FLOAT32_ENGINE_VERSION = 3
"""The same where the model computes in float32: what made versions 4 and 5 moved only narrower numbers."""
MAX_READ_SHARE = 0.7
"""Share of a row's positions that are read up to which it pays to compute the last MLP on them alone."""

HeadName = Literal["linear", "whole"]
"""Where logits come from: ``linear``, the output embedding and what the configuration says is done to its output;
``whole``, the model's forward as it is, with all of a micro-batch's logits at once.
"""

Statistics = Literal["none", "plain", "squares"]


def engine_version(compute_dtype: torch.dtype) -> int:
    """Raised when a change here may move a log-probability; part of the reference cache's identity."""
    return FLOAT32_ENGINE_VERSION if compute_dtype == torch.float32 else ENGINE_VERSION


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of some groups' completions.

    Attributes:
        logps_BK: float64 [B, K], sum over the completion's tokens, nats.
        num_tokens_BK: int64 [B, K], end of turn included.
        token_logps_M: float32 [M], completion after completion.
        statistics: Of the same tokens, where they were asked for.
        values_M: float32 [M], what a value head makes of the state before each of these tokens, where there is one.
    """

    logps_BK: torch.Tensor
    num_tokens_BK: torch.Tensor
    token_logps_M: torch.Tensor
    statistics: TokenStatistics | None = None
    values_M: torch.Tensor | None = None

    @classmethod
    def join(cls, scores: Sequence[Scores]) -> Scores:
        """Those of some micro-batches as one."""
        found = [each.statistics for each in scores if each.statistics is not None]
        return cls(
            torch.cat([each.logps_BK for each in scores]),
            torch.cat([each.num_tokens_BK for each in scores]),
            torch.cat([each.token_logps_M for each in scores]),
            TokenStatistics.join(found) if len(found) == len(scores) else None,
        )


class Scorer:
    """Scores token groups with a causal language model.

    Args:
        model: A Hugging Face causal LM, or a PEFT model around one.
        compute_dtype: The dtype of matrix products; bfloat16 through autocast, or float32.
        layout: How groups go through the model. Every model can do ``padded``; which one is
            right for a model is what :func:`dpo_cli.scoring.probe.open_scorer` finds out.
        head_bytes: Bytes of logits that are held at once; None takes what suits the device.

    Gradients flow where they are enabled. At construction eight tokens are scored both here and
    by the model's own forward; where they differ, logits come from the model's whole forward from then on.

    Attributes:
        layout: How groups go through the model.
        config: The text model's configuration.
        compute_dtype: The dtype of matrix products.
        own_attention: The attention that the model has by itself.
        head: Where logits come from.
        head_bytes: Bytes of logits that are held at once; not kept to by a ``whole`` head.
        max_read_share: Share of a row's positions that predict something up to which the last layer's MLP is
            computed on those alone; 0 computes it on all, which is right for every model.
        last_attended: What the last forward of one row attended to.
        value_head: Gives a value of each hidden state that predicts a token, beside its log-probabilities; None: no
            values. [..., D] to [..., 1], float32 whatever the model computes in.

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
        causal = causal_of(model)
        self._causal = causal
        self._backbone = _backbone(causal)
        self.compute_dtype = compute_dtype
        self.config: Any = causal.config.get_text_config()
        self._autocast_dtype = compute_dtype if compute_dtype != torch.float32 else None
        self._linear = causal.get_output_embeddings()
        self.head_bytes = head_bytes or (GPU_HEAD_BYTES if is_gpu(self.device) else DEFAULT_HEAD_BYTES)
        self.own_attention = _own_attention(causal)
        self.layout: LayoutName = layout
        self.max_read_share = 0.0
        self.last_attended: Attending | None = None
        self.value_head: torch.nn.Module | None = None
        self._read_rows = ReadRows.of(self._backbone)
        self._transform = LogitTransform()
        with torch.no_grad(), evaluating(causal):
            self.head: HeadName = self._find_head()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the model its own attention back."""
        self._use_attention(self.own_attention)
        if self._read_rows is not None:
            self._read_rows.detach()

    @property
    def can_read_rows(self) -> bool:
        """Whether the last layer has an MLP that could be computed on some positions alone."""
        return self._read_rows is not None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._linear.weight.device

    def num_tokens(self, group: TokenGroup) -> int:
        """Tokens of a group that go through the model, by itself."""
        return num_row_tokens(group, self.layout)

    def split(self, groups: Sequence[TokenGroup], max_tokens: int) -> list[list[int]]:
        """Micro-batches of at most ``max_tokens`` tokens in this layout, as indices of groups."""
        return split_by_tokens(groups, max_tokens, self.layout)

    def score(
        self, groups: Sequence[TokenGroup], layout: LayoutName | None = None, *, statistics: Statistics = "none"
    ) -> Scores:
        """Score all completions of some groups, of which all have as many, in one forward pass.

        Statistics are of the whole distributions: ``plain`` ones, or ``squares``, too.

        Returns:
            Sums in float64 over float32 token log-probabilities.
        """
        laid_out = lay_out(groups, layout or self.layout).to(self.device)
        with self._autocast():
            found = None
            if statistics != "none":
                found = TokenStatistics.empty(len(laid_out.targets_N), self.device, squares=statistics == "squares")
            token_logps_N, values_N = self._token_logps(laid_out, found)
            token_logps_M = token_logps_N[laid_out.scored_M]
        shape = (laid_out.num_groups, laid_out.num_completions)
        sums = torch.zeros(shape, dtype=torch.float64, device=self.device).view(-1)
        sums = sums.index_add(0, laid_out.owners_M, token_logps_M.double())
        lengths = [len(completion) for group in groups for completion in group.completions]
        counts = torch.tensor(lengths).to(self.device, non_blocking=True)
        of_tokens = None if found is None else found.of(laid_out.scored_M)
        values_M = None if values_N is None else values_N[laid_out.scored_M]
        return Scores(sums.view(shape), counts.view(shape), token_logps_M, of_tokens, values_M)

    def last_hidden(self, groups: Sequence[TokenGroup], layout: LayoutName | None = None) -> torch.Tensor:
        """What the backbone makes of each completion as a whole: the hidden state at its last token, with gradients.

        The last token does not go through the model as long as nothing comes behind it; so one more is laid out
        behind each completion. Which one makes no difference: it does not go through the model itself.

        Returns:
            [B, K, D], in the dtype that the backbone gives.

        Raises:
            MachineError: The model has no backbone of its own.
        """
        if self._backbone is None:
            raise MachineError(f"{type(self._causal).__name__} has no part that gives hidden states, as a head needs")
        longer = [extended(group) for group in groups]
        laid_out = lay_out(longer, layout or self.layout)
        lengths = torch.tensor([len(completion) for group in longer for completion in group.completions])
        predictors = laid_out.predictors_N[laid_out.scored_M[lengths.cumsum(0) - 1]]
        with self._autocast():
            hidden = self._hidden(replace(laid_out, predictors_N=predictors).to(self.device))
        return hidden.view(laid_out.num_groups, laid_out.num_completions, -1)

    @property
    def max_distribution_rows(self) -> int:
        """How many whole next-token distributions of two models, float32, may be held at once."""
        return max_logit_rows(self._linear.weight.shape[0], self.head_bytes, 16)

    @torch.no_grad()
    def predict(self, groups: Sequence[TokenGroup]) -> torch.Tensor:
        """What the next-token distributions along each group's only completion are made of: one row a token.

        Returns:
            [N, D], hidden states; [N, V], logits, where the head is the ``whole`` forward. N tokens of all groups.
        """
        laid_out = lay_out(groups, self.layout).to(self.device)
        with self._autocast():
            return self._whole_logits(laid_out) if self.head == "whole" else self._hidden(laid_out)

    @torch.no_grad()
    def next_token_logps(self, predicted: torch.Tensor) -> torch.Tensor:
        """Whole next-token distributions of some rows of :meth:`predict`.

        Returns:
            float32 [n, V], log-probabilities; see :attr:`max_distribution_rows`.
        """
        with self._autocast():
            logits = predicted if self.head == "whole" else self._logits_of(predicted)
            return logits.log_softmax(-1)

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
            self._use_attention(self.own_attention)
            return model(input_ids=layout.tokens_RT, use_cache=False)
        self._use_attention(IMPLEMENTATION)
        self.last_attended = Attending(layout, self._read(layout))
        with attend(self.last_attended):
            return model(input_ids=layout.tokens_RT, position_ids=layout.positions_RT, use_cache=False)

    def _read(self, layout: Layout) -> torch.Tensor | None:
        """The positions that the last MLP is computed on; None for all."""
        if self._read_rows is None or layout.read_P is None:
            return None
        if not len(layout.read_P) <= self.max_read_share * layout.num_tokens:
            return None
        self._read_rows.attach()
        return layout.read_P

    def _hidden(self, layout: Layout) -> torch.Tensor:
        """[N, D], hidden states of the predictors."""
        return self._forward(self._backbone, layout)[0].flatten(0, 1)[layout.predictors_N]

    def _whole_logits(self, layout: Layout) -> torch.Tensor:
        return self._forward(self._causal, layout).logits.flatten(0, 1)[layout.predictors_N].float()

    def _logits_of(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """float32 [N, V]."""
        return self._transform(linear_logits(hidden_ND, self._linear))

    def _token_logps(
        self, layout: Layout, statistics: TokenStatistics | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """float32 [N], log-probabilities; float32 [N], values, where there is a value head."""
        if self.head == "whole":
            if self.value_head is not None:
                raise MachineError(
                    f"{type(self._causal).__name__} has no hidden states of its own, as a value head needs"
                )
            return logps_of_logits(self._whole_logits(layout), layout.targets_N, statistics), None
        hidden = self._hidden(layout)
        values = None
        if self.value_head is not None:
            with torch.autocast(self.device.type, enabled=False):
                values = self.value_head(hidden.float()).squeeze(-1)
        logps = token_logps(hidden, layout.targets_N, self._linear, self._transform, self.head_bytes, statistics)
        return logps, values

    def _find_head(self) -> HeadName:
        """``linear`` where it gives the model's own logits on eight tokens."""
        if self._backbone is None:
            return "whole"
        probe = TokenGroup("probe", "probe", (1,), (tuple(range(2, 9)),))
        layout = lay_out([probe], "padded").to(self.device)
        with self._autocast():
            hidden, expected = self._hidden(layout), self._whole_logits(layout)
            fits = hidden.shape[1] == self._linear.weight.shape[1]
            for transform in LogitTransform.readings(self.config) if fits else ():
                if self._agree(transform(self._linear(hidden)), expected):
                    self._transform = transform
                    return "linear"
        return "whole"

    def _agree(self, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
        if ours.shape != theirs.shape:
            return False
        tolerance = 1e-4 if self._autocast_dtype is None else 1e-2
        return bool(((ours - theirs).abs() <= tolerance * theirs.abs().clamp(min=1.0)).all())


def extended(group: TokenGroup) -> TokenGroup:
    """One more token behind each completion, so that its last one goes through the model."""
    return TokenGroup(group.id, group.group, group.prompt, tuple((*tokens, 0) for tokens in group.completions))


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


def restore_attention(model: Any) -> None:
    """Give a model its own attention back, whichever scorer switched it, so that it can generate."""
    causal = causal_of(model)
    if causal.config._attn_implementation == IMPLEMENTATION:
        causal.set_attn_implementation(_own_attention(causal))


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
