"""A judge behind a real OpenAI-compatible server: `transformers serve` in a process of its own, over loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.core.errors import MachineError
from dpo_cli.core.params import HfJudgeParams
from dpo_cli.judging.judge import Question
from dpo_cli.judging.openai import OpenAiJudge
from dpo_cli.judging.server import Server
from dpo_cli.judging.templates import Template
from dpo_cli.models.project import Workplace

TEMPLATE = Template("short", "<{prompt}|{a}|{b}> A or B?")
QUESTIONS = [Question(f"prompt {n}", "x" * n, "x" * 5) for n in range(12)]
_PATIENCE_S = 240.0


@pytest.fixture(scope="module")
def lettered(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, make_llama: Callable[..., Any]) -> Path:
    """Directory of a tiny random llama that says A or B and nothing else: no other token's logit is above 0."""
    import torch

    folder = tmp_path_factory.mktemp("lettered")
    model = make_llama(len(tokenizer), tie_word_embeddings=False)
    a, b = (tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "AB")
    with torch.no_grad():
        weight = model.lm_head.weight
        direction = weight[a].clone()
        weight.zero_()
        weight[a], weight[b] = direction, -direction
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def address(lettered: Path, tmp_path: Path) -> Iterator[str]:
    """Of a server that has this model, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "hub").mkdir()
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(lettered), *options]
    environment = os.environ | {"HF_HOME": str(tmp_path)}
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + _PATIENCE_S
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=environment)
        try:
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
                if server.poll() is not None or time.monotonic() > end:
                    pytest.fail(f"no server: {(tmp_path / 'log').read_text(errors='replace')[-2000:]}")
                time.sleep(0.1)
            yield url
        finally:
            server.kill()
            server.wait()


def test_a_server_with_neither_constraints_nor_log_probabilities_is_read_by_its_letter(
    address: str, lettered: Path, project: Path, cpu: Any, reporter: Any
) -> None:
    """It refuses the fields that constrain an answer, and takes those that ask for log-probabilities in silence."""
    from dpo_cli.core.params import RuntimeParams
    from dpo_cli.judging.language_model import HfJudge

    server = Server(address)
    with pytest.raises(MachineError, match="the judge's model must be named"):
        OpenAiJudge.connect(server, None, TEMPLATE, reporter)
    served = OpenAiJudge.connect(server, str(lettered), TEMPLATE, reporter)
    assert (served.constraint, served.top_logprobs) == ("none", 0)
    assert reporter.said[-1].endswith("answers not constrained, read by its letter")
    local = HfJudge.load(lettered, TEMPLATE, HfJudgeParams(), Workplace("evaluate", reporter, RuntimeParams(), cpu))
    ours, theirs = dict(local.judge(QUESTIONS)), dict(served.judge(QUESTIONS))
    assert {each.verdict for each in ours.values()} == {"A", "B"}
    assert all(abs(each.p_a - 0.5) > 1e-3 for each in ours.values()), "rounding decides no verdict"
    for index, judgment in theirs.items():
        assert judgment.verdict == ours[index].verdict
        assert judgment.p_a == (judgment.verdict == "A")
    assert len(theirs) == len(QUESTIONS)
