"""Memory settings, and memory that runs out, change no result; and memory is what the settings say."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_cli.core import environment
from dpo_cli.core.errors import Interrupted, MachineError, is_out_of_memory
from dpo_cli.core.interrupts import StopRequest
from dpo_cli.core.params import RuntimeParams, TrainParams
from dpo_cli.core.training_params import LoraParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.adapters import add_adapter
from dpo_cli.models.project import Workplace
from dpo_cli.scoring.layout import LAYOUTS, LayoutName, lay_out
from dpo_cli.scoring.recompute import MemoryPlan, set_recompute
from dpo_cli.scoring.scorer import Scorer, Scores
from dpo_cli.training import memory
from dpo_cli.training.accumulation import Accumulator, Limits
from dpo_cli.training.fit import Fit
from dpo_cli.training.objective import PairObjective
from dpo_cli.training.protocols import Learner
from tests import small_training
from tests.live_memory import LiveMemory
from tests.small_training import CPU, Lab, adapter, logged, reference, same_bytes, stop_at

SETTINGS = TrainParams(learning_rate=8e-3, batch_size=8, max_steps=6, eval_steps=3)
SHORT = SETTINGS.model_copy(update={"max_steps": 2})


@pytest.fixture(scope="module")
def pairs(make_groups: Callable[..., list[TokenGroup]]) -> list[TokenGroup]:
    """Pairs of about 100 tokens, three optimizer batches of them."""
    return make_groups(24, seed=1, prompt_lengths=(5, 60), completion_lengths=(3, 30))


def open_in(model: Any, layout: LayoutName) -> Scorer:
    return Scorer(model, torch.float32, layout)


def train(
    scorer: Scorer,
    model: Any,
    pairs: Sequence[TokenGroup],
    max_tokens: int,
    folder: Path,
    reporter: Any,
    *,
    recompute: Any = "none",
    settings: TrainParams = SETTINGS,
) -> Fit:
    """DPO of a model from its own references; the two shortest pairs are the held-out ones too."""
    model.eval()
    learner = Learner(model, scorer, PairObjective(TrainParams(beta=0.1), reference(scorer, pairs)))
    groups = pairs, sorted(pairs, key=lambda pair: pair.longest)[:2]
    runtime = {"max_tokens_per_microbatch": max_tokens, "recompute": recompute}
    return small_training.train(learner, groups, folder, reporter, settings, **runtime)


def sizes(scorer: Scorer, pairs: Sequence[TokenGroup], max_tokens: int) -> list[int]:
    """Tokens of each micro-batch."""
    return [
        lay_out([pairs[index] for index in batch], scorer.layout).num_tokens
        for batch in scorer.split(pairs, max_tokens)
    ]


# --- the budget ---------------------------------------------------------------------------


def test_neither_the_token_budget_nor_the_layout_changes_the_curve(lab: Lab, pairs: Any, reporter: Any) -> None:
    curves = {}
    for layout in LAYOUTS:
        for max_tokens in (256, 8192):
            model = lab.policy()
            with open_in(model, layout) as scorer:
                assert (len(scorer.split(pairs[:8], max_tokens)) > 1) == (max_tokens == 256)
                fitted = train(scorer, model, pairs, max_tokens, lab.folder / f"{layout} {max_tokens}", reporter)
            curves[layout, max_tokens] = logged(fitted, "loss"), logged(fitted, "eval_loss", "rewards/margins")
    losses, others = curves["padded", 8192]
    assert losses[-1] < 0.65, "a curve that does not move proves little"
    for setting, (found, beside) in curves.items():
        assert found == pytest.approx(losses, rel=1e-5), setting
        assert beside == pytest.approx(others, rel=1e-4, abs=1e-6), setting


@pytest.mark.parametrize(("layout", "dropout"), [("shared", 0.0), ("shared", 0.1), ("padded", 0.1)])
def test_what_is_computed_again_changes_nothing(
    lab: Lab, layout: LayoutName, dropout: float, pairs: Any, reporter: Any
) -> None:
    """With dropout too: what is computed again drops what was dropped the first time, and ``auto`` draws nothing."""
    found = {}
    for grade in ("none", "elementwise", "layers", "auto"):
        model = lab.policy(dropout)
        with open_in(model, layout) as scorer:
            fitted = train(scorer, model, pairs, 300, lab.folder / grade, reporter, recompute=grade, settings=SHORT)
        assert grade in ("auto", fitted.recompute)
        found[grade] = logged(fitted, "loss"), adapter(model)
    for losses, weights in found.values():
        assert losses == pytest.approx(found["none"][0], rel=1e-6)
        assert same_bytes(weights, found["none"][1]), "on the CPU to the bit"


# --- memory runs out ----------------------------------------------------------------------


def run_out_above(scorer: Scorer, limit: int, monkeypatch: pytest.MonkeyPatch, *, training: bool = True) -> list[int]:
    """Let scoring fail, when all is computed, where a micro-batch has more tokens; returns the sizes that failed.

    Only that for training, or only that of held-out pairs.
    """
    found: list[int] = []
    score = scorer.score

    def limited(groups: Sequence[TokenGroup], **asked: Any) -> Scores:
        scores = score(groups, **asked)
        size = lay_out(groups, scorer.layout).num_tokens
        if torch.is_grad_enabled() == training and size > limit:
            found.append(size)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return scores

    monkeypatch.setattr(scorer, "score", limited)
    return found


def run_out_once(scorer: Scorer, model: Any, call: int, where: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let one micro-batch of training, counted from 1, fail at the end of its forward or of its backward pass.

    At the end of the backward pass: when the gradient of the first layer's adapter is known, and most others are added.
    """
    calls: list[int] = []
    score = scorer.score
    first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    hooks: list[Any] = []

    def out_of_memory(*_: Any) -> None:
        for hook in hooks:
            hook.remove()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def failing(groups: Sequence[TokenGroup], **asked: Any) -> Scores:
        scores = score(groups, **asked)
        if torch.is_grad_enabled():
            calls.append(len(groups))
            if len(calls) == call and where == "forward":
                out_of_memory()
            elif len(calls) == call:
                hooks.append(first.register_hook(out_of_memory))
        return scores

    monkeypatch.setattr(scorer, "score", failing)
    return calls


