"""From token groups to tensors: which tokens go through the model, and which are scored.

Legend: B groups, K completions a group, R rows, T tokens a row, N scored tokens, M completion tokens.

Two layouts, which differ in cost alone:

* ``shared``: one row; a group is its prompt once, then every completion. A completion sees the
  prompt and itself, never a sibling, and its positions go on from the prompt's. Completions that
  begin with the same tokens share those too.
* ``padded``: a row for every completion behind a copy of its prompt, padded to the right, where a
  causal model never looks. It needs no attention of its own, so it serves every model.

A completion's predictors are the position before it and all of its own but the last, so every
token of it is scored, the end of its turn included. Its last token predicts nothing that is asked
for and nothing looks back at it, so it does not go through the model. Groups are never cut.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from dpo_cli.data.tokens import TokenGroup

LayoutName = Literal["shared", "padded"]
LAYOUTS: tuple[LayoutName, ...] = ("shared", "padded")
"""From the cheapest to the one that every model can do."""

MIN_SHARED_TOKENS = 8
"""Tokens that some completions of a group, but not all, must begin with alike to have them computed once."""


class Run(NamedTuple):
    """Tokens that follow one another in a row and in one text.

    Attributes:
        length: How many.
        parent: Index of the run that the text comes from, in its block; -1 where it begins.
    """

    length: int
    parent: int


@dataclass(frozen=True)
class Block:
    """A part of a row that attends to nothing outside of itself: a tree of runs, parents first.

    Attributes:
        start: Its first position in the row.
        runs: Its runs, in the order of the row.
    """

    start: int
    runs: tuple[Run, ...]

    @property
    def length(self) -> int:
        """Tokens of it."""
        return sum(run.length for run in self.runs)


@dataclass(frozen=True)
class Layout:
    """The tensors of some groups.

    Attributes:
        tokens_RT: int64 [R, T], token ids; where rows are padded, with 0 to the right.
        positions_RT: int64 [R, T], position of each token in its text; None where rows are single texts.
        predictors_N: int64 [N], positions in the flattened [R * T] whose next token is scored.
        targets_N: int64 [N], the scored tokens.
        read_P: int64 [P], the positions of one row that predict something, ascending; None for many rows.
        scored_M: int64 [M], which scored token each completion token is: shared ones are scored once.
        owners_M: int64 [M], the completion of each token, counted over all groups; ascending.
        blocks: What attends to what, for attention; empty where rows are single texts.
        num_groups: B.
        num_completions: K, the same for all groups.
        num_padding: Tokens of tokens_RT that stand for nothing.
    """

    tokens_RT: torch.Tensor
    positions_RT: torch.Tensor | None
    predictors_N: torch.Tensor
    targets_N: torch.Tensor
    read_P: torch.Tensor | None
    scored_M: torch.Tensor
    owners_M: torch.Tensor
    blocks: tuple[Block, ...]
    num_groups: int
    num_completions: int
    num_padding: int

    def to(self, device: torch.device) -> Layout:
        """The same layout on another device."""
        if device.type == "cpu":
            return self
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model, padding included."""
        return self.tokens_RT.numel()


def lay_out(groups: Sequence[TokenGroup], name: LayoutName) -> Layout:
    """Lay groups out, all with the same number of completions."""
    if len({len(group.completions) for group in groups}) != 1:
        raise ValueError("all groups of a layout must have the same number of completions")
    return _pad(groups) if name == "padded" else _join(groups)


# --- one row ------------------------------------------------------------------------------


@dataclass
class _Row:
    """A row that is being written: its tokens, and which of them predict what."""

    tokens: list[int]
    positions: list[int]
    predictors: list[int]
    targets: list[int]
    scored: list[int]
    owners: list[int]
    blocks: list[Block]


