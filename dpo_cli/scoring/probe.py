"""Which layout is right for a model: found by numbers at load, not by a list of families.

A few random groups are scored in each layout and one completion at a time with the model's own
attention. The cheapest layout that agrees is taken. A model may have what one row cannot
hold: state that runs from one text into the next (convolutions, state spaces), distances that are
counted along the row (ALiBi). Where a difference could only show beyond the probe's few hundred
tokens, the configuration decides: attention in chunks, or windows that no layer asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dpo_cli.core import paths
from dpo_cli.core.artifacts import write_json
from dpo_cli.core.environment import is_gpu
from dpo_cli.core.errors import MachineError, first_line, is_out_of_memory
from dpo_cli.core.params import RuntimeParams
from dpo_cli.core.progress import Reporter
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.scoring.attention import Attending, UnsupportedLayerError
from dpo_cli.scoring.fused import describe_fused
from dpo_cli.scoring.kernels import describe_products
from dpo_cli.scoring.layout import LAYOUTS, MIN_SHARED_TOKENS, LayoutName
from dpo_cli.scoring.limits import left_unquantized
from dpo_cli.scoring.scorer import MAX_READ_SHARE, HeadName, Scorer, engine_version, evaluating

TOLERANCE = 1e-4
"""Nats by which a completion's log-probability may differ in float32."""
RELATIVE_TOLERANCE = 2e-6
"""The same as a share of the largest one that is compared, where that is more: float32 has seven digits."""
BFLOAT16_TOLERANCE = 0.05
"""The least that is allowed in bfloat16, where another kernel alone moves a sum by this much."""
MAX_TOLERANCE = 0.5
"""The most that is allowed in bfloat16 however much rounding alone moves a sum, nats, of 25 tokens or fewer."""
NOISE_FACTOR = 4.0
_MAX_WINDOW = 512
"""A sliding window up to this size is exceeded by the probe's longest prompt."""
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_MEMORY = "layouts.json"
_READ = "what is read"
_ALL = "all positions"
_HEADS: dict[HeadName, str] = {
    "linear": "",
    "whole": "; logits from the model's whole forward: runtime.head_mib cannot bound them",
}
"""What the user is told of a head."""


@dataclass(frozen=True)
class LayoutChoice:
    """Which layout a model goes through, and why.

    Attributes:
        layout: Its name.
        difference: Largest difference from one completion at a time, nats.
        tolerance: What was allowed, nats.
        asked: What rounding alone asked for, nats: more than was allowed where that has a limit.
        refused: Why each cheaper layout was not taken, by its name.
        forced: Whether runtime.layout chose it.
        head: Where its logits come from.
        attention: What computes its attention.
        attention_refused: Why kernels were not used, for some layer at least, by their names.
        last_mlp: Which positions of a row the last layer's MLP is computed on, or why it is on all.
    """

    layout: LayoutName
    difference: float
    tolerance: float
    asked: float
    refused: dict[str, str]
    forced: bool
    head: HeadName
    attention: str
    attention_refused: dict[str, str]
    last_mlp: str

    def describe(self) -> str:
        """One line for the user; metrics.json says the rest."""
        how = " (forced)" if self.forced else ""
        layout = f"layout {self.layout}{how}{_reasons(self.refused)}"
        if self.asked > self.tolerance:
            layout += f", off by up to {self.tolerance:.2g} nats though rounding alone asks for {self.asked:.2g}"
        return f"{layout}; attention by {self.describe_attention()}{_HEADS[self.head]}"

    def describe_attention(self) -> str:
        """What computes the attention, and what does not, and why."""
        return f"{self.attention}{_reasons(self.attention_refused)}"

    def metrics(self) -> dict[str, Any]:
        """What metrics.json says of it."""
        return {
            "layout": self.layout,
            "layout_difference": self.difference,
            "layout_refused": self.refused,
            "head": self.head,
            "attention": self.attention,
            "attention_refused": self.attention_refused,
            "last_mlp": self.last_mlp,
        }


def _reasons(refused: dict[str, str]) -> str:
    return "".join(f"; not {name}: {reason}" for name, reason in refused.items())


