"""Our training step and reference pass against TRL's DPOTrainer, on one CPU thread, as ratios within one run.

    python benchmarks/against_trl.py [--out FILE] [--regimes 0.42,harmless-base] [--vocabularies 1024] [--runs 3]
    python benchmarks/against_trl.py --model DIR [--regimes harmless-base] [--device cuda]

Both tools load the same saved llama (4 layers of width 256, random weights) with the same LoRA adapter, get the same
token ids, reference log-probabilities and pairs per optimizer step in the same order, and train with AdamW in float32.
With ``--model`` they load that model in 4-bit nf4 with double quantization in its place, and the adapter is float32 in
both: TRL's trainer makes it bfloat16 by itself, and is given its numbers back, so that the two compute the same. Both
leave bitsandbytes' repacking of weights off, which on some processors loses the gradient.
Each tool runs in a process of its own, and they take turns. No figures are printed unless the loss of every step and
every reference log-probability agree.

TRL runs in several configurations. ``default`` is DPOConfig as it comes, but for what the comparison needs: float32,
no gradient checkpointing, cached references, nothing saved or reported. ``best`` has its data sorted by length within
each optimizer step (and over all data for the reference pass), no logging, and as many pairs a forward as a short
calibration finds fastest (the fewest, where it hardly matters). ``largest`` is ``best`` with all pairs of a step in one
forward, which fits, and is slower on a CPU. ``compact`` is ``best`` with a patch that no option of TRL's gives: its
head scores the answers' tokens only, as it does on a GPU; on a CPU it scores every position. ``compiled`` is ``best``
with torch.compile; it takes a minute to compile, so it runs only where ``--sides`` names it. ``best`` runs beside ours
in every run; the others are spread over the runs, once each, unless ``--every-run`` has them run in each.

Times are CPU time of the process, which with one thread is the time that passes on an idle machine. Of the optimizer
steps all but the first are timed; the reference pass after a small batch. Peak memory is the most that was resident
above what the process held when model and data were loaded.

With ``--device cuda`` both compute in bfloat16 on the GPU. Times are those that pass until it has done its work, and
peak memory is what PyTorch's tensors took of it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import gzip
import json
import math
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

Pair = tuple[list[int], list[int], list[int]]
"""Token ids of prompt, chosen and rejected."""
Logps = tuple[float, float]
"""Of chosen and rejected, sums over tokens, nats."""

TOLERANCE = 1e-3
"""Nats by which the loss of a step or a reference log-probability may differ in float32."""
BFLOAT16_TOLERANCES = {"step": 0.03, "reference": 0.3}
"""The same in bfloat16, where rounding moves sums over tokens; a token too many or too few moves them by 10 nats."""
BETA = 0.1
LEARNING_RATE = 1e-4
MAX_GRAD_NORM = 1.0
MAX_LENGTH = 1024
PAIRS_A_STEP = 16
REFERENCE_NOISE = 5.0
"""Standard deviation, in nats, of what is added to the policy's own log-probabilities to make the references. With
margins of 0 the loss would be ln 2 whatever a tool computes, and every pair would weigh the same."""
MANY_PAIRS, FEW_PAIRS, LARGE_VOCABULARY = 48, 32, 8192
"""Pairs of the timed steps of a run, and where there are fewer of them."""
REGIMES = {"0.42": (60, 143, 143), "2.15": (200, 93, 93), "3.91": (300, 77, 77), "harmless-base": (121, 42, 52)}
"""Mean tokens of prompt, chosen and rejected; the numbers are prompt by answer."""
HARMLESS, ADVERSARIAL = "harmless-base", "adversarial"
HARMLESS_FILE = Path(__file__).parents[2] / "shared" / "data" / "pairs" / "hh_harmless-base_test.rows0-1199.jsonl.gz"
CHARACTERS_A_TOKEN = 4.0
SPREAD = 0.7
"""Standard deviation of the logarithm of a length."""

OURS, BEST, LARGEST, DEFAULT, COMPACT, COMPILED = "ours", "best", "largest", "default", "compact", "compiled"
CANDIDATES = (1, 2, 4, 8, 16)
"""Pairs a forward that the calibration tries, until it gets slower."""
FIXED_PAIRS = {DEFAULT: 8, LARGEST: PAIRS_A_STEP}
"""Pairs a forward of the sides that are not calibrated."""
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36)}
"""Has glibc keep freed memory. By default it gives every large block back, and TRL's head at a large vocabulary spends
half of its time on the page faults of getting it again."""

REFUSED = "no figures"
PASSES = {"step": "Optimizer steps", "reference": "Reference pass"}
COLUMNS = (
    "| regime | V | TRL | time, TRL / ours | TRL, pairs/s | ours, pairs/s | memory, TRL / ours | TRL peak, MiB"
    " | ours peak, MiB | TRL process, MiB | ours process, MiB | difference |"
)


# --- data ------------------------------------------------------------------------------------------


def length(pair: Pair) -> int:
    """Tokens of the prompt with the longer answer."""
    return len(pair[0]) + max(map(len, pair[1:]))


def lognormal_lengths(rng: random.Random, num: int, mean: float, longest: int) -> list[int]:
    """Long-tailed lengths from 4 to a longest one, with nearly this mean."""
    draws = [rng.lognormvariate(0, SPREAD) for _ in range(num)]
    lengths: list[int] = []
    scale = 1.0
    for _ in range(8):  # clipping moves the mean
        lengths = [max(4, min(longest, round(draw * scale))) for draw in draws]
        scale *= mean / statistics.mean(lengths)
    return lengths


def harmless_lengths(rng: random.Random, num: int) -> list[tuple[int, int, int]]:
    """Lengths of real pairs: of many random samples that with the means nearest to those of all pairs."""
    mark = "\n\nAssistant:"
    found = []
    with gzip.open(HARMLESS_FILE, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            start = row["chosen"].rfind(mark) + len(mark)
            texts = row["chosen"][:start], row["chosen"][start:], row["rejected"][start:]
            prompt, chosen, rejected = (max(1, round(len(text) / CHARACTERS_A_TOKEN)) for text in texts)
            if row["rejected"].startswith(texts[0]) and prompt + max(chosen, rejected) <= MAX_LENGTH:
                found.append((prompt, chosen, rejected))
    means = [statistics.mean(column) for column in zip(*found, strict=True)]

    def distance(sample: list[tuple[int, int, int]]) -> float:
        columns = zip(zip(*sample, strict=True), means, strict=True)
        return max(abs(math.log(statistics.mean(column) / mean)) for column, mean in columns)

    return min((rng.sample(found, num) for _ in range(500)), key=distance)


def make_lengths(regime: str, rng: random.Random, num: int) -> list[tuple[int, int, int]]:
    """Tokens of prompt, chosen and rejected of some pairs of a regime."""
    if regime == ADVERSARIAL:
        return [(4, 128, 128)] * num
    if regime == HARMLESS and HARMLESS_FILE.is_file():
        return harmless_lengths(rng, num)
    prompt, chosen, rejected = REGIMES[regime]
    prompts = lognormal_lengths(rng, num, prompt, MAX_LENGTH * 5 // 8)
    answers = [lognormal_lengths(rng, num, mean, MAX_LENGTH * 3 // 8) for mean in (chosen, rejected)]
    return list(zip(prompts, *answers, strict=True))


@dataclass(frozen=True)
class Case:
    """One regime at one vocabulary.

    Attributes:
        regime: Its name.
        vocabulary: Tokens the model knows.
        num_steps: Optimizer steps of a run, the first of which warms up.
        folder: Where models and pairs lie.
        model: Directory of a model to take, in nf4; None: a small random one in float32.
        device: ``cpu``, or ``cuda``.
    """

    regime: str
    vocabulary: int
    num_steps: int
    folder: Path
    model: Path | None = None
    device: str = "cpu"

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes."""
        return self.device != "cpu"

    def tolerance(self, what: str) -> float:
        """Nats by which a pass of the two may differ."""
        return BFLOAT16_TOLERANCES[what] if self.on_gpu else TOLERANCE

    def now(self) -> float:
        """CPU seconds of this process; of a GPU seconds that passed, when it has done its work."""
        if not self.on_gpu:
            return time.process_time()
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()

    @property
    def quantization(self) -> str:
        """How the frozen weights are held."""
        return "none" if self.model is None else "nf4"

    @property
    def workspace(self) -> Path:
        """A folder laid out as our stages want it; the model lies in models/base, its adapter in models/sft."""
        return self.folder / f"vocabulary-{self.vocabulary}"

    @property
    def base(self) -> Path:
        """Where the base model lies."""
        return self.workspace / "models" / "base" if self.model is None else self.model

    @property
    def data(self) -> Path:
        """The pairs and the references that training takes."""
        return self.folder / f"{self.regime}-{self.vocabulary}.json"

    @property
    def num_timed(self) -> int:
        """Pairs of the timed steps, which are those of the reference pass, too."""
        return (self.num_steps - 1) * PAIRS_A_STEP

    def make_pairs(self) -> list[Pair]:
        """Random token ids: the first step's pairs, then those that are timed.

        The first step has a few of the latter, the longest first, so that it claims as much memory as any, and is
        filled up with tiny ones.
        """
        rng = random.Random(f"{self.regime} {self.vocabulary}")

        def tokens(length: int) -> list[int]:
            return [rng.randrange(self.vocabulary) for _ in range(length)]

        def pairs(lengths: Sequence[tuple[int, int, int]]) -> list[Pair]:
            return [(tokens(prompt), tokens(chosen), tokens(rejected)) for prompt, chosen, rejected in lengths]

        timed = pairs(make_lengths(self.regime, rng, self.num_timed))
        longest = max(timed, key=length)
        return [longest, *timed[:3], *pairs([(4, 4, 4)] * (PAIRS_A_STEP - 4)), *timed]

    def read(self) -> tuple[list[Pair], list[Logps]]:
        """Pairs and references."""
        saved = json.loads(self.data.read_text(encoding="utf-8"))
        return [tuple(pair) for pair in saved["pairs"]], [tuple(row) for row in saved["references"]]