def _join(groups: Sequence[TokenGroup]) -> Layout:
    row = _Row([], [], [], [], [], [], [])
    for number, group in enumerate(groups):
        _append_block(row, group.prompt, group.completions, number * len(group.completions))
    return Layout(
        tokens_RT=torch.tensor([row.tokens]),
        positions_RT=torch.tensor([row.positions]),
        predictors_N=torch.tensor(row.predictors),
        targets_N=torch.tensor(row.targets),
        read_P=torch.tensor(sorted(set(row.predictors))),
        scored_M=torch.tensor(row.scored),
        owners_M=torch.tensor(row.owners),
        blocks=tuple(row.blocks),
        num_groups=len(groups),
        num_completions=len(groups[0].completions),
        num_padding=0,
    )


@dataclass(frozen=True)
class _Branch:
    """Tokens that some completions of a group have alike, as far as they do.

    Attributes:
        begin, end: Its tokens, counted along the text of its members, prompt included.
        parent: Index of the branch it comes from, -1 for the first.
        members: The completions that it belongs to.
        is_leaf: Whether nothing comes from it.
    """

    begin: int
    end: int
    parent: int
    members: tuple[int, ...]
    is_leaf: bool

    @property
    def num_inputs(self) -> int:
        """Tokens of it that go through the model: all, but for the last one of a leaf."""
        return self.end - self.begin - self.is_leaf


def _branches(num_prompt: int, completions: Sequence[tuple[int, ...]]) -> list[_Branch]:
    """The tree of a group, parents before children, first children right behind their parents."""
    found: list[_Branch] = []

    def grow(members: tuple[int, ...], begin: int, parent: int) -> None:
        """Add the branch of completions that are alike from ``begin``, in the text, on, and all that comes from it."""
        alike = num_prompt + _common_prefix([completions[member] for member in members])
        by_next: dict[int, list[int]] = defaultdict(list)
        for member in members:
            if num_prompt + len(completions[member]) > alike:
                by_next[completions[member][alike - num_prompt]].append(member)
        index = len(found)
        found.append(_Branch(begin, alike, parent, members, is_leaf=not by_next))
        for together in by_next.values():
            further = num_prompt + _common_prefix([completions[member] for member in together])
            if further - alike >= MIN_SHARED_TOKENS:
                grow(tuple(together), alike, index)
            else:
                for member in together:
                    end = num_prompt + len(completions[member])
                    found.append(_Branch(alike, end, index, (member,), is_leaf=True))

    grow(tuple(range(len(completions))), 0, -1)
    return found


def _common_prefix(sequences: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all of them begin with alike."""
    low, high = min(sequences), max(sequences)
    for index, (left, right) in enumerate(zip(low, high, strict=False)):
        if left != right:
            return index
    return min(len(low), len(high))


def _append_block(row: _Row, prompt: Sequence[int], completions: Sequence[tuple[int, ...]], first_owner: int) -> None:
    """Write a prompt and completions of it as one block; the completions' owners count from ``first_owner``."""
    start = len(row.tokens)
    branches = _branches(len(prompt), completions)
    ends: list[int] = []  # where each branch ends in the row
    runs: list[Run] = []
    run_of: list[int] = []  # the run of each branch; a leaf of one token has none, and no children
    scored: list[list[int]] = [[] for _ in completions]  # by completion: the scores of its tokens, in their order
    for branch in branches:
        text = [*prompt, *completions[branch.members[0]]]
        offset = len(row.tokens) - branch.begin
        inputs = slice(branch.begin, branch.begin + branch.num_inputs)
        row.tokens += text[inputs]
        row.positions += range(inputs.start, inputs.stop)
        first = max(branch.begin, len(prompt))
        indices = range(len(row.targets), len(row.targets) + branch.end - first)
        predictors = list(range(offset + first - 1, offset + branch.end - 1))
        if predictors and first == branch.begin:
            predictors[0] = ends[branch.parent] - 1
        row.predictors += predictors
        row.targets += text[first : branch.end]
        for member in branch.members:
            scored[member] += indices
        ends.append(len(row.tokens))
        run_of.append(len(runs))
        if branch.num_inputs:
            runs.append(Run(branch.num_inputs, -1 if branch.parent < 0 else run_of[branch.parent]))
    for member, indices in enumerate(scored):
        row.scored += indices
        row.owners += [first_owner + member] * len(indices)
    row.blocks.append(Block(start, tuple(runs)))


# --- many rows ----------------------------------------------------------------------------


def _pad(groups: Sequence[TokenGroup]) -> Layout:
    rows = [(group.prompt, completion) for group in groups for completion in group.completions]
    length = max(len(prompt) + len(completion) for prompt, completion in rows) - 1
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    predictors, targets, owners = [], [], []
    for index, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion) - 1
        tokens[index, :end] = torch.tensor(prompt + completion[:-1])
        predictors.append(torch.arange(len(prompt) - 1, end) + index * length)
        targets.append(torch.tensor(completion))
        owners.append(torch.full((len(completion),), index))
    targets_N = torch.cat(targets)
    return Layout(
        tokens_RT=tokens,
        positions_RT=None,
        predictors_N=torch.cat(predictors),
        targets_N=targets_N,
        read_P=None,
        scored_M=torch.arange(len(targets_N)),
        owners_M=torch.cat(owners),
        blocks=(),
        num_groups=len(groups),
        num_completions=len(groups[0].completions),
        num_padding=tokens.numel() - sum(len(prompt) + len(completion) - 1 for prompt, completion in rows),
    )


