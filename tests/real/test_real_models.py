"""The whole way of two real models: imported from GGUF, scored, tuned for three steps in nf4, saved, loaded by PEFT.

SmolLM2-135M-Instruct (llama, 49,152 tokens, its own chat template) and Gemma 3 270M (262,144 tokens, a window of 512).
`pytest -m real -rP` prints the table of differences. The plain computation beside ours is one completion at a time
through transformers' own model: a log-softmax over all logits and a sum.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dpo_cli.core.load_params import parse_params
from dpo_cli.core.params import HfJudgeParams, Params, RuntimeParams
from dpo_cli.core.progress import SilentReporter
from dpo_cli.data.schema import user
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.exporting.llama_cpp import serve
from dpo_cli.models.adapters import FrozenBase
from dpo_cli.models.load import keep_weights_unpacked, load_config, load_model, load_tokenizer
from dpo_cli.models.project import Project, Workplace, open_project
from dpo_cli.scoring.layout import LAYOUTS
from dpo_cli.scoring.probe import open_scorer
from dpo_cli.scoring.reference import read_cache
from dpo_cli.scoring.scorer import Scorer
from tests import gguf_files
from tests.live_memory import LiveMemory
from tests.real.fetch import MODELS, RealModel, fetch, imported
from tests.tiny_project import run_stages, write_raw

TOLERANCE = 1e-3
"""Nats, on sums of log-probabilities over an answer: what float32 leaves open between two ways to compute them."""
_CAPITALS = "France Paris Italy Rome Spain Madrid Japan Tokyo Egypt Cairo Peru Lima".split()
_SENTENCE = "The town lay by a river, and on its banks the people sold bread, fish and cloth from wooden carts. "


def preference_rows(num_sentences: int = 0) -> list[dict[str, str]]:
    """Pairs that prefer the bare answer; the first has a long prompt."""
    rows = []
    for index in range(0, len(_CAPITALS), 2):
        country, capital = _CAPITALS[index : index + 2]
        prompt = f"What is the capital of {country}?"
        rows.append(
            {
                "prompt": f"{_SENTENCE * num_sentences}\n\n{prompt}" if index == 0 else prompt,
                "chosen": f"The capital of {country} is {capital}.",
                "rejected": f"Sure! I would be glad to help. {country}'s capital is {capital}.",
            }
        )
    return rows


@dataclass
class Run:
    """A project of one model after stage train, and what was measured of it."""

    model: RealModel
    folder: Path
    project: Path
    params: Params
    metrics: dict[str, Any]
    differences: dict[str, float] = field(default_factory=dict)

    def note(self, what: str, ours: torch.Tensor, other: torch.Tensor) -> float:
        """Remember the largest difference of two tensors of log-probabilities, nats."""
        self.differences[what] = (ours - other).abs().max().item()
        return self.differences[what]


@pytest.fixture(scope="module", params=list(MODELS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_reporter: Any) -> Iterator[Run]:
    """Three steps of DPO in nf4, straight from the base model, in a project that is the working directory."""
    model = MODELS[request.param]
    folder = imported(model)
    project = tmp_path_factory.mktemp(model.name)
    params = parse_params(
        {
            "data": {"eval_fraction": 0.25},
            "model": {"name": model.name, "chat_template": model.template},
            "sft": {"method": "none"},
            "reference": {"max_length": 1024},
            "train": {"learning_rate": 2e-4, "batch_size": 2, "max_steps": 3, "warmup_ratio": 0.0},
            "runtime": {"model_path": str(folder), "device": "cpu", "threads": 1},
        }
    )
    with contextlib.chdir(project):
        write_raw(preference_rows(model.num_sentences))
        stages = ("base", "convert_preferences", "sft", "precompute_ref", "train")
        yield Run(model, folder, project, params, run_stages(params, make_reporter(), *stages))


@pytest.fixture(scope="module")
def project(run: Run) -> Project:
    return open_project(run.params, SilentReporter(), "test")


@pytest.fixture(scope="module")
def groups(project: Project) -> list[TokenGroup]:
    found = [*project.tokenize_pairs("train").groups, *project.tokenize_pairs("eval").groups]
    return sorted(found, key=lambda group: len(group.prompt), reverse=True)[:2]  # the long one and another


@pytest.fixture(scope="module")
def policy(run: Run, project: Project) -> Any:
    """What was trained, as `evaluate` loads it."""
    return FrozenBase(run.folder, project.sft, project.machine, "nf4").pair().use_policy()


@pytest.fixture(scope="module")
def ours(policy: Any, groups: list[TokenGroup]) -> torch.Tensor:
    """The policy's log-probabilities in the layout that the probe finds, all groups at once."""
    scorer, _ = open_scorer(policy, torch.float32, RuntimeParams(), SilentReporter(), "test")
    return our_logps(scorer, groups)


@pytest.fixture(scope="module")
def plain(run: Run) -> Any:
    """The base in nf4 as transformers loads it."""
    return keep_unpacked(
        AutoModelForCausalLM.from_pretrained(
            run.folder,
            dtype=torch.float32,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            ),
        )
    )


