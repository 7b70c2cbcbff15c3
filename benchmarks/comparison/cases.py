"""What is compared: pairs of a regime with their references, a model, a folder; and what a process measures."""

from __future__ import annotations

import ctypes
import gc
import gzip
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
HARMLESS_FILE = Path(__file__).parents[3] / "shared" / "data" / "pairs" / "hh_harmless-base_test.rows0-1199.jsonl.gz"
CHARACTERS_A_TOKEN = 4.0
SPREAD = 0.7
"""Standard deviation of the logarithm of a length."""

PASSES = {"step": "Optimizer steps", "reference": "Reference pass"}


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
        seconds: CPU seconds of the timed optimizer steps, and of the reference pass over the same pairs.
        mib: Peak memory of both above what model and data held.
        logps: What the reference pass found.
        losses: The loss of every step.
        process_mib: Peak memory of the whole process.
        cpu_share: CPU time by the time that passed, from model and data being loaded to the end.
    """

    seconds: dict[str, float]
    mib: dict[str, float]
    logps: list[Logps]
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


def tell(text: str) -> None:
    """Show progress."""
    print(text, file=sys.stderr, flush=True)