# --- how much goes through at once --------------------------------------------------------


def num_row_tokens(group: TokenGroup, name: LayoutName) -> int:
    """Tokens of a group that go through the model, beside nothing else."""
    if name == "shared":
        return sum(branch.num_inputs for branch in _branches(len(group.prompt), group.completions))
    return len(group.completions) * (group.longest - 1)


def split_by_tokens(groups: Sequence[TokenGroup], max_tokens: int, name: LayoutName) -> list[list[int]]:
    """Split groups into micro-batches of at most ``max_tokens`` tokens each.

    A micro-batch holds groups with one number of completions. A group that is larger by itself
    makes a micro-batch of its own. Micro-batches of rows without padding are made about equal;
    padded ones hold groups of like length, the shortest first.

    Returns:
        For each micro-batch the indices of its groups. Deterministic, and independent of the
        groups' order but for groups of the same id.
    """
    by_completions: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        by_completions[len(group.completions)].append(index)
    cut = _alike if name == "padded" else _balanced
    batches: list[list[int]] = []
    for count in sorted(by_completions):
        batches += cut(groups, by_completions[count], max_tokens, name)
    return batches


def _alike(groups: Sequence[TokenGroup], indices: list[int], max_tokens: int, name: LayoutName) -> Iterator[list[int]]:
    batch: list[int] = []
    for index in sorted(indices, key=lambda index: (groups[index].longest, groups[index].id, index)):
        rows = (len(batch) + 1) * len(groups[index].completions)
        if batch and rows * (groups[index].longest - 1) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    yield batch


def _balanced(
    groups: Sequence[TokenGroup], indices: list[int], max_tokens: int, name: LayoutName
) -> Iterator[list[int]]:
    sizes = {index: num_row_tokens(groups[index], name) for index in indices}
    order = sorted(indices, key=lambda index: (-sizes[index], groups[index].id, index))
    small = [index for index in order if sizes[index] < max_tokens]
    yield from ([index] for index in order if sizes[index] >= max_tokens)
    num_batches = math.ceil(sum(sizes[index] for index in small) / max_tokens)
    while small:
        batches: list[list[int]] = [[] for _ in range(num_batches)]
        lightest = [(0, number) for number in range(num_batches)]
        for index in small:
            load, number = heapq.heappop(lightest)
            if load + sizes[index] > max_tokens:
                break
            batches[number].append(index)
            heapq.heappush(lightest, (load + sizes[index], number))
        else:
            yield from (batch for batch in batches if batch)
            return
        num_batches = max(num_batches + 1, num_batches * 51 // 50)