def open_scorer(
    model: torch.nn.Module, compute_dtype: torch.dtype, runtime: RuntimeParams, reporter: Reporter, stage: str
) -> tuple[Scorer, LayoutChoice]:
    """A scorer in the cheapest layout that is right for the model, or in the one that runtime.layout forces.

    The choice is remembered in the scratch area, by the model's configuration and what else it
    depends on.

    Raises:
        MachineError: The forced layout, or every layout, gives other numbers than the plain computation.
    """
    head_bytes = None if runtime.head_mib is None else runtime.head_mib << 20
    scorer = Scorer(model, compute_dtype, "padded", head_bytes)
    forced = None if runtime.layout == "auto" else runtime.layout
    memory = paths.scratch_root() / _MEMORY
    key = _key(model, compute_dtype, scorer, forced)
    choice = _recall(memory, key)
    if choice is None:
        with scorer, evaluating(model):
            choice = probe_layouts(scorer, model, forced)
        _remember(memory, key, choice)
    scorer.layout = choice.layout
    scorer.max_read_share = MAX_READ_SHARE if choice.last_mlp == _READ else 0.0
    choice = replace(choice, head=scorer.head)
    if is_gpu(scorer.device):
        # kernels are tried out now, and not within a checkpointed layer
        with scorer, torch.no_grad(), evaluating(model):
            scorer.score(probe_groups(scorer.config.vocab_size, 8)[:1])
        choice = replace(choice, **_attention_of(scorer, choice.layout))
    kernels = describe_fused(model, scorer.device, compute_dtype) + describe_products(scorer.device, compute_dtype)
    reporter.say(f"{stage}: {choice.describe()}{kernels}")
    names, num_bytes = left_unquantized(model)
    if names:
        reporter.warn(
            f"{stage}: quantization nf4 is of linear layers alone and leaves {num_bytes / 2**30:.2f} GiB of weights as"
            f" they are: {', '.join(names[:3])}"
        )
    return scorer, choice


@torch.no_grad()
def probe_layouts(scorer: Scorer, model: Any, forced: LayoutName | None = None) -> LayoutChoice:
    """Score random groups in each layout until one agrees with one completion at a time.

    Raises:
        MachineError: The forced layout, or every layout, gives other numbers, or the model gives none.
    """
    config = scorer.config
    groups = probe_groups(config.vocab_size, _longest_prompt(config))
    alone = torch.stack([_alone(scorer, group) for group in groups])
    if alone.isnan().any():
        raise MachineError(f"the model gives NaN as log-probabilities{_spoiled(model)}")
    padded = scorer.score(groups, "padded").logps_BK.cpu()
    noise = (padded - alone).abs().max().item()
    asked = tolerance = max(TOLERANCE, RELATIVE_TOLERANCE * alone.abs().max().item())
    if scorer.compute_dtype != torch.float32:
        asked = max(BFLOAT16_TOLERANCE, NOISE_FACTOR * noise)
        longest = max(len(completion) for group in groups for completion in group.completions)
        tolerance = allowed_difference(noise, longest, scorer.compute_dtype)
    refused: dict[str, str] = {}
    for name in (forced,) if forced else LAYOUTS:
        if name == "padded" and scorer.compute_dtype != torch.float32:
            tolerance = max(tolerance, noise)  # it is what rounding was measured on
        last_mlp = _READ if name != "padded" and scorer.can_read_rows else _ALL
        scorer.max_read_share = 1.0 if last_mlp == _READ else 0.0
        reason, difference = _reason_against(name, scorer, config, groups, alone, tolerance)
        if reason is not None and last_mlp == _READ:
            last_mlp, scorer.max_read_share = f"{_ALL} ({reason})", 0.0
            reason, difference = _reason_against(name, scorer, config, groups, alone, tolerance)
        scorer.max_read_share = 0.0
        if reason is None:
            said: dict[str, Any] = {"forced": forced is not None, "head": scorer.head, "last_mlp": last_mlp}
            return LayoutChoice(name, difference, tolerance, asked, refused, **said, **_attention_of(scorer, name))
        refused[name] = reason
    if forced:
        raise MachineError(
            f"params.yaml: runtime.layout {forced} is wrong for this model: {refused[forced]}; set it to auto"
        )
    raise MachineError(
        "this model's log-probabilities depend on what else is in a batch"
        f" (padded: {refused['padded']}); it cannot be scored"
    )


def allowed_difference(noise: float, num_tokens: int, compute_dtype: torch.dtype) -> float:
    """By how much two sums over so many tokens may differ that should be equal, nats.

    Four times what rounding alone was seen to do, and at least 1e-4, or 0.05 in narrower numbers than float32. There it
    has a limit, so that no model is so noisy that a wrong sum would pass: 0.5 up to 25 tokens, and with more in
    proportion to their square root, as independent errors add up.
    """
    if compute_dtype == torch.float32:
        return max(TOLERANCE, NOISE_FACTOR * noise)
    limit = MAX_TOLERANCE * math.sqrt(max(1.0, num_tokens / 25))
    return min(limit, max(BFLOAT16_TOLERANCE, NOISE_FACTOR * noise))


def _spoiled(model: Any) -> str:
    """Which of a model's parameters is the first that is no number, in words."""
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)  # a 4-bit weight is as its scales are
        numbers = parameter if state is None else state.absmax
        if numbers.is_floating_point() and not numbers.isfinite().all():
            return f": {name} holds NaN or infinity"
    return ", though its weights are numbers: they are too large for its compute dtype; see runtime.compute_dtype"