def keep_unpacked(model: Any) -> Any:
    """bitsandbytes would repack the weights of some CPUs into bfloat16 at the first forward in eval mode."""
    keep_weights_unpacked(model)
    return model.eval()


@torch.inference_mode()
def plain_logps(model: Any, groups: Sequence[TokenGroup]) -> torch.Tensor:
    """Summed log-probabilities float64 [B, 2], nats, one completion at a time."""
    rows = []
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([[*group.prompt, *completion]])
            logits_TV = model(input_ids=ids, logits_to_keep=len(completion) + 1).logits[0, :-1].float()
            logps_T = logits_TV.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])
            rows.append(logps_T.double().sum())
    return torch.stack(rows).view(len(groups), -1)


@torch.inference_mode()
def our_logps(scorer: Scorer, groups: Sequence[TokenGroup]) -> torch.Tensor:
    """The same through the engine, all groups at once."""
    with scorer:
        return scorer.score(list(groups)).logps_BK.double()


def test_the_reference_cache_is_plain_transformers(run: Run, project: Project, groups: Any, plain: Any) -> None:
    cache = read_cache(Path("data/reference"), project.identity)
    cached = torch.tensor([[cache[key] for key in group.keys] for group in groups], dtype=torch.float64)
    window = getattr(load_config(run.folder), "sliding_window", None) or 0
    assert max(len(group.prompt) for group in groups) > window
    assert run.note("cache, against plain transformers in nf4", cached, plain_logps(plain, groups)) < TOLERANCE


