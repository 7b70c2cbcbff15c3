"""From hidden states to the log-probabilities of given tokens.

Legend: N scored tokens, V vocabulary, D hidden.

Only the rows that predict a scored token go through the head, a bounded number of them at a
time, so there is never a [tokens, vocabulary] tensor of a whole batch. Logits and their log-sum-exp
are float32 whatever the model computes in: a bfloat16 log-sum-exp costs 0.02 nats a token, and logits
between 16 and 32 that are rounded to bfloat16 are 0.125 apart.

How a log-probability changes with its hidden state does not depend on the loss. So where the
head itself is not trained, that gradient is taken in the forward pass, while the logits of a
chunk are there, and only it is kept, [N, D]; the backward pass scales its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from dpo_cli.scoring.kernels import wide_product

DEFAULT_HEAD_BYTES = 32 << 20
"""Bytes of logits that are held at once on the CPU: about what its caches hold."""
GPU_HEAD_BYTES = 256 << 20
"""The same on a GPU, which reads the whole head for each chunk of rows."""

_PLAIN_BYTES = 20
"""Bytes that autograd holds of a logit: itself, its transform, what log-sum-exp makes of it, and their gradients."""
_CAPPED_BYTES = 28
"""The same where a soft cap is among the transforms."""


@dataclass(frozen=True)
class TokenStatistics:
    """What the distributions look like from which tokens are scored; without gradients.

    Attributes:
        entropies_N: float32 [N], nats.
        is_likeliest_N: float32 [N], 1 where no token is likelier than the target, else 0.
        log_sum_squares_N: float32 [N], log of the sum of the squared probabilities; None where it was not asked for.
    """

    entropies_N: torch.Tensor
    is_likeliest_N: torch.Tensor
    log_sum_squares_N: torch.Tensor | None

    @classmethod
    def empty(cls, number: int, device: torch.device, *, squares: bool = False) -> TokenStatistics:
        """Room for so many tokens."""
        entropies, likeliest, sums = torch.empty(3, number, dtype=torch.float32, device=device)
        return cls(entropies, likeliest, sums if squares else None)

    @torch.no_grad()
    def fill(self, chunk: slice, shifted_CV: torch.Tensor, targets_C: torch.Tensor) -> None:
        """Those of a chunk of tokens.

        Args:
            chunk: Which they are.
            shifted_CV: float32 [C, V], logits less the largest of their row.
            targets_C: int64 [C].
        """
        powers = shifted_CV.exp()
        sums = powers.sum(1)
        self.fill_all_but_entropies(chunk, shifted_CV.gather(1, targets_C[:, None]), powers, sums)
        self.entropies_N[chunk] = sums.log() - powers.mul_(shifted_CV).sum(1) / sums

    @torch.no_grad()
    def fill_all_but_entropies(
        self, chunk: slice, picked_C1: torch.Tensor, powers_CV: torch.Tensor, sums_C: torch.Tensor
    ) -> None:
        """The same where the powers of the shifted logits and their sums are there."""
        self.is_likeliest_N[chunk] = (picked_C1[:, 0] == 0).float()
        if self.log_sum_squares_N is not None:
            self.log_sum_squares_N[chunk] = 2 * (torch.linalg.vector_norm(powers_CV, dim=1) / sums_C).log()

    @classmethod
    def join(cls, statistics: Sequence[TokenStatistics]) -> TokenStatistics:
        """Those of some micro-batches as one."""
        squares = [each.log_sum_squares_N for each in statistics if each.log_sum_squares_N is not None]
        return cls(
            torch.cat([each.entropies_N for each in statistics]),
            torch.cat([each.is_likeliest_N for each in statistics]),
            torch.cat(squares) if squares else None,
        )

    def of(self, tokens_M: torch.Tensor) -> TokenStatistics:
        """Those of some of the tokens, by their places int64 [M]."""
        squares = self.log_sum_squares_N
        return TokenStatistics(
            self.entropies_N[tokens_M], self.is_likeliest_N[tokens_M], None if squares is None else squares[tokens_M]
        )


def linear_logits(hidden_ND: torch.Tensor, head: torch.nn.Module) -> torch.Tensor:
    """What a head makes of hidden states, [N, V], with gradients; float32 where it is a linear layer and no more."""
    device = hidden_ND.device.type
    if not is_plain(head) or not torch.is_autocast_enabled(device):
        return head(hidden_ND)
    logits = _WideLinear.apply(hidden_ND.to(torch.get_autocast_dtype(device)), head.weight)
    return logits if head.bias is None else logits + head.bias  # type: ignore[return-value, operator]


class _WideLinear(torch.autograd.Function):
    """x W^T in float32 of a narrow x; both gradients are products of narrow matrices."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD)
        return wide_product(hidden_ND, weight_VD.to(hidden_ND.dtype).T)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, weight_VD = ctx.saved_tensors
        grad_NV = grads[0].to(hidden_ND.dtype)
        wanted = ctx.needs_input_grad
        return (
            grad_NV @ weight_VD.to(hidden_ND.dtype) if wanted[0] else None,
            wide_product(grad_NV.T, hidden_ND).to(weight_VD.dtype) if wanted[1] else None,
        )