def plain_logps(model: Any, prompt: list[int], answer: list[int]) -> float:
    """The log-probability of one answer by the model's own logits, alone in its batch."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer], device=model.device)).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1).cpu().gather(1, torch.tensor(answer)[:, None]).sum().item()


def prepare(cases: Sequence[Case]) -> None:
    """Save a model and an adapter for each vocabulary, and pairs with references for each case."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    for vocabulary in sorted({case.vocabulary for case in cases}):
        mine = [case for case in cases if case.vocabulary == vocabulary]
        torch.manual_seed(0)
        if mine[0].model is not None:
            dtype = torch.bfloat16 if mine[0].on_gpu else torch.float32
            where = {"": mine[0].device}
            model = AutoModelForCausalLM.from_pretrained(mine[0].model, dtype=dtype, device_map=where)
        else:
            config = LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=256,
                intermediate_size=768,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=MAX_LENGTH,
            )
            model = LlamaForCausalLM(config)
            model.save_pretrained(mine[0].base)
        lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=16, lora_alpha=32, target_modules="all-linear")
        policy = get_peft_model(model, lora).eval()
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02 if mine[0].model is None else 0.002)
        policy.save_pretrained(str(mine[0].workspace / "models" / "sft"))
        for case in mine:
            pairs = case.make_pairs()
            rng = random.Random(0)
            references = [
                [plain_logps(policy, prompt, answer) + rng.gauss(0, REFERENCE_NOISE) for answer in answers]
                for prompt, *answers in pairs
            ]
            case.data.write_text(json.dumps({"pairs": pairs, "references": references}), encoding="utf-8")