def test_policy_and_reference_are_equal_before_the_first_step(run: Run) -> None:
    assert run.metrics["step0_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert run.metrics["step0_max_abs_margin"] < 1e-4


def test_three_steps_lower_the_loss_of_pairs_that_were_held_out(run: Run) -> None:
    assert run.metrics["num_steps"] == 3
    assert run.metrics["eval_loss"] < run.metrics["eval_loss_start"] - 1e-3


def test_all_layouts_give_the_same(run: Run, policy: Any, groups: Any, ours: torch.Tensor) -> None:
    for layout in set(LAYOUTS) - {run.metrics["layout"]}:
        found = our_logps(Scorer(policy, torch.float32, layout), groups)
        assert run.note(f"layout {layout}, against {run.metrics['layout']}", found, ours) < TOLERANCE


def test_the_adapter_as_its_model_card_says_gives_the_policys_log_probabilities(
    run: Run, project: Project, groups: Any, ours: torch.Tensor, tmp_path: Path
) -> None:
    """The code of the card is run: the adapter by plain PEFT, then merged into the weights that it was trained on."""
    from peft import PeftModel

    adapter = Path("models/dpo").resolve()
    loading, merging = re.findall(
        r"```python\n(.*?)```", (adapter / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    names: dict[str, Any] = {"BASE_DIRECTORY": str(run.folder), "THIS_DIRECTORY": str(adapter)}
    exec(loading, names)
    theirs = plain_logps(names["model"], groups)
    assert run.note("policy, against plain PEFT as the model card says", ours, theirs) < TOLERANCE
    names["MERGED_DIRECTORY"] = str(tmp_path / "merged")
    exec(merging, names)
    merged = load_model(tmp_path / "merged", project.machine, quantization="none")
    theirs = plain_logps(merged, groups)
    assert run.note("merged as the model card says and loaded again, against the policy", theirs, ours) < TOLERANCE
    base = AutoModelForCausalLM.from_pretrained(run.folder, dtype=torch.float32)
    unquantized = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().eval()
    run.note("merged into the unquantized weights, against the policy", plain_logps(unquantized, groups), ours)


def test_generation_is_transformers_greedy(run: Run, project: Project, make_reporter: Any) -> None:
    from dpo_cli.evaluation.decoding import Decoding
    from dpo_cli.evaluation.generation import PromptTokens, sample_answers
    from dpo_cli.scoring.budget import TokenBudget

    model = load_model(run.folder, project.machine, quantization="none")
    questions = ["What is the capital of France?", "Name three colors.", "Write one sentence about the sea."]
    prompts = [PromptTokens(str(n), tuple(project.encoder.encode_prompt([user(q)]))) for n, q in enumerate(questions)]
    stops = project.encoder.stop_ids
    with make_reporter().meter("answers", len(prompts), "answers") as meter:
        answers = sample_answers(
            model, prompts, Decoding(0.0, 16, tuple(stops)), budget=TokenBudget(1024, "test", make_reporter()),
            autocast_dtype=torch.float32, meter=meter,
        )  # fmt: skip
    for prompt in prompts:
        with torch.inference_mode():
            alone = model.generate(
                input_ids=torch.tensor([prompt.tokens]), do_sample=False, max_new_tokens=16, eos_token_id=list(stops),
                pad_token_id=stops[0],
            )  # fmt: skip
        assert list(answers[prompt.id].tokens) == alone[0, len(prompt.tokens) :].tolist()


def test_memory_does_not_grow_with_the_vocabulary(run: Run, project: Project) -> None:
    """512 more tokens to predict cost their hidden states, and no row of logits each: that alone were 4 V bytes."""
    model = load_model(run.folder, project.machine, quantization="none")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    peaks = []
    with Scorer(model, torch.float32, "padded", 64 << 20) as scorer, torch.inference_mode():
        for length in (256, 768):
            group = TokenGroup("a", "a", (5, 6, 7), (tuple(range(10, 10 + length)),))
            with LiveMemory() as memory:
                scorer.score([group])
            peaks.append(memory.peak)
    assert peaks[1] - peaks[0] < 512 * vocabulary * 4 / 3


def test_the_table_of_differences(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed with -rP; it holds what the tests above measured, in nats, the largest over answers of a pair."""
    metrics = run.metrics
    print(f"\n{run.model.name}: layout {metrics['layout']}, step-0 margin {metrics['step0_max_abs_margin']:.1e}")
    print(f"  held-out loss {metrics['eval_loss_start']:.4f} -> {metrics['eval_loss']:.4f} in 3 steps")
    for what, difference in run.differences.items():
        print(f"  {what}: {difference:.1e} nats")
    assert len(run.differences) >= 3 + len(LAYOUTS)


# --- exports ------------------------------------------------------------------------------


def test_the_export_is_what_was_trained(run: Run, tmp_path: Path) -> None:
    """SmolLM2 in GGUF by llama.cpp; Gemma 3, which is not written, is named."""
    from dpo_cli.exporting.export import ExportOptions, export_model

    settings = run.params.evaluate.model_copy(update={"max_new_tokens": 8})
    params = run.params.model_copy(update={"evaluate": settings})
    (found,), _ = export_model(tmp_path, ExportOptions(to=("gguf-f16",), min_kept=0.5), params, SilentReporter())
    if run.model.name == "gemma3":
        assert found.found.problems[0].startswith("GGUF: the family 'gemma3_text' is not written")
        return
    assert found.found.problems == []
    assert found.found.survival is not None
    run.differences["exported in F16, nats a token"] = found.found.survival.mean_nats
    assert found.found.survival.mean_nats < 0.01


# --- llama.cpp ----------------------------------------------------------------------------

TEXTS = (
    "Hello 2024 world",
    "  two  leading, trailing  ",
    "a\n\n\nb\r\n\tc",
    "Stra\u00dfe \u5317\u4eac \U0001f44d\U0001f3fd na\u00efve e\u0301",
    "x**2 + 3.14159e-10 == 100,000?",
    "don't I'LL we've",
    "def f(x):\n    return  x\n",
    "\u0663\u0664\u0665 \u00bd \u00b2 \u2167",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<bos><start_of_turn>user\nq<end_of_turn>\n",
    "",
)


@pytest.fixture(scope="module")
def post(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, dict[str, Any]], Any]]:
    pytest.importorskip("xllamacpp")
    pieces = fetch(run.model)
    whole = pieces[0]
    if len(pieces) > 1:
        whole = tmp_path_factory.mktemp("joined") / "model.gguf"
        whole.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    with serve(whole, 1024) as post:
        yield post


def test_token_ids_and_log_probabilities_are_llama_cpps(run: Run, project: Project, post: Any) -> None:
    """It quantizes activations to 8 bits, so its distribution is near to ours, not equal: by total variation."""
    tokenizer = load_tokenizer(run.folder)
    for text in TEXTS:
        theirs = post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        assert tokenizer(text)["input_ids"] == theirs, text
    model = load_model(run.folder, project.machine, quantization="none")
    ids = tokenizer("The capital of France is Paris, and the capital of Italy is")["input_ids"]
    with torch.inference_mode():
        logps_V = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    top = gguf_files.next_log_probs(post, ids, 5)
    assert sum(abs(math.exp(float(logps_V[token])) - math.exp(logp)) for token, logp in top.items()) / 2 < 0.1


@pytest.mark.parametrize("run", ["smollm2"], indirect=True, scope="module")  # the other is a base model, no judge
def test_the_judge_behind_llama_cpps_server_agrees_with_the_same_model_here(
    run: Run, project: Project, post: Any, make_reporter: Any, cpu: Any
) -> None:
    from dpo_cli.judging.judge import Question
    from dpo_cli.judging.language_model import HfJudge
    from dpo_cli.judging.openai import OpenAiJudge
    from dpo_cli.judging.server import Server
    from dpo_cli.judging.templates import Template

    template = Template("short", "Question: {prompt}\nA: {a}\nB: {b}\nWhich answer is better? Reply with A or B.")
    questions = [Question(row["prompt"], row["chosen"], row["rejected"]) for row in preference_rows()[:4]]
    reporter = make_reporter()
    server = OpenAiJudge.connect(Server(post.url), None, template, reporter)
    assert server.constraint == "grammar"
    assert server.top_logprobs > 0
    local = HfJudge.load(run.folder, template, HfJudgeParams(), Workplace("evaluate", reporter, RuntimeParams(), cpu))
    ours, theirs = dict(local.judge(questions)), dict(server.judge(questions))
    assert [ours[n].p_a for n in range(4)] == pytest.approx([theirs[n].p_a for n in range(4)], abs=0.1)