@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_memory_runs_out_the_budget_is_halved_and_the_losses_stay(
    lab: Lab, layout: LayoutName, pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 1024 tokens over 512 to 256, where all fit."""
    small = lab.policy()
    with open_in(small, layout) as scorer:
        limit = max(256, *(max(sizes(scorer, pairs[start : start + 8], 256)) for start in (0, 8, 16)))
        expected = train(scorer, small, pairs, 256, lab.folder / "small", lab.reporter())
    model, reporter = lab.policy(), lab.reporter()
    with open_in(model, layout) as scorer:
        failures = run_out_above(scorer, limit, monkeypatch)
        fitted = train(scorer, model, pairs, 1024, lab.folder / "halved", reporter)
    assert failures
    assert reporter.warned == [
        f"train: out of memory; continuing with {tokens} tokens at once (runtime.max_tokens_per_microbatch);"
        " without dropout that changes no result beyond rounding"
        for tokens in (512, 256)
    ]
    assert fitted.max_tokens == 256
    assert logged(fitted, "loss") == pytest.approx(logged(expected, "loss"), rel=1e-6)
    assert logged(fitted, "rewards/margins") == pytest.approx(logged(expected, "rewards/margins"), abs=1e-6)


def test_held_out_pairs_that_do_not_fit_halve_it_too(lab: Lab, pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = lab.reporter(), lab.reporter()
    fits = []
    for is_halved, reporter in zip((False, True), held_out, strict=True):
        model = lab.policy()
        with open_in(model, "shared") as scorer, monkeypatch.context() as patch:
            shortest = sorted(pairs, key=lambda pair: pair.longest)[:2]
            half = (sizes(scorer, shortest, 1000)[0] + 1) // 2
            if is_halved:
                run_out_above(scorer, max(sizes(scorer, shortest, half)), patch, training=False)
            budget, folder = half * (1 + is_halved), lab.folder / str(is_halved)
            fits.append(train(scorer, model, pairs, budget, folder, reporter, settings=SHORT))
    assert [len(reporter.warned) for reporter in held_out] == [0, 1]
    assert logged(fits[1], "eval_loss", "loss") == logged(fits[0], "eval_loss", "loss")


@pytest.mark.parametrize(
    ("layout", "where", "recompute"),
    [
        ("shared", "forward", "none"),
        ("padded", "backward", "none"),
        ("shared", "backward", "elementwise"),
        ("shared", "backward", "layers"),
    ],
)
def test_a_step_that_is_done_again_is_bit_by_bit_an_undisturbed_one(
    lab: Lab, layout: LayoutName, where: str, recompute: str, pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout: when memory runs out, one micro-batch has left gradients, and two have drawn random numbers."""

    def run(model: Any, scorer: Scorer, max_tokens: int, reporter: Any) -> Fit:
        folder = lab.folder / str(max_tokens)
        return train(scorer, model, pairs, max_tokens, folder, reporter, recompute=recompute, settings=SHORT)

    undisturbed = lab.policy(dropout=0.1)
    with open_in(undisturbed, layout) as scorer:
        assert len(scorer.split(pairs[:8], 400)) > 1
        expected = run(undisturbed, scorer, 200, lab.reporter())
    model, reporter = lab.policy(dropout=0.1), lab.reporter()
    with open_in(model, layout) as scorer:
        calls = run_out_once(scorer, model, 2, where, monkeypatch)
        fitted = run(model, scorer, 400, reporter)
    assert len(calls) > 5
    assert len(reporter.warned) == 1
    assert fitted.max_tokens == 200
    assert logged(fitted, "loss", "grad_norm") == logged(expected, "loss", "grad_norm")
    assert same_bytes(adapter(model), adapter(undisturbed))


def test_a_pair_that_does_not_fit_by_itself_is_an_error_of_one_line(
    lab: Lab, pairs: Any, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lab.policy()
    with open_in(model, "shared") as scorer:
        run_out_above(scorer, 10, monkeypatch)
        with pytest.raises(MachineError, match=r"^train: out of memory with a single prompt and its answers") as error:
            train(scorer, model, pairs, 1024, lab.folder, reporter)
    assert "\n" not in str(error.value)
    assert "runtime.recompute" in str(error.value)
    halved = [1024 // 2 ** (number + 1) for number in range(len(reporter.warned))]
    assert all(f"{tokens} tokens" in warning for tokens, warning in zip(halved, reporter.warned, strict=True))


def test_a_stopped_run_goes_on_with_the_halved_budget(lab: Lab, pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = lab.policy(dropout=0.1)
    with open_in(undisturbed, "shared") as scorer:
        expected = train(scorer, undisturbed, pairs, 200, lab.folder / "undisturbed", lab.reporter())
    model, reporter = lab.policy(dropout=0.1), lab.reporter(stop_at(2))
    work = lab.folder / "stopped"
    with open_in(model, "shared") as scorer, monkeypatch.context() as patch:
        run_out_once(scorer, model, 1, "forward", patch)
        with pytest.raises(Interrupted, match="stopped and saved at step 2 of 6"):
            train(scorer, model, pairs, 400, work, reporter)
    assert len(reporter.warned) == 1
    assert json.loads((work / "token_budget.json").read_text(encoding="utf-8")) == {"max_tokens_per_microbatch": 200}
    resumed, reporter = lab.policy(dropout=0.1), lab.reporter()
    with open_in(resumed, "shared") as scorer:
        fitted = train(scorer, resumed, pairs, 400, work, reporter)
    assert reporter.warned == []
    assert fitted.max_tokens == 200
    assert logged(fitted, "loss") == logged(expected, "loss")
    assert same_bytes(adapter(resumed), adapter(undisturbed))


def test_another_error_is_not_taken_for_a_lack_of_memory(
    lab: Lab, pairs: Any, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lab.policy()
    with open_in(model, "shared") as scorer:
        score = scorer.score

        def broken(groups: Sequence[TokenGroup], **asked: Any) -> Scores:
            if torch.is_grad_enabled():
                raise RuntimeError("shapes do not match")
            return score(groups, **asked)

        monkeypatch.setattr(scorer, "score", broken)
        with pytest.raises(RuntimeError, match="shapes do not match"):
            train(scorer, model, pairs, 1024, lab.folder, reporter)
    assert reporter.warned == []


def test_what_the_allocator_of_the_cpu_says_is_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)


# --- the device is not waited for ---------------------------------------------------------


class _Readings(TorchDispatchMode):
    """Counts values that are read out of tensors by item, float, int or bool."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += "_local_scalar_dense" in func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_are_read_back_once_a_step_however_many_micro_batches(
    lab: Lab, layout: LayoutName, pairs: Any, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[int, int]] = []
    lists: list[torch.Tensor] = []
    gradient, tolist = Accumulator.gradient, torch.Tensor.tolist

    def noted(tensor: torch.Tensor) -> Any:
        lists.append(tensor)
        return tolist(tensor)

    def counted(*args: Any) -> Any:
        lists.clear()
        with _Readings() as readings:
            means = gradient(*args)
        found.append((len(lists), readings.num))
        return means

    monkeypatch.setattr(torch.Tensor, "tolist", noted)
    monkeypatch.setattr(Accumulator, "gradient", counted)
    model = lab.policy()
    with open_in(model, layout) as scorer:
        assert len(scorer.split(pairs[:8], 128)) > 3
        train(scorer, model, pairs, 128, lab.folder, reporter, settings=SHORT)
    assert [lists_read for lists_read, _ in found] == [1, 1]
    numbers = {num for _, num in found}
    if layout == "padded":
        assert max(numbers) <= len(scorer.split(pairs[:8], 128))
    else:
        assert numbers == {0}


# --- how much is held ---------------------------------------------------------------------


def peak_bytes(
    model: Any,
    groups: Sequence[TokenGroup],
    max_tokens: int,
    reporter: Any,
    *,
    layout: LayoutName = "shared",
    head_bytes: int = 1 << 20,
    recompute: Any = "none",
) -> int:
    """Peak of the bytes that a step of all groups holds beyond the weights, its optimizer included."""
    model = add_adapter(model.requires_grad_(False), LoraParams(r=4, alpha=8.0), seed=0)
    work = Workplace("train", reporter, RuntimeParams(), CPU)
    with Scorer(model, torch.float32, layout, head_bytes) as scorer:
        objective = PairObjective(TrainParams(beta=0.1), {group.id: [-50.0, -60.0] for group in groups})
        learner = Learner(model, scorer, objective)
        set_recompute(model, recompute)
        model.train()
        with LiveMemory() as live:
            Accumulator(learner, Limits.of(work, max_tokens), StopRequest()).gradient(groups, 0)
            torch.optim.AdamW(learner.trained.values()).step()
    return live.peak


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_peak_does_not_grow_with_the_vocabulary(
    layout: LayoutName, make_llama: Any, make_groups: Any, reporter: Any
) -> None:
    """Logits are held for so many rows that their bytes are bounded: rows * V <= head_bytes / 4.

    Written out they would be 4 bytes times 600 answer tokens times V: 5 MB at 2k and 79 MB at 32k.
    """
    groups = make_groups(16, prompt_lengths=(10, 40), completion_lengths=(15, 24))
    assert sum(len(answer) for group in groups for answer in group.completions) > 512
    small, large = (
        peak_bytes(make_llama(vocabulary), groups, 4096, reporter, layout=layout, head_bytes=4 << 20)
        for vocabulary in (2048, 32768)
    )
    assert large == pytest.approx(small, rel=0.1)
    assert large < 4 * 512 * 32768 / 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_peak_grows_with_the_budget_and_not_with_the_batch(
    layout: LayoutName, make_llama: Any, make_groups: Any, reporter: Any
) -> None:
    groups = make_groups(48, prompt_lengths=(30, 60), completion_lengths=(10, 30))
    found = {
        (budget, size): peak_bytes(make_llama(128), groups[:size], budget, reporter, layout=layout)
        for budget, size in ((512, 48), (1024, 48), (2048, 48), (512, 24))
    }
    assert found[1024, 48] / found[512, 48] == pytest.approx(2, rel=0.25)
    assert found[2048, 48] / found[1024, 48] == pytest.approx(2, rel=0.25)
    assert found[512, 48] == pytest.approx(found[512, 24], rel=0.25), "twice the pairs a step take no more"


def test_what_is_computed_again_is_not_held(make_llama: Any, make_groups: Any, reporter: Any) -> None:
    groups = make_groups(32, prompt_lengths=(30, 60), completion_lengths=(10, 30))
    none, elementwise, layers = (
        peak_bytes(make_llama(128, num_hidden_layers=6), groups, 2048, reporter, recompute=grade)
        for grade in ("none", "elementwise", "layers")
    )
    assert layers < elementwise < none
    assert layers < 0.5 * none


# --- padding ------------------------------------------------------------------------------


def harmless_pairs(count: int) -> list[TokenGroup]:
    """Random tokens with lengths like those of HH harmless: a prompt of 121 on average, answers of 42 and 52."""
    rng = random.Random(0)

    def tokens(mean: float) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 100) for _ in range(max(4, round(mean * rng.lognormvariate(-0.245, 0.7)))))

    return [TokenGroup(f"{n:03d}", f"{n:03d}", tokens(121), (tokens(42), tokens(52))) for n in range(count)]


def test_padding_is_little_where_lengths_are_those_of_real_pairs() -> None:
    pairs = harmless_pairs(256)
    shares, totals = {}, {}
    for layout in LAYOUTS:
        scorer = object.__new__(Scorer)
        scorer.layout = layout
        laid_out = [lay_out([pairs[index] for index in batch], layout) for batch in scorer.split(pairs, 4096)]
        totals[layout] = sum(each.num_tokens for each in laid_out)
        shares[layout] = sum(each.num_padding for each in laid_out) / totals[layout]
    needed = sum(len(pair.prompt) + len(answer) - 1 for pair in pairs for answer in pair.completions)
    assert totals["padded"] * (1 - shares["padded"]) == pytest.approx(needed)
    assert totals["shared"] < 0.7 * needed
    assert shares["shared"] < 0.03
    assert shares["padded"] < 0.2


# --- what is chosen on a GPU --------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``on_gpu(free)``: the device counts as a GPU with so many bytes free."""

    def pretend(free: int) -> None:
        monkeypatch.setattr(environment, "GPU_TYPES", ("cuda", "cpu"))
        monkeypatch.setattr(memory, "free_memory_bytes", lambda device: free)

    return pretend


def choose(model: Any, pairs: list[TokenGroup], reporter: Any, **runtime: Any) -> MemoryPlan:
    scorer = Scorer(model, torch.float32, "shared")
    work = Workplace("train", reporter, RuntimeParams(**runtime), CPU)
    return memory.choose_memory(model, scorer, pairs, 8, work)


def test_on_a_gpu_grade_and_budget_are_chosen_together_and_said(
    on_gpu: Callable[[int], None], policy: Callable[..., Any], make_groups: Any, reporter: Any
) -> None:
    pairs = make_groups(32, prompt_lengths=(200, 400), completion_lengths=(100, 200))  # 8 of them: 4,800 tokens
    on_gpu(1 << 40)
    roomy = choose(policy(), pairs, reporter)
    assert (roomy.grade, roomy.max_tokens) == ("none", 6144), "a whole step at once, and no more than that"
    on_gpu(int(roomy.num_bytes))
    tight = choose(policy(), pairs, reporter)
    assert tight.fits
    assert tight.grade != "none" or tight.max_tokens < 6144
    assert tight.num_bytes <= 0.9 * roomy.num_bytes
    assert any("tokens at once, recompute" in said for said in reporter.said)


def test_what_the_user_says_stays(
    on_gpu: Callable[[int], None], policy: Callable[..., Any], make_groups: Any, reporter: Any
) -> None:
    pairs = make_groups(32, prompt_lengths=(200, 400), completion_lengths=(100, 200))
    on_gpu(1 << 40)
    assert choose(policy(), pairs, reporter, recompute="layers").grade == "layers"
    assert choose(policy(), pairs, reporter, max_tokens_per_microbatch=777).max_tokens == 777
    both = choose(policy(), pairs, reporter, recompute="elementwise", max_tokens_per_microbatch=777)
    assert (both.grade, both.max_tokens) == ("elementwise", 777)


def test_on_the_cpu_the_budget_is_what_its_caches_hold(
    policy: Callable[..., Any], pairs: list[TokenGroup], reporter: Any
) -> None:
    found = choose(policy(), pairs, reporter)
    assert (found.grade, found.max_tokens) == ("none", 1024)
