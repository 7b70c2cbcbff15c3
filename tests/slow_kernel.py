"""A variable-length attention kernel on any device, by the definition: what kernels are held against in tests."""

from __future__ import annotations

from itertools import pairwise

import torch

from dpo_cli.scoring.pieces import AttentionSettings
from dpo_cli.scoring.varlen import Sequences


def slow_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    settings: AttentionSettings,
    *,
    align: str = "end",
    grouped: bool = True,
) -> torch.Tensor:
    """A kernel as the protocol wants it, sequence by sequence; and, where asked to be, a wrong one."""
    repeats = query.shape[1] // key.shape[1]
    if grouped:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    else:
        key, value = key.repeat(1, repeats, 1), value.repeat(1, repeats, 1)
    pieces = []
    starts = zip(pairwise(sequences.query_starts.tolist()), pairwise(sequences.key_starts.tolist()), strict=True)
    for queries, keys in starts:
        q, k, v = query[slice(*queries)], key[slice(*keys)], value[slice(*keys)]
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * settings.scale
        if settings.softcap is not None:
            scores = settings.softcap * torch.tanh(scores / settings.softcap)
        offset = len(k) - len(q) if align == "end" else 0
        distance = torch.arange(len(q))[:, None] + offset - torch.arange(len(k))
        hidden = distance < 0
        if settings.window is not None:
            hidden |= distance >= settings.window
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
        pieces.append(torch.einsum("hqk,khd->qhd", weights, v.float()))
    return torch.cat(pieces).to(query.dtype)
