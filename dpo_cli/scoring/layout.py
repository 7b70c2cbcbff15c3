"""From token groups to tensors: which tokens go through the model, and which are scored.

Legend: B groups, K completions a group, R = B * K rows, T padded length, N scored tokens.

The layout here is right-padded: every completion has a row of its own, behind a copy of its
prompt. No attention mask is needed: a causal model never looks to the right, where the
padding is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dpo_cli.data.tokenise import TokenGroup


@dataclass(frozen=True)
class Layout:
    """The tensors of some groups.

    Attributes:
        tokens_RT: int64 [R, T], token ids, right-padded with 0.
        predictors_N: int64 [N], positions in the flattened [R * T] whose next token is scored.
        targets_N: int64 [N], the scored tokens.
        rows_N: int64 [N], the row of each scored token; ascending.
        num_groups: B.
        num_completions: K, the same for all groups.
    """

    tokens_RT: torch.Tensor
    predictors_N: torch.Tensor
    targets_N: torch.Tensor
    rows_N: torch.Tensor
    num_groups: int
    num_completions: int

    def to(self, device: torch.device) -> Layout:
        """The same layout on another device."""
        return Layout(
            self.tokens_RT.to(device),
            self.predictors_N.to(device),
            self.targets_N.to(device),
            self.rows_N.to(device),
            self.num_groups,
            self.num_completions,
        )


def pad_groups(groups: Sequence[TokenGroup]) -> Layout:
    """Lay groups out, right-padded, completions of a group in adjacent rows.

    A completion's predictors are the prompt's last position and all of its own but the last,
    so every token of the completion is scored, its end of turn included.
    """
    num_completions = len(groups[0].completions)
    if any(len(group.completions) != num_completions for group in groups):
        raise ValueError("all groups of a layout must have the same number of completions")
    rows = [(group.prompt, completion) for group in groups for completion in group.completions]
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    predictors, targets, owners = [], [], []
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        tokens[row, :end] = torch.tensor(prompt + completion)
        predictors.append(torch.arange(len(prompt) - 1, end - 1) + row * length)
        targets.append(torch.tensor(completion))
        owners.append(torch.full((len(completion),), row))
    return Layout(tokens, torch.cat(predictors), torch.cat(targets), torch.cat(owners), len(groups), num_completions)


def split_by_tokens(groups: Sequence[TokenGroup], max_tokens: int) -> list[list[int]]:
    """Split groups into micro-batches of at most ``max_tokens`` padded tokens.

    Groups of like length go together. A group that is larger by itself makes a micro-batch of
    its own: groups are never cut.

    Returns:
        For each micro-batch the indices of its groups. Deterministic.
    """
    order = sorted(range(len(groups)), key=lambda index: (groups[index].longest, groups[index].id, index))
    batches: list[list[int]] = []
    num_rows = 0
    for index in order:
        group = groups[index]
        rows = len(group.completions)
        if batches and (num_rows + rows) * group.longest <= max_tokens:
            batches[-1].append(index)
            num_rows += rows
        else:
            batches.append([index])
            num_rows = rows
    return batches
