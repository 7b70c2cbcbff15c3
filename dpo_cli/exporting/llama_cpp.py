"""llama.cpp in this process, behind its own server: what it makes of a GGUF file (package xllamacpp)."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_FORCING = 1000.0
"""Added to the logit of the token that is to come; the probability that is told is of the logits before."""
_SEARCHED = 4096


def is_there() -> bool:
    """Whether llama.cpp can be loaded."""
    return find_spec("xllamacpp") is not None


class LlamaCpp:
    """A model that llama.cpp has loaded.

    Args:
        url: Of its server.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(self, address: str, body: dict[str, Any]) -> Any:
        """Post a JSON body and read the answer."""
        request = urllib.request.Request(
            f"{self.url}{address}", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a whole prompt, with what llama.cpp puts before every text."""
        return self("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def token_logps(self, prompt: Sequence[int], completion: Sequence[int]) -> list[float | None]:
        """The log-probability of each token of a completion, nats; None for halves of a character that it hides."""
        return [self._logp([*prompt, *completion[:place]], token) for place, token in enumerate(completion)]

    def _logp(self, before: list[int], token: int) -> float | None:
        told = self._next(before, token, 1)
        if told:
            return float(told[0]["logprob"])
        # no probability where the token is no whole character: it may be among those of another one
        for other in range(1024):
            if other != token and (told := self._next(before, other, _SEARCHED)):
                found = {int(each["id"]): float(each["logprob"]) for each in told[0]["top_logprobs"]}
                return found.get(token)
        return None

    def _next(self, before: list[int], token: int, number: int) -> list[dict[str, Any]]:
        body = {"prompt": before, "n_predict": 1, "n_probs": number, "temperature": 0, "cache_prompt": True}
        return self("/completion", {**body, "logit_bias": [[token, _FORCING]]}).get("completion_probabilities") or []

    def greedy(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """The most probable token each time, until the model ends its turn."""
        body = {"prompt": list(prompt), "n_predict": max_new_tokens, "temperature": 0, "cache_prompt": True}
        return self("/completion", {**body, "return_tokens": True})["tokens"]

    def stops_at(self, prompt: Sequence[int], token: int) -> bool:
        """Whether generation ends after a token."""
        body = {"prompt": list(prompt), "n_predict": 2, "temperature": 0, "cache_prompt": True}
        found = self("/completion", {**body, "logit_bias": [[token, _FORCING]]})
        return found["stop_type"] == "eos"


@contextmanager
def serve(path: Path, num_context: int = 256, *, lora: Path | None = None, threads: int = 1) -> Iterator[LlamaCpp]:
    """Load a GGUF file, perhaps with a LoRA adapter, and compute in float32 but for what the file's types imply."""
    xllamacpp: Any = import_module("xllamacpp")  # compiled, and without types
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = num_context, 1, False, 1
    params.cpuparams.n_threads = threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = xllamacpp.Server(params)
    try:
        yield LlamaCpp(server.listening_address)
    finally:
        del server