def max_logit_rows(vocabulary: int, head_bytes: int, bytes_each: int) -> int:
    """How many rows of logits may be held at once, where each logit takes so many bytes; at least one."""
    return max(1, head_bytes // (bytes_each * vocabulary))


_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What Gemma, RecurrentGemma and xLSTM call their soft cap."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its head's output: scale, then soft cap.

    Attributes:
        scale: Factor on the logits (Cohere's logit_scale, Granite's 1 / logits_scaling).
        softcap: ``softcap * tanh(z / softcap)`` where set (Gemma's final_logit_softcapping).

    Configurations do not say enough: Granite divides by its logits_scaling, HyperCLOVA X multiplies by it.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def readings(cls, config: Any) -> Iterator[LogitTransform]:
        """What a model's configuration may mean, the likeliest first."""
        scale = float(getattr(config, "logit_scale", None) or 1.0) * (
            getattr(config, "lm_head_multiplier", None) or 1.0
        )
        softcap = next((value for name in _SOFTCAPS if (value := getattr(config, name, None))), None)
        scaling = getattr(config, "logits_scaling", None) or 1.0
        yield cls(scale / scaling, softcap)
        if scaling != 1.0:
            yield cls(scale * scaling, softcap)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Transformed logits, float32."""
        logits = logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def token_logps(
    hidden_ND: torch.Tensor,
    targets_N: torch.Tensor,
    head: torch.nn.Module,
    transform: LogitTransform,
    head_bytes: int = DEFAULT_HEAD_BYTES,
    statistics: TokenStatistics | None = None,
) -> torch.Tensor:
    """Log-probability of each target under softmax(transform(head(hidden))).

    Args:
        hidden_ND: [N, D], the hidden states that predict the targets.
        targets_N: int64 [N].
        head: The output embedding. A plain frozen linear layer goes the fast way; one that is
            trained, or is more than that, is called and differentiated as it is.
        transform: What the model does to its logits.
        head_bytes: Bytes of logits that may be held at once.
        statistics: Is filled in, where it is given.

    Returns:
        float32 [N], nats.
    """
    if is_plain(head) and not any(parameter.requires_grad for parameter in head.parameters()):
        weight: torch.Tensor = head.weight  # type: ignore[assignment]
        if torch.is_autocast_enabled(hidden_ND.device.type):
            dtype = torch.get_autocast_dtype(hidden_ND.device.type)
            hidden_ND, weight = hidden_ND.to(dtype), weight.to(dtype)
        # logits are worked on in place; for the gradient of narrower hidden states there is a narrow copy
        bytes_each = 4 if weight.dtype == torch.float32 else 6
        if transform.softcap is not None:
            bytes_each += 8  # the cap's slope and what it is made of
        with_gradient = torch.is_grad_enabled() and hidden_ND.requires_grad and transform.softcap is None
        if statistics is not None and not with_gradient:
            bytes_each += 4  # the powers, for the entropy
        rows = max_logit_rows(weight.shape[0], head_bytes, bytes_each)
        frozen = _FrozenHead(weight, head.bias, transform, statistics)  # type: ignore[arg-type]
        return _TargetLogps.apply(hidden_ND, targets_N, frozen, rows)  # type: ignore[return-value]
    return _autograd_logps(hidden_ND, targets_N, head, transform, head_bytes, statistics)


def is_plain(head: torch.nn.Module) -> bool:
    """Whether a head is a linear layer of floating-point weights and nothing besides."""
    has_hooks = head._forward_hooks or head._forward_pre_hooks
    return type(head) is torch.nn.Linear and head.weight.is_floating_point() and not has_hooks


class _TargetLogps(torch.autograd.Function):
    """The log-probabilities of a frozen head and d logp / d h with them, a bounded number of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, targets_N: torch.Tensor, head: _FrozenHead, rows: int
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        logps_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_ND.device)
        unit_ND = torch.empty_like(hidden_ND) if wanted else None
        buffer = hidden_ND.new_empty(min(rows, len(targets_N)), head.weight_VD.shape[0], dtype=torch.float32)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for begin in range(0, len(targets_N), rows):
                chunk = slice(begin, min(begin + rows, len(targets_N)))
                logits = wide_product(hidden_ND[chunk], head.weight_VD.T, buffer[: chunk.stop - begin])
                logps_N[chunk], gradient = head.logps(chunk, logits, hidden_ND[chunk], targets_N[chunk], wanted=wanted)
                if unit_ND is not None and gradient is not None:
                    unit_ND[chunk] = gradient
        ctx.save_for_backward(unit_ND)
        return logps_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (unit_ND,) = ctx.saved_tensors
        (grad_N,) = grads
        return (unit_ND * grad_N[:, None]).to(unit_ND.dtype), None, None, None


@dataclass(frozen=True)
class _FrozenHead:
    """z = cap(scale * (W h + b)), logp = z[y] - log sum exp z, of a head that is not trained.

    d logp / d h = W^T [(onehot(y) - softmax(z)) * cap'(.) * scale]: 4 N V D operations in all, and
    no logits are computed twice.
    """

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None
    transform: LogitTransform
    statistics: TokenStatistics | None

    def logps(
        self,
        chunk: slice,
        logits_CV: torch.Tensor,
        hidden_CD: torch.Tensor,
        targets_C: torch.Tensor,
        *,
        wanted: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities float32 [C] and, where wanted, their gradients [C, D]; overwrites the logits W h, float32.

        The statistics of the chunk are filled in. Where logits are linear in the hidden state h, the entropy comes with
        the gradient g of the log-probability: sum p z = z[y] - h g but for the bias, so it is h g - logp.
        """
        z, bias_V, scale, softcap = logits_CV, self.bias_V, self.transform.scale, self.transform.softcap
        if bias_V is not None:
            z += bias_V
        if scale != 1.0:
            z *= scale
        slope = None
        if softcap is not None:
            z = z.div_(softcap).tanh_()
            slope = 1 - z.square() if wanted else None
            z *= softcap
        z -= z.amax(1, keepdim=True)
        comes_with_gradient = wanted and slope is None
        if self.statistics is not None and not comes_with_gradient:
            self.statistics.fill(chunk, z, targets_C)
        picked = z.gather(1, targets_C[:, None])
        z.exp_()
        sums = z.sum(1, keepdim=True)
        logps = (picked - sums.log()).squeeze(1)
        if not wanted:
            return logps, None
        beside = 0.0 if bias_V is None else scale * (bias_V[targets_C] - (z @ bias_V.float()) / sums[:, 0])
        if self.statistics is not None and comes_with_gradient:
            self.statistics.fill_all_but_entropies(chunk, picked, z, sums[:, 0])
        # onehot - softmax before it is rounded: afterwards the two would cancel where the model is sure
        z.scatter_add_(1, targets_C[:, None], -sums)
        if slope is not None:
            z *= slope
        if self.weight_VD.dtype == torch.float16:  # the sums may be larger than its largest number
            z /= sums
            sums = torch.ones_like(sums)
        gradient = torch.mm(z.to(self.weight_VD.dtype), self.weight_VD) * (-scale / sums)
        if self.statistics is not None and comes_with_gradient:
            along = (hidden_CD.float() * gradient.float()).sum(1)
            self.statistics.entropies_N[chunk] = (along - logps + beside).clamp(min=0.0)
        return logps, gradient


def _autograd_logps(
    hidden_ND: torch.Tensor,
    targets_N: torch.Tensor,
    head: torch.nn.Module,
    transform: LogitTransform,
    head_bytes: int,
    statistics: TokenStatistics | None,
) -> torch.Tensor:
    """The same through the head's own forward and autograd; logits are computed again in the backward pass."""
    bytes_each = _PLAIN_BYTES if transform.softcap is None else _CAPPED_BYTES
    rows = max_logit_rows(head.weight.shape[0], head_bytes, bytes_each)  # type: ignore[index]

    def logps(begin: int, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logps_of_logits(transform(linear_logits(hidden, head)), targets, statistics, begin)

    if hidden_ND.shape[0] <= rows:
        return logps(0, hidden_ND, targets_N)
    pieces = [
        (begin, hidden_ND[begin : begin + rows], targets_N[begin : begin + rows])
        for begin in range(0, len(targets_N), rows)
    ]
    if not torch.is_grad_enabled():
        return torch.cat([logps(*piece) for piece in pieces])
    return torch.cat([checkpoint(logps, *piece, use_reentrant=False) for piece in pieces])


def logps_of_logits(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, statistics: TokenStatistics | None, begin: int = 0
) -> torch.Tensor:
    """Log-probability of each target, float32 [C], nats; fills in the statistics from place ``begin`` on."""
    picked = logits_CV.gather(1, targets_C[:, None])
    if statistics is not None:
        with torch.no_grad():
            shifted = logits_CV - logits_CV.amax(1, keepdim=True)
            statistics.fill(slice(begin, begin + len(targets_C)), shifted, targets_C)
    return picked.squeeze(1) - logits_CV.logsumexp(1)
