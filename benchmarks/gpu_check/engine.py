"""Whether a step waits for the device, whether kernels are right and pay, and how much rounding moves."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch.nn.functional import silu

from benchmarks.gpu_check.bench import Bench, Policy
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.params import TrainParams
from dpo_cli.data.tokens import TokenGroup, completion_key
from dpo_cli.dry_run.model import DryAccumulator
from dpo_cli.models.device import release_memory
from dpo_cli.scoring import fused
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.scoring.kernels import wide_product
from dpo_cli.scoring.pieces import AttentionSettings
from dpo_cli.scoring.probe import probe_layouts
from dpo_cli.scoring.recompute import GRADES, set_recompute
from dpo_cli.scoring.reference import missing_groups, score_groups
from dpo_cli.scoring.reward_scorer import RewardScorer
from dpo_cli.scoring.varlen import VARLEN_KERNELS, reason_against
from dpo_cli.training.gate import check_step_zero
from dpo_cli.training.objective import PairObjective, RewardObjective, SftObjective
from dpo_cli.training.protocols import Learner

NARROW = (torch.bfloat16, torch.float16)
HEAD_SIZES = (32, 64, 96, 128, 256)
HEADS = ((4, 2), (14, 2))
"""Heads of queries, and of keys and values: two and seven a key's."""
LOGIT_STD = 8.0
"""Of logits, as models that were trained have it; random ones have less than 1."""


def waits(bench: Bench) -> None:
    """One optimizer step of each kind while PyTorch watches for what makes the host wait."""
    policy = bench.policy("tiny")
    groups = bench.pairs(policy, 16)
    head = torch.nn.Linear(policy.scorer.config.hidden_size, 1, bias=False, device=policy.scorer.device)
    reference = {group.id: [-50.0, -60.0] for group in groups}
    singles = [TokenGroup(each.id, each.group, each.prompt, each.completions[:1]) for each in groups]
    work: dict[str, tuple[Any, Any, list[TokenGroup]]] = {
        "sft": (policy.scorer, SftObjective(), singles),
        "sigmoid": (policy.scorer, PairObjective(TrainParams(), reference), groups),
        "reward": (RewardScorer(policy.scorer, head), RewardObjective(), groups),
    }
    for (name, (scorer, objective, batch)), grade in product(work.items(), GRADES):
        set_recompute(policy.model, grade)
        policy.model.train()
        accumulator = DryAccumulator(Learner(policy.model, scorer, objective), 4096)

        def step(accumulator: DryAccumulator = accumulator, batch: list[TokenGroup] = batch) -> None:
            accumulator.gradient(batch, 0)

        step()
        found = _watched(bench, step)
        bench.check(
            f"Does a step of {name} wait for the device, recompute {grade}?",
            "nowhere but at its end",
            "nowhere" if not found else ", ".join(f"{place} ({count}x)" for place, count in found.most_common(3)),
            not found,
        )