# --- measuring, in a process of a tool -------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a tool's process measured.

    Attributes:
        reference_s: CPU seconds of the reference pass over the timed pairs.
        reference_mib: Its peak memory above what model and data held.
        logps: What it found.
        step_s: CPU seconds of the timed optimizer steps.
        step_mib: Peak memory of all steps above what model and data held.
        losses: The loss of every step.
        process_mib: Peak memory of the whole process.
        cpu_share: CPU time by the time that passed, from model and data being loaded to the end.
    """

    reference_s: float
    reference_mib: float
    logps: list[Logps]
    step_s: float
    step_mib: float
    losses: list[float]
    process_mib: float
    cpu_share: float


def memory_mib(field: str) -> float:
    """A field of this process's status: VmRSS, what is resident now, or VmHWM, the most since the last reset."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def give_back_memory() -> None:
    """Collect garbage and give what the allocator keeps back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class Meter:
    """Peak memory and CPU share of a process; made when model and data are loaded."""

    def __init__(self, case: Case) -> None:
        self._on_gpu = case.on_gpu
        give_back_memory()
        self._held_mib = self._memory_mib("VmRSS")
        self._begun = time.perf_counter(), time.process_time()
        self.process_mib = self._memory_mib("VmHWM")

    def _memory_mib(self, field: str) -> float:
        if not self._on_gpu:
            return memory_mib(field)
        import torch

        of_gpu = torch.cuda.memory_allocated if field == "VmRSS" else torch.cuda.max_memory_allocated
        return of_gpu() / 2**20

    def reset(self) -> None:
        """Forget the peak so far, but for the process's."""
        give_back_memory()
        self.process_mib = max(self.process_mib, self._memory_mib("VmHWM"))
        if not self._on_gpu:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            return
        import torch

        torch.cuda.reset_peak_memory_stats()

    def peak_mib(self) -> float:
        """The peak since the last reset, above what model and data held."""
        peak = self._memory_mib("VmHWM")
        self.process_mib = max(self.process_mib, peak)
        return peak - self._held_mib

    def cpu_share(self) -> float:
        """CPU time by the time that passed."""
        return (time.process_time() - self._begun[1]) / (time.perf_counter() - self._begun[0])


@dataclass
class Steps:
    """What a training went through.

    Attributes:
        losses: What each call of training_step returned, or the loss of each step.
        ends: The time after each optimizer step.
        mib: Peak memory above what model and data held.
    """

    losses: list[Any]
    ends: list[float]
    mib: float = 0.0

    @property
    def seconds(self) -> float:
        """From the end of the first step to the end of the last."""
        return self.ends[-1] - self.ends[0]

    def step_losses(self, num_steps: int) -> list[float]:
        """The loss of every step, a sum over its calls of training_step."""
        assert len(self.ends) == num_steps
        calls = len(self.losses) // num_steps
        return [sum(float(loss) for loss in self.losses[step * calls :][:calls]) for step in range(num_steps)]


