"""What ``dpo-cli plan`` prints: memory, lengths, what to change, time, disk; each figure says where it comes from."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter, Status
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.dry_run.plan import GIB, Change, Lengths, Plan, changes, measure_lengths, micro_batches
from dpo_cli.dry_run.tasks import Subject
from dpo_cli.scoring.layout import num_row_tokens
from dpo_cli.training.fit import count_steps

Row = tuple[Status, str, str]
_COPIES = 2
"""Of what a stage makes: in the project, and in DVC's cache."""
_BYTES_A_SCORED_TOKEN = 6
"""Of the reference cache: a float32, and its share of keys and sums."""


@dataclass(frozen=True)
class Work:
    """Tokens that a stage puts through the model.

    Attributes:
        steps: Optimizer steps.
        trained: Tokens forward and backward.
        scored: Tokens forward alone: held-out losses.
    """

    steps: int
    trained: float
    scored: float


def work_of(plan: Plan, held_out: Sequence[TokenGroup]) -> Work:
    """What a training does with its data."""
    settings, layout = plan.task.settings, plan.counted.layout
    steps = count_steps(settings, len(plan.task.groups))
    steps_an_epoch = math.ceil(len(plan.task.groups) / settings.batch_size)
    total = sum(num_row_tokens(group, layout) for group in plan.task.groups)
    measured = 2 + (max(0, (steps - 1) // settings.eval_steps) if settings.eval_steps else 0)
    scored = measured * sum(num_row_tokens(group, layout) for group in held_out)
    return Work(steps, total * steps / steps_an_epoch, scored)


@dataclass(frozen=True)
class Outlook:
    """A plan of each training, with what there is to say of it.

    Attributes:
        plans: The trainings.
        lengths: Of each one's rows.
        work: Of each one.
        changes: Of each one: what makes it fit; none where it does.
        measured: What ``--measure`` found, by stage; empty without it.
        operations_per_s: As fast as this machine multiplies; None for a card that is not here.
        watts: The most that the card takes; None where nothing tells.
    """

    subject: Subject
    plans: tuple[Plan, ...]
    lengths: tuple[Lengths, ...]
    work: tuple[Work, ...]
    changes: tuple[tuple[Change, ...], ...]
    measured: Mapping[str, Any]
    operations_per_s: float | None
    watts: float | None

    @property
    def fits(self) -> bool:
        """Whether every training does, as predicted and, if it was, as measured."""
        return all(plan.fits for plan in self.plans) and "ended" not in self.measured


def look_ahead(
    subject: Subject,
    plans: Sequence[Plan],
    params: Params,
    measured: Mapping[str, Any],
    operations_per_s: float | None,
    watts: float | None,
) -> Outlook:
    """All that there is to say of some plans."""
    return Outlook(
        subject,
        tuple(plans),
        tuple(measure_lengths(plan.task.groups, plan.counted.layout) for plan in plans),
        tuple(work_of(plan, subject.held_out.get(plan.task.stage, ())) for plan in plans),
        tuple(() if plan.fits else tuple(changes(plan, subject.config, params.runtime)) for plan in plans),
        measured,
        operations_per_s,
        watts,
    )


def stage_seconds(outlook: Outlook) -> dict[str, float]:
    """Seconds by stage: as measured, or at the least, as fast as the machine multiplies; none for other cards."""
    found: dict[str, float] = {}
    for plan, work in zip(outlook.plans, outlook.work, strict=True):
        stage = plan.task.stage
        scored_first = 0
        if stage == "train":
            groups = (*plan.task.groups, *outlook.subject.held_out.get("train", ()))
            scored_first = sum(num_row_tokens(group, plan.counted.layout) for group in groups)
        if measured := outlook.measured.get(stage):
            train_s, pass_s = (1 / measured[name] for name in ("tokens_per_s", "reference_tokens_per_s"))
        elif outlook.operations_per_s:
            weights = plan.counted.sizes.layer_weights + plan.counted.sizes.adapter_weights
            train_s, pass_s = (each * weights / outlook.operations_per_s for each in (4, 2))
        else:
            continue
        if scored_first:
            found["precompute-ref"] = scored_first * pass_s
        found[stage] = work.trained * train_s + work.scored * pass_s
    return found


def disk_bytes(outlook: Outlook) -> int:
    """What the stages write: adapters, a checkpoint with its optimizer, the reference cache."""
    total = 0
    for plan in outlook.plans:
        total += _COPIES * plan.counted.adapter_bytes + 3 * plan.counted.adapter_bytes
        if plan.task.stage == "train":
            groups = (*plan.task.groups, *outlook.subject.held_out.get("train", ()))
            total += _COPIES * _BYTES_A_SCORED_TOKEN * sum(sum(group.sizes[1:]) for group in groups)
    return total


# --- in words -------------------------------------------------------------------------------


def report(outlook: Outlook, reporter: Reporter) -> None:
    """Print it."""
    target, subject = outlook.plans[0].target, outlook.subject
    reporter.table("plan", [("model", subject.name), ("data", subject.data), ("machine", target.name)])
    for index, plan in enumerate(outlook.plans):
        fits = plan.fits
        headline = f"{plan.task.stage} {'fits' if fits else 'DOES NOT FIT'}: " + _against_free(plan)
        rows = [*_memory_rows(outlook, index), *_length_rows(outlook, index), *_change_rows(outlook.changes[index])]
        reporter.verdict(headline, "good" if fits else "bad", rows)
    reporter.table("time and disk", list(_other_rows(outlook)))


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.0f} MiB"


def _against_free(plan: Plan) -> str:
    target = plan.target
    total = f" of {target.total_bytes / GIB:.1f}" if target.total_bytes else ""
    return f"{_size(plan.peak_bytes)} at the peak, {target.free_bytes / GIB:.1f} GiB{total} free"


def _memory_rows(outlook: Outlook, index: int) -> Iterator[Row]:
    plan = outlook.plans[index]
    counted, chosen, target = plan.counted, plan.chosen, plan.target
    what = "CUDA itself" if target.capability else "Python and its libraries"
    yield "plain", "the process", f"{_size(target.process_bytes)}: {what}"
    yield "plain", "weights", f"{_size(counted.weight_bytes)} in {plan.task.quantization}, adapter included"
    names, size = counted.plain
    if names:
        found = f"{_size(size)} stay in plain numbers though {plan.task.quantization} was asked for"
        yield "warn", "not in 4 bits", f"{found}: {', '.join(names)}"
    yield "plain", "training", f"{_size(counted.training_bytes)}: gradients and optimizer of the adapter"
    yield (
        "plain",
        "activations",
        f"{_size(plan.activation_bytes)}: recompute {chosen.grade}; the largest micro-batch has {plan.largest} tokens,"
        f" 99% have at most {plan.most_of} (runtime.max_tokens_per_microbatch {chosen.max_tokens})",
    )
    if measured := outlook.measured.get(plan.task.stage):
        peak = measured["peak_bytes"] + (target.process_bytes if target.capability else 0)
        off = plan.peak_bytes / peak - 1
        yield "plain", "measured", f"{_size(peak)} at the peak; the prediction is off by {off:+.1%}"


def _length_rows(outlook: Outlook, index: int) -> Iterator[Row]:
    plan, lengths = outlook.plans[index], outlook.lengths[index]
    number = len(plan.task.groups)
    yield (
        "plain",
        "rows",
        f"{number}; tokens through the model: median {lengths.median:.0f}, 99% have at most {lengths.most_of:.0f},"
        f" the longest {lengths.longest}",
    )
    if not lengths.num_outliers:
        return
    layout = plan.counted.layout
    usual = [group for group in plan.task.groups if group.longest <= lengths.bound]
    _, largest = micro_batches(replace(plan.task, groups=usual), layout, plan.chosen.max_tokens)
    saved = plan.peak_bytes - plan.peak_of(plan.chosen.grade, largest)
    row = f"{lengths.num_outliers} of {number} rows {'is' if lengths.num_outliers == 1 else 'are'} much longer than all"
    found = f"{row} others, up to {lengths.longest} tokens ({lengths.longest_id[:12]})"
    cost = f", and cost {_size(saved)} of the peak" if saved > 0 else ", without effect on the peak"
    yield "warn", "much longer", f"{found}{cost}; {plan.task.length}={lengths.bound} leaves them out"


def _change_rows(found: Sequence[Change]) -> Iterator[Row]:
    for number, change in enumerate(found):
        peak = "" if math.isnan(change.peak_bytes) else f": {_size(change.peak_bytes)}"
        word = "set" if number == 0 else "and"
        yield "good" if change.fits else "plain", word, f"{change.setting}{peak}; it costs {change.cost}"


def _other_rows(outlook: Outlook) -> Iterator[tuple[str, str]]:
    seconds = stage_seconds(outlook)
    how = (
        "as measured" if outlook.measured else "at the least, as fast as this machine multiplies; --measure tells more"
    )
    for plan, work in zip(outlook.plans, outlook.work, strict=True):
        yield f"{plan.task.stage}, steps", f"{work.steps} of {plan.task.settings.batch_size} rows"
    if seconds:
        for stage, each in seconds.items():
            yield stage, f"{in_words(each)} ({how})"
        total = sum(seconds.values())
        yield "in all", f"{in_words(total)}, evaluate not counted: answers are as long as the model makes them"
        if outlook.watts is not None:
            yield (
                "energy",
                f"up to {outlook.watts * total / 3.6e6:.2f} kWh: the card takes at most {outlook.watts:.0f} W",
            )
    else:
        yield "time", "not predicted: dpo-cli bench --card predicts the speed of cards that are not here"
    here = Path(os.environ.get("DVC_ROOT", "."))
    yield (
        "disk",
        f"{_size(disk_bytes(outlook))} are written, {shutil.disk_usage(here).free / GIB:.0f} are free;"
        f" the model's files take {outlook.subject.file_bytes / GIB:.2f}",
    )


def in_words(seconds: float) -> str:
    """A time as people say it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def figures(outlook: Outlook) -> dict[str, Any]:
    """The same as one object."""
    target = outlook.plans[0].target
    return {
        "model": outlook.subject.name,
        "data": outlook.subject.data,
        "machine": target.name,
        "is_prediction": target.is_prediction,
        "free_bytes": target.free_bytes,
        "fits": outlook.fits,
        "stages": {
            plan.task.stage: {
                "fits": plan.fits,
                "peak_bytes": round(plan.peak_bytes),
                "process_bytes": target.process_bytes,
                "weight_bytes": plan.counted.weight_bytes,
                "unquantized": plan.counted.plain[0],
                "unquantized_bytes": plan.counted.plain[1],
                "training_bytes": plan.counted.training_bytes,
                "activation_bytes": round(plan.activation_bytes),
                "max_tokens_per_microbatch": plan.chosen.max_tokens,
                "largest_microbatch_tokens": plan.largest,
                "microbatch_tokens_p99": plan.most_of,
                "recompute": plan.chosen.grade,
                "num_rows": len(plan.task.groups),
                "tokens_p99": lengths.most_of,
                "tokens_longest": lengths.longest,
                "num_much_longer": lengths.num_outliers,
                "steps": work.steps,
                "changes": [change.setting for change in found],
                "measured": outlook.measured.get(plan.task.stage),
            }
            for plan, lengths, work, found in zip(
                outlook.plans, outlook.lengths, outlook.work, outlook.changes, strict=True
            )
        },
        "seconds": stage_seconds(outlook),
        "disk_bytes": disk_bytes(outlook),
    }