def _attention_of(scorer: Scorer, layout: LayoutName) -> dict[str, Any]:
    """What computed the attention of the last forward, as a choice has it."""
    attended = scorer.last_attended
    if layout == "padded" or attended is None:
        return {"attention": f"the model's own {scorer.own_attention}", "attention_refused": {}}
    return {"attention": ", ".join(sorted(attended.kernels)), "attention_refused": dict(attended.refused)}


def _alone(scorer: Scorer, group: TokenGroup) -> torch.Tensor:
    """float64 [K], every completion in a forward pass of its own."""
    singles = [TokenGroup(group.id, group.group, group.prompt, (completion,)) for completion in group.completions]
    return torch.cat([scorer.score([single], "padded").logps_BK[0] for single in singles]).cpu()


def _reason_against(
    name: LayoutName,
    scorer: Scorer,
    config: Any,
    groups: Sequence[TokenGroup],
    alone: torch.Tensor,
    tolerance: float,
) -> tuple[str | None, float]:
    """Why a layout will not do, None where it will, and by how much it is off."""
    if name != "padded":
        layer_types = set(getattr(config, "layer_types", None) or ())
        if strange := sorted(layer_types - _KNOWN_LAYERS):
            return f"its configuration has layers of {strange[0]}", float("inf")
        if getattr(config, "attention_chunk_size", None):
            return "its attention is in chunks", float("inf")
    try:
        found = scorer.score(groups, name).logps_BK.cpu()
    except (UnsupportedLayerError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        return f"it fails ({first_line(error)})", float("inf")
    difference = (found - alone).abs().nan_to_num(nan=float("inf")).max().item()
    if not difference <= tolerance:
        return f"off by {difference:.2g} nats", difference
    if name != "padded" and (reason := _missing_window(scorer.last_attended, config)):
        return reason, difference
    return None, difference


def _missing_window(attended: Attending | None, config: Any) -> str | None:
    """Why attention was not what the configuration says, where short texts cannot show it."""
    if attended is None or not attended.windows:
        return "its layers do not call the attention that was set"
    layer_types = getattr(config, "layer_types", None)
    slides = "sliding_attention" in layer_types if layer_types else bool(getattr(config, "sliding_window", None))
    if slides and attended.windows == {None}:
        return "its layers do not say which window they slide"
    return None


def _longest_prompt(config: Any) -> int:
    """Tokens of the probe's longest prompt: beyond the sliding window, where that is small enough."""
    window = getattr(config, "sliding_window", None)
    longest = window + 7 if isinstance(window, int) and window <= _MAX_WINDOW else 40
    limit = getattr(config, "max_position_embeddings", None)
    return min(longest, limit - 40) if isinstance(limit, int) and limit > 48 else min(longest, 8)


def probe_groups(vocabulary: int, longest_prompt: int) -> list[TokenGroup]:
    """Three random groups of three completions, two of which begin alike for a while in each."""
    rng = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1, vocabulary) for _ in range(count))

    groups = []
    for number, length in enumerate((longest_prompt, 1, 6)):
        alike = tokens(MIN_SHARED_TOKENS + number)
        completions = (alike + tokens(3), tokens(9 + 2 * number), alike + tokens(7))
        groups.append(TokenGroup(f"probe{number}", f"probe{number}", tokens(length), completions))
    return groups


# --- memory -------------------------------------------------------------------------------


def _key(model: Any, compute_dtype: torch.dtype, scorer: Scorer, forced: str | None) -> str:
    """A digest of everything that a choice depends on."""
    config = {name: value for name, value in scorer.config.to_dict().items() if not name.startswith("_")}
    parts = {
        "config": config,
        "classes": sorted({type(module).__name__ for module in model.modules()}),
        "dtype": str(compute_dtype),
        "device": torch.cuda.get_device_name(scorer.device) if is_gpu(scorer.device) else scorer.device.type,
        "forced": forced,
        "engine": engine_version(compute_dtype),
        "libraries": [_version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "flash-attn")],
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _version(name: str) -> str | None:
    """Of a library; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _load(memory: Path) -> dict[str, Any]:
    try:
        found = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _recall(memory: Path, key: str) -> LayoutChoice | None:
    entry = _load(memory).get(key)
    try:
        choice = LayoutChoice(**entry) if entry else None
    except TypeError:
        return None
    return choice if choice and choice.layout in LAYOUTS else None


def _remember(memory: Path, key: str, choice: LayoutChoice) -> None:
    """Keep a choice; a scratch area that cannot be written only costs the next probe."""
    try:
        write_json(memory, {**_load(memory), key: asdict(choice)})
    except OSError:
        return