def watch(trainer: Any, meter: Meter, case: Case) -> Steps:
    """Have a trainer note what it goes through."""
    from transformers import TrainerCallback

    steps = Steps([], [])
    training_step = trainer.training_step

    class Watcher(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            meter.reset()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            steps.ends.append(case.now())

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            steps.mib = meter.peak_mib()

    def noted(*args: Any, **kwargs: Any) -> Any:
        steps.losses.append(training_step(*args, **kwargs))
        return steps.losses[-1]

    trainer.training_step = noted
    trainer.add_callback(Watcher())
    return steps


# --- ours ------------------------------------------------------------------------------------------


class ToStderr:
    """A reporter that says everything on standard error."""

    def say(self, text: str) -> None:
        """One line."""
        print(text, file=sys.stderr)

    warn = say

    def meter(self, label: str, total: int, unit: str) -> AbstractContextManager[ToStderr]:
        """Work under way, of which nothing is shown."""
        return nullcontext(self)

    def advance(self, amount: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Nothing."""

    def verdict(self, headline: str, status: str, rows: Sequence[tuple[str, str, str]]) -> None:
        """Nothing."""


class Watching(ToStderr):
    """Notes when each optimizer step ends, and what memory all of them take."""

    def __init__(self, meter: Meter, case: Case) -> None:
        self._meter = meter
        self._now = case.now
        self.steps = Steps([], [])

    @contextmanager
    def meter(self, label: str, total: int, unit: str) -> Iterator[Watching]:  # type: ignore[override]
        """The training."""
        self._meter.reset()
        yield self
        self.steps.mib = self._meter.peak_mib()

    def advance(self, amount: int) -> None:
        """A step is done, or the steps of an earlier run are counted: none here."""
        if amount:
            self.steps.ends.append(self._now())


def our_references(scorer: Any, groups: Sequence[Any], max_tokens: int) -> list[Logps]:
    """Log-probabilities of pairs, found as the stage precompute_ref finds them."""
    from dpo_cli.reference.cache import group_keys
    from dpo_cli.reference.scoring import missing_groups, score_groups
    from dpo_cli.scoring.budget import TokenBudget

    budget = TokenBudget(max_tokens, "precompute_ref", ToStderr())
    batches = score_groups(scorer, missing_groups(groups, set(), max_tokens), budget)
    found = {row["key"]: row["logp"] for rows in batches for row in rows}
    return [(found[chosen], found[rejected]) for chosen, rejected in map(group_keys, groups)]


def run_ours(case: Case, runtime_settings: dict[str, Any]) -> Outcome:
    """Our engine, driven as the stages precompute_ref and train drive it."""
    import dpo_cli.training.fit
    from dpo_cli.core.params import LoraParams, RuntimeParams, TrainParams
    from dpo_cli.data.tokens import TokenGroup
    from dpo_cli.models.adapters import SftResult, load_policy_at_start
    from dpo_cli.models.device import prepare_machine, token_budget
    from dpo_cli.scoring.probe import open_scorer
    from dpo_cli.training.job import Job
    from dpo_cli.training.objective import PairObjective
    from dpo_cli.training.protocols import BatchSource, Learner

    pairs, references = case.read()
    groups = [
        TokenGroup(f"{index:04d}", f"{index:04d}", tuple(prompt), (tuple(chosen), tuple(rejected)))
        for index, (prompt, chosen, rejected) in enumerate(pairs)
    ]
    os.chdir(case.workspace)
    runtime = RuntimeParams.model_validate({"device": case.device, **runtime_settings})
    machine = prepare_machine(runtime, embedded=False)
    sft = SftResult("lora", "")
    policy: Any = load_policy_at_start(case.base, sft, machine, case.quantization, LoraParams(), 0)
    meter = Meter(case)
    max_tokens = token_budget(runtime, machine.device)
    with open_scorer(policy.eval(), machine.compute_dtype, runtime, ToStderr(), "train")[0] as scorer:
        our_references(scorer, groups[:2], max_tokens)
        meter.reset()
        begun = case.now()
        logps = our_references(scorer, groups[PAIRS_A_STEP:], max_tokens)
        reference_s = case.now() - begun
        reference_mib = meter.peak_mib()

        class InOrder(BatchSource[TokenGroup]):
            def __init__(self, items: Sequence[TokenGroup], batch_size: int, seed: int) -> None:
                self._items = items

            def batch(self, step: int) -> Sequence[TokenGroup]:
                start = step * PAIRS_A_STEP % len(self._items)
                return self._items[start : start + PAIRS_A_STEP]

        dpo_cli.training.fit.Shuffled = InOrder  # type: ignore[misc]
        reporter = Watching(meter, case)
        params = TrainParams(
            learning_rate=LEARNING_RATE,
            batch_size=PAIRS_A_STEP,
            max_steps=case.num_steps,
            schedule="constant",
            warmup_ratio=0.0,
            max_grad_norm=MAX_GRAD_NORM,
            beta=BETA,
        )
        by_id = {group.id: row for group, row in zip(groups, references, strict=True)}
        with tempfile.TemporaryDirectory() as work:
            learner = Learner(policy, scorer, PairObjective(TrainParams(beta=BETA), by_id))
            job = Job("train", Path(work), machine, runtime, reporter)
            fitted = dpo_cli.training.fit.fit(learner, groups, groups[:1], params, job)
    steps = reporter.steps
    steps.losses = [entry["loss"] for entry in fitted.history if "loss" in entry]
    losses = steps.step_losses(case.num_steps)
    return Outcome(
        reference_s, reference_mib, logps, steps.seconds, steps.mib, losses, meter.process_mib, meter.cpu_share()
    )


# --- TRL -------------------------------------------------------------------------------------------


def by_length(pairs: Sequence[Pair], indices: range) -> list[int]:
    """Indices in the order of length."""
    return sorted(indices, key=lambda index: length(pairs[index]))


def trl_dataset(pairs: Sequence[Pair], order: Sequence[int], references: Sequence[Logps] | None = None) -> Any:
    """Pairs in some order, as the columns that TRL's collator reads."""
    from datasets import Dataset

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    columns: dict[str, list[Any]] = {name: [pairs[index][part] for index in order] for part, name in enumerate(names)}
    if references is not None:
        columns["ref_chosen_logps"] = [references[index][0] for index in order]
        columns["ref_rejected_logps"] = [references[index][1] for index in order]
    return Dataset.from_dict(columns)


def check_tokens(trainer: Any, pairs: Sequence[Pair], order: Sequence[int]) -> None:
    """Assert that TRL's collator gives the model the very ids of the pairs, and has the answers' tokens scored."""
    for place, index in enumerate(order):
        prompt, *answers = pairs[index]
        batch = trainer.data_collator([trainer.train_dataset[place]])
        for row, answer in enumerate(answers):
            length = len(prompt) + len(answer)
            assert batch["input_ids"][row, :length].tolist() == prompt + answer
            assert batch["attention_mask"][row].nonzero().flatten().tolist() == list(range(length))
            assert batch["completion_mask"][row].nonzero().flatten().tolist() == list(range(len(prompt), length))


def tiny_tokenizer() -> Any:
    """A tokenizer, since TRL wants one; it has no text to tokenize."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def load_policy(case: Case) -> Any:
    """The model with its adapter, trainable."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.set_num_threads(1)
    dtype = torch.bfloat16 if case.on_gpu else torch.float32
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    quantized = {} if case.quantization == "none" else {"quantization_config": nf4, "device_map": {"": case.device}}
    model = AutoModelForCausalLM.from_pretrained(case.base, dtype=dtype, **quantized)
    policy = PeftModel.from_pretrained(model, str(case.workspace / "models" / "sft"), is_trainable=True)
    for module in policy.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return policy


def trl_trainer(case: Case, side: str, policy: Any, dataset: Any, pairs_a_forward: int, folder: str) -> Any:
    """A DPOTrainer that takes token ids and references as they are."""
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class AsItIs(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    arguments = DPOConfig(
        output_dir=folder,
        use_cpu=not case.on_gpu,
        bf16=case.on_gpu,
        gradient_checkpointing=False,
        per_device_train_batch_size=pairs_a_forward,
        gradient_accumulation_steps=PAIRS_A_STEP // pairs_a_forward,
        max_steps=case.num_steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM,
        beta=BETA,
        precompute_ref_log_probs=True,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_strategy="steps" if side == DEFAULT else "no",
        torch_compile=side == COMPILED,
    )
    trained = {name: part.detach().clone() for name, part in policy.named_parameters() if part.requires_grad}
    trainer = AsItIs(model=policy, args=arguments, train_dataset=dataset, processing_class=tiny_tokenizer())
    for name, part in policy.named_parameters():
        if name in trained:
            part.data = trained[name]
    return trainer


def trl_references(
    trainer: Any, dataset: Any, pairs_a_forward: int, meter: Meter, case: Case
) -> tuple[float, float, list[Logps]]:
    """TRL's own reference pass: seconds, peak MiB, and what it found.

    The time ends with the last forward pass: that it writes the datasets cache does not count.
    """
    from trl.trainer.dpo_trainer import DPOTrainer

    compute = trainer.compute_ref_log_probs
    end = 0.0

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal end
        found = compute(*args, **kwargs)
        end = case.now()
        return found

    compute(trainer.model, _moved(trainer, trainer.data_collator([dataset[0], dataset[1]])))
    trainer.compute_ref_log_probs = timed
    meter.reset()
    begun = case.now()
    found = DPOTrainer._precompute_ref_logps(trainer, dataset, "train", pairs_a_forward)
    peak_mib = meter.peak_mib()
    return end - begun, peak_mib, list(zip(found["ref_chosen_logps"], found["ref_rejected_logps"], strict=True))


def _moved(trainer: Any, batch: Any) -> Any:
    """A batch on the device of the trainer's model."""
    return trainer._prepare_inputs(batch)


def score_answers_only() -> None:
    """Have TRL's head leave out the prompts' positions, as it does where there is Triton."""
    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda device: True  # type: ignore[reportPrivateImportUsage]


def run_trl(case: Case, side: str, pairs_a_forward: dict[str, int]) -> Outcome:
    """TRL's trainer in one of its configurations."""
    import trl.trainer.dpo_trainer  # noqa: F401  before memory is measured

    if side == COMPACT:
        score_answers_only()
    pairs, references = case.read()
    timed = range(PAIRS_A_STEP, len(pairs))
    order, reference_order = list(range(len(pairs))), list(timed)
    if side != DEFAULT:
        begins = range(0, len(pairs), PAIRS_A_STEP)
        order = [index for begin in begins for index in by_length(pairs, range(begin, begin + PAIRS_A_STEP))]
        reference_order = by_length(pairs, timed)
    policy = load_policy(case)
    dataset, reference_dataset = trl_dataset(pairs, order, references), trl_dataset(pairs, reference_order)
    meter = Meter(case)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(case, side, policy, dataset, pairs_a_forward["step"], folder)
        check_tokens(trainer, pairs, order)
        reference_s, reference_mib, found = trl_references(
            trainer, reference_dataset, pairs_a_forward["reference"], meter, case
        )
        steps = watch(trainer, meter, case)
        trainer.train()
    by_index = dict(zip(reference_order, found, strict=True))
    logps = [by_index[index] for index in timed]
    losses = steps.step_losses(case.num_steps)
    return Outcome(
        reference_s, reference_mib, logps, steps.seconds, steps.mib, losses, meter.process_mib, meter.cpu_share()
    )


def calibrate(case: Case) -> dict[str, int]:
    """Pairs a forward with which ``best`` is fastest on the pairs of one step; the fewest of those within 5% of it."""
    import torch

    pairs, references = case.read()
    rows = trl_dataset(pairs, by_length(pairs, range(PAIRS_A_STEP, 2 * PAIRS_A_STEP)), references)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(case, BEST, load_policy(case), rows, 1, folder)
    trainer.model.train()

    def score(what: str, places: range) -> None:
        batch = _moved(trainer, trainer.data_collator([rows[place] for place in places]))
        if what == "step":
            trainer.compute_loss(trainer.model, batch).backward()
        else:
            trainer.compute_ref_log_probs(trainer.model, batch)

    fastest = {}
    for what in PASSES:
        times: dict[int, float] = {}
        for pairs_a_forward in CANDIDATES:
            batches = [range(begin, begin + pairs_a_forward) for begin in range(0, PAIRS_A_STEP, pairs_a_forward)]
            try:
                score(what, batches[-1])  # warms up with the longest
                begun = case.now()
                for batch in batches:
                    score(what, batch)
            except torch.OutOfMemoryError:
                break
            times[pairs_a_forward] = case.now() - begun
            if times[pairs_a_forward] > 1.15 * min(times.values()):
                break
        tell(f"{what}: seconds by pairs a forward {times}")
        fastest[what] = next(size for size, taken in times.items() if taken <= 1.05 * min(times.values()))
    return fastest


# --- taking turns ----------------------------------------------------------------------------------


def run_side(side: str, job: dict[str, Any], *, keep_memory: bool) -> Any:
    """Run this script in a process of its own for one side; what it found.

    Raises:
        SystemExit: It failed; what it said is shown.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    environment |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"TORCHDYNAMO_DISABLE": "0"}  # what a side compiles is compiled
    environment |= KEEP_MEMORY if keep_memory else {}
    command = [sys.executable, __file__, "--side", side, "--job", json.dumps(job, default=str)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode:
        raise SystemExit(f"{side} failed:\n{process.stderr[-4000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def do_job(side: str, job: dict[str, Any]) -> Any:
    """What the process of a side does."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    cases = [
        Case(**{**case, "folder": Path(case["folder"]), "model": case["model"] and Path(case["model"])})
        for case in job["cases"]
    ]
    if side == "prepare":
        return prepare(cases)
    if side == "calibrate":
        return calibrate(cases[0])
    if side == OURS:
        return asdict(run_ours(cases[0], job["runtime"]))
    return asdict(run_trl(cases[0], side, job["pairs_a_forward"]))


@dataclass(frozen=True)
class Meeting:
    """A run of TRL beside a run of ours."""

    trl: Outcome
    ours: Outcome

    def differences(self, what: str) -> list[tuple[float, str]]:
        """By how many nats the two differ, and where."""
        if what == "step":
            both = zip(self.trl.losses, self.ours.losses, strict=True)
            return [(abs(theirs - ours), f"the loss of step {n}") for n, (theirs, ours) in enumerate(both, 1)]
        return [
            (abs(theirs - ours), f"{answer} of pair {n}")
            for n, rows in enumerate(zip(self.trl.logps, self.ours.logps, strict=True), 1)
            for answer, theirs, ours in zip(("chosen", "rejected"), *rows, strict=True)
        ]


def spread(values: Sequence[float]) -> str:
    """Median, and least and largest where there are several."""
    ends = f"[{min(values):.2f}, {max(values):.2f}]" if len(values) > 1 else "[one run]"
    return f"{statistics.median(values):.2f} {ends}"


def table_row(case: Case, config: str, what: str, meetings: Sequence[Meeting]) -> str:
    """A line of a table; no figures where the two do not agree."""

    def seconds(outcome: Outcome) -> float:
        return outcome.step_s if what == "step" else outcome.reference_s

    def mib(outcome: Outcome) -> float:
        return outcome.step_mib if what == "step" else outcome.reference_mib

    found = [difference for meeting in meetings for difference in meeting.differences(what)]
    worst, where = max(found, key=lambda item: math.inf if math.isnan(item[0]) else item[0])
    start = f"| {case.regime} | {case.vocabulary} | {config}"
    if not worst <= case.tolerance(what):
        nothing = " |" * (COLUMNS.count("|") - start.count("|") - 3)
        return f"{start} | {REFUSED}: {where} differs |{nothing} {worst:.1e} |"
    trl, ours = [meeting.trl for meeting in meetings], [meeting.ours for meeting in meetings]
    rates = [case.num_timed / statistics.median(map(seconds, side)) for side in (trl, ours)]
    peaks = [statistics.median(map(mib, side)) for side in (trl, ours)]
    processes = [statistics.median(outcome.process_mib for outcome in side) for side in (trl, ours)]
    ratio = spread([seconds(meeting.trl) / seconds(meeting.ours) for meeting in meetings])
    return (
        f"{start} | {ratio} | {rates[0]:.2f} | {rates[1]:.2f} | {peaks[0] / peaks[1]:.2f} | {peaks[0]:.0f}"
        f" | {peaks[1]:.0f} | {processes[0]:.0f} | {processes[1]:.0f} | {worst:.1e} |"
    )


def compare(case: Case, arguments: argparse.Namespace) -> tuple[dict[str, list[str]], float]:
    """Have the sides take turns at a case; lines of both tables, and the least CPU share."""
    job = {"cases": [asdict(case)], "runtime": arguments.runtime}
    keep_memory = arguments.malloc == "keep"
    fastest = run_side("calibrate", job, keep_memory=keep_memory)
    others = [side for side in arguments.sides if side != BEST]
    meetings: dict[str, list[Meeting]] = {side: [] for side in arguments.sides}

    def outcome(side: str) -> Outcome:
        pairs = dict.fromkeys(PASSES, FIXED_PAIRS[side]) if side in FIXED_PAIRS else fastest
        found = Outcome(**run_side(side, job | {"pairs_a_forward": pairs}, keep_memory=keep_memory))
        tell(f"{case.regime} {case.vocabulary} {side}: step {case.num_timed / found.step_s:.2f} pairs/s")
        return found

    for run in range(arguments.runs):
        before = outcome(BEST) if BEST in arguments.sides else None
        ours = outcome(OURS)
        if before:
            meetings[BEST].append(Meeting(before, ours))
        for side in others if arguments.every_run else others[run :: arguments.runs]:
            meetings[side].append(Meeting(outcome(side), ours))
    lines: dict[str, list[str]] = {what: [] for what in PASSES}
    for side, met in meetings.items():
        for what in PASSES:
            pairs = FIXED_PAIRS.get(side, fastest[what])
            if met:
                lines[what].append(table_row(case, f"{side}, {pairs}", what, met))
                tell(lines[what][-1])
    everyone = [found for met in meetings.values() for meeting in met for found in (meeting.trl, meeting.ours)]
    return lines, min(found.cpu_share for found in everyone)


def tell(text: str) -> None:
    """Show progress."""
    print(text, file=sys.stderr, flush=True)


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


_ON_CPU = ("float32", "CPU time", "what was resident")


def gpu_name() -> str:
    """The GPU's name, as a process says it that ends at once."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def heading(arguments: argparse.Namespace) -> list[str]:
    """What was measured, where, and with which versions."""
    on_gpu = arguments.device != "cpu"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl", "datasets"))
    kept = " ".join(f"{name}={value}" for name, value in KEEP_MEMORY.items())
    machine = (
        f"Command: `{shlex.join(['python', 'benchmarks/against_trl.py', *sys.argv[1:]])}`."
        f" {gpu_name() if on_gpu else processor()}, one thread, Python {platform.python_version()}, {packages}. Memory"
        f" allocator of both tools: glibc's {f'with {kept}' if arguments.malloc == 'keep' else 'as it comes'}."
    )
    model = "Llama of 4 layers of width 256" if arguments.model is None else f"{arguments.model.name} in nf4"
    dtype, times, held = ("bfloat16", "those that passed", "what tensors took") if on_gpu else _ON_CPU
    limits = " and ".join(f"{limit:g}" for limit in BFLOAT16_TOLERANCES.values()) if on_gpu else f"{TOLERANCE:g}"
    method = (
        f"{model} with LoRA (rank 16, all linear layers), {dtype}, {PAIRS_A_STEP} pairs an"
        f" optimizer step, {arguments.runs} runs with a process of its own for each tool. The number after a"
        " configuration of TRL's is its pairs a forward pass. A ratio above 1 means that ours is faster, or holds less:"
        f" median [min, max] of neighboring runs. Times are {times}. Peak is {held} above model and data,"
        " process is all of it. Difference is the largest of any step's loss, or of any answer's log-probability, in"
        f" nats; above {limits} there are no figures."
    )
    title = f"# Training step and reference pass against TRL, {'GPU' if on_gpu else 'CPU'}"
    return [title, "", *textwrap.wrap(machine, 120), "", *textwrap.wrap(method, 120)]


def lengths_table(cases: Sequence[Case]) -> list[str]:
    """Mean tokens of each case."""
    lines = [
        "",
        "| regime | V | timed pairs a run | prompt | chosen | rejected | prompt : answer | lengths |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        pairs = case.make_pairs()[PAIRS_A_STEP:]
        prompt, chosen, rejected = (statistics.mean(len(pair[part]) for pair in pairs) for part in range(3))
        lengths = "equal" if case.regime == ADVERSARIAL else "lognormal"
        if case.regime == HARMLESS:
            real = HARMLESS_FILE.is_file()
            lengths = f"of {HARMLESS_FILE.name}" if real else f"lognormal, since {HARMLESS_FILE.name} is not there"
        lines.append(
            f"| {case.regime} | {case.vocabulary} | {case.num_timed} | {prompt:.0f} | {chosen:.0f} | {rejected:.0f}"
            f" | {2 * prompt / (chosen + rejected):.2f} | {lengths} |"
        )
    return lines


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""

    def some_of(names: Sequence[str]) -> Any:
        def parse_names(text: str) -> list[str]:
            chosen = text.split(",")
            if unknown := set(chosen) - set(names):
                raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not one of {', '.join(names)}")
            return chosen

        return parse_names

    def setting(text: str) -> tuple[str, Any]:
        name, _, value = text.partition("=")
        return name, int(value) if value.isdigit() else value

    regimes = [*REGIMES, ADVERSARIAL]
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--regimes", type=some_of(regimes), default=regimes, help=f"of {', '.join(regimes)}")
    parser.add_argument(
        "--vocabularies", type=lambda text: [int(size) for size in text.split(",")], default=[1024, 32768]
    )
    parser.add_argument("--model", type=Path, help="a model directory to load in nf4, in place of small random models")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: with --model alone")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--pairs", type=int, help="timed pairs a run; 48, and 32 at large vocabularies")
    sides = [BEST, LARGEST, DEFAULT, COMPACT, COMPILED]
    parser.add_argument("--sides", type=some_of(sides), default=sides[:4], help=f"TRL's: of {', '.join(sides)}")
    parser.add_argument("--every-run", action="store_true", help="run every side in every run")
    parser.add_argument("--malloc", choices=["keep", "glibc"], default="keep", help="keep freed memory, in both tools")
    parser.add_argument(
        "--runtime", type=setting, action="append", default=[], help="our runtime setting, as name=value"
    )
    parser.add_argument("--out", type=Path, help="write the tables to a file, too")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.runtime = dict(arguments.runtime)
    if arguments.device != "cpu" and arguments.model is None:
        parser.error("--device cuda needs --model: the small random models show nothing of a GPU")
    if arguments.model is not None:
        config = json.loads((arguments.model / "config.json").read_text(encoding="utf-8"))
        arguments.vocabularies = [config.get("text_config", config)["vocab_size"]]
    return arguments


def main() -> None:
    """Measure and print the tables."""
    arguments = parse()
    if arguments.side:
        print(json.dumps(do_job(arguments.side, arguments.job)))
        return
    if sys.platform != "linux":
        raise SystemExit("peak memory is read from /proc, which only Linux has")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="against-trl-") as folder:
        cases = []
        for vocabulary in arguments.vocabularies:
            pairs = arguments.pairs or (FEW_PAIRS if vocabulary >= LARGE_VOCABULARY else MANY_PAIRS)
            num_steps = 1 + math.ceil(pairs / PAIRS_A_STEP)
            model = arguments.model and arguments.model.resolve()
            cases += [
                Case(regime, vocabulary, num_steps, Path(folder), model, arguments.device)
                for regime in arguments.regimes
            ]
        run_side("prepare", {"cases": [asdict(case) for case in cases]}, keep_memory=True)
        compared = [compare(case, arguments) for case in cases]
    report = [*heading(arguments), *lengths_table(cases)]
    for what, title in PASSES.items():
        report += ["", f"## {title}", "", COLUMNS, "|" + "---|" * (COLUMNS.count("|") - 1)]
        report += [line for lines, _ in compared for line in lines[what]]
    share = min(share for _, share in compared)
    report += [
        "",
        f"It took {(time.monotonic() - begun) / 60:.0f} minutes; every process had {share:.0%} of a core or more.",
    ]
    text = "\n".join(report) + "\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    if f"| {REFUSED}" in text:
        raise SystemExit("the tools do not agree everywhere; see the tables")


if __name__ == "__main__":
    main()