def _watched(bench: Bench, step: Callable[[], None]) -> Counter[str]:
    """Where PyTorch says that a step waits; it says it in the words of a warning."""
    found: Counter[str] = Counter()

    def note(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        if "synchroniz" not in str(message):
            return
        own = [frame for frame in traceback.extract_stack() if "/dpo_cli/" in frame.filename.replace("\\", "/")]
        place = own[-1] if own else traceback.FrameSummary(filename, lineno, "")
        found[f"{place.filename.rpartition('/')[2]}:{place.lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        bench.wait()
        if bench.on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            if bench.on_gpu:
                torch.cuda.set_sync_debug_mode("default")
    return found


# --- kernels ------------------------------------------------------------------------------


def kernels(bench: Bench) -> None:
    """Each kernel that is tried out before use: right, refused or not there, and what it saves."""
    device = bench.policy("tiny").scorer.device
    for name, make in VARLEN_KERNELS.items():
        kernel = make()
        if kernel is None:
            bench.check(f"Attention by {name}?", "right where it is installed", "not installed", None)
            continue
        cases = [*product(HEAD_SIZES[: 1 if bench.small else None], HEADS, (None, 8), (None, 30.0))]
        for dtype in NARROW:
            refused: Counter[str] = Counter()
            for head_size, heads, window, softcap in cases:
                settings = AttentionSettings(head_size**-0.5, window, softcap)
                if (reason := reason_against(kernel, device, dtype, head_size, settings, heads)) is not None:
                    kind = (", window" if window else "") + (", soft cap" if softcap else "")
                    refused[f"head size {head_size}, {heads[0]} on {heads[1]}{kind}: {reason}"] += 1
            plain = [what for what in refused if "soft cap" not in what and "window" not in what]
            bench.figures[f"{name} {dtype} refused"] = [*refused]
            bench.check(
                f"Attention by {name}, {_named(dtype)}: head sizes 32 to 256, 2 and 7 queries a key, windows, caps?",
                "right in all cases without window and cap",
                f"right in {len(cases) - len(refused)} of {len(cases)}; {next(iter(plain or refused), 'none refused')}",
                not plain,
            )
    for dtype in NARROW:
        _check_fused(bench, device, dtype)
        _check_product(bench, device, dtype)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_fused(bench: Bench, device: torch.device, dtype: torch.dtype) -> None:
    tokens, width = (32, 64) if bench.small else (4096, 14336)
    one, other = (torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.ones(width, device=device, dtype=dtype)
    size = min(128, width)
    heads, sine = one.view(1, tokens, -1, size).transpose(1, 2), other.detach()[None, :, :size]
    cosine = sine.flip(-1)

    def eager_norm() -> torch.Tensor:
        wide = one.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(dtype)

    def eager_rotation() -> torch.Tensor:
        first, second = heads.chunk(2, -1)
        return heads * cosine[:, None] + torch.cat([-second, first], -1) * sine[:, None]

    pairs = {
        fused.ROTATION: (eager_rotation, lambda: fused.rotate(heads, cosine[:, None], sine[:, None])),
        fused.NORM: (eager_norm, lambda: fused.rms_norm(one, weight, 1e-6)),
        fused.SWIGLU: (lambda: silu(one) * other, lambda: fused.swiglu(one, other)),
    }
    for name, forms in pairs.items():
        reason = fused.reason_against(name, device, dtype)
        ratio = None
        if reason is None:
            times = [bench.seconds(lambda form=form: form().sum().backward(), 10) for form in forms]
            ratio = times[0] / times[1]
        bench.check(
            f"{name} in one kernel, {_named(dtype)}, forward and backward?",
            "right, and faster than the model's own code",
            f"refused: {reason}" if ratio is None else f"right; eager / fused {ratio:.2f} in time",
            ratio is not None and (ratio > 1 or bench.at_size(False)),
        )


def _check_product(bench: Bench, device: torch.device, dtype: torch.dtype) -> None:
    rows, inner, columns = (8, 64, 100) if bench.small else (256, 4096, 32000)
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = (torch.randn(inner, columns, device=device) * LOGIT_STD * inner**-0.5).to(dtype)
    exact = left.double() @ right.double()
    off, rounded = ((found.double() - exact).abs().max().item() for found in (wide_product(left, right), left @ right))
    bench.check(
        f"Logits of std {LOGIT_STD:g} by a product with float32 sums, {_named(dtype)}?",
        "off by less than 0.001",
        f"off by {off:.2g}; rounded to {_named(dtype)} by {rounded:.2g}",
        off < 1e-3,
    )


# --- rounding -----------------------------------------------------------------------------


def margins(bench: Bench) -> None:
    """Probe and step-0 gate on logits as large as trained models have them."""
    for dtype in map(_named, NARROW):
        policy = bench.policy("llama-3.1-8b", compute_dtype=dtype)
        groups = bench.pairs(policy, 16)
        _sharpen(policy, groups)
        scorer, model = policy.scorer, policy.model.eval()
        with scorer:
            verdict = probe_layouts(scorer, model)
            scorer.layout = verdict.layout
            reference = _reference(policy, groups)
            gate = _gate(policy, groups, reference)
            stale = _gate(policy, groups, {row: [each - 0.6 for each in logps] for row, logps in reference.items()})
        bench.check(
            f"Probe in {dtype}: layout, difference, what rounding asks for, nats?",
            "shared, within what is allowed",
            f"{verdict.layout}, {verdict.difference:.2g} of {verdict.tolerance:.2g} allowed, {verdict.asked:.2g} asked",
            verdict.layout == "shared",
        )
        bench.check(f"Step-0 gate in {dtype}, logits of std {LOGIT_STD:g}?", "passes", gate, "passes" in gate)
        bench.check(f"The same where references are 0.6 nats off, {dtype}?", "stopped", stale, "stopped" in stale)
        del policy, scorer, model
        release_memory()


@torch.no_grad()
def _sharpen(policy: Policy, groups: list[TokenGroup]) -> None:
    """Scale the output embedding until logits have the standard deviation of a trained model's."""
    hidden = policy.scorer.predict([TokenGroup("one", "one", groups[0].prompt, groups[0].completions[:1])])
    weight = policy.model.get_output_embeddings().weight
    weight.mul_(LOGIT_STD / (hidden.to(weight.dtype) @ weight.T).float().std())


def _reference(policy: Policy, groups: list[TokenGroup]) -> dict[str, list[float]]:
    """As precompute-ref finds it: answers by prompt, in batches of its own."""
    policy.model.eval()
    budget = TokenBudget(1024, "gpu-check", policy.reporter)
    batches = score_groups(policy.scorer, missing_groups(groups, (), 1024), budget)
    found = {row["key"]: row["logp"] for rows in batches for row in rows}
    return {each.id: [found[completion_key(each.prompt, answer)] for answer in each.completions] for each in groups}


def _gate(policy: Policy, groups: list[TokenGroup], reference: dict[str, list[float]]) -> str:
    objective = PairObjective(TrainParams(), reference)
    try:
        seen = check_step_zero(policy.model, policy.scorer, objective, groups, 4096)
    except StaleArtifactError as error:
        return f"stopped: {str(error).partition(', ')[2].partition(': ')[0]}"
    doubt = "" if seen.doubt is None else "; in doubt, as rounding is large"
    return f"passes: margin {seen.max_abs_margin:.2g}, log-probability off by {seen.max_abs_logp_difference:.2g}{doubt}"
