"""What ``dpo-cli doctor`` tries in processes of their own: 4-bit products both ways, and files without a network.

bitsandbytes can end its process, and a network that was taken away does not come back.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.errors import DpoCliError, MachineError, ParamsError, StaleArtifactError, first_line


@dataclass(frozen=True)
class Trial:
    """A process of its own that says what it found as lines of JSON, and may die without harm."""

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Trial:
        """Run a module of this package."""
        command = [sys.executable, "-m", module, *arguments]
        pipe = subprocess.PIPE
        return cls(
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, env=environment or os.environ
            )
        )

    def result(self, timeout_s: float | None = None) -> dict[str, Any]:
        """All that it said; ``ended`` says how, where it did not end well."""
        try:
            out, said = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, said = self.process.communicate()
            said = f"no end after {timeout_s:.0f} s"
        found: dict[str, Any] = {}
        for line in out.splitlines():
            with suppress(ValueError):
                found |= json.loads(line)
        code = self.process.returncode
        if code:
            last = (said.strip().splitlines() or ["nothing was said"])[-1]
            how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
            found.setdefault("ended", f"{how}: {last}")
        return found


def say(**found: Any) -> None:
    """Say something to the process that started this one."""
    print(json.dumps(found), flush=True)


# --- 4-bit products -------------------------------------------------------------------------

_ROWS = (2, 128)
"""Few rows are multiplied with the packed weight, many with an unpacked one."""


def _four_bits() -> None:
    """A 4-bit layer forward and backward, held against the same with its weight unpacked."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        import torch

        available = torch.cuda.is_available()
    say(torch=torch.__version__, cuda=torch.version.cuda, hip=torch.version.hip, available=available)
    if heard:
        say(warning=str(heard[-1].message).strip().partition("\n")[0])
    if available:
        free, total = torch.cuda.mem_get_info()
        say(
            name=torch.cuda.get_device_name(),
            capability=torch.cuda.get_device_capability(),
            kernels=torch.cuda.get_arch_list(),
            free=free,
            total=total,
        )
    try:
        say(**_try_four_bits(torch))
    except Exception as error:
        say(error=first_line(error, 300))


def _try_four_bits(torch: Any) -> dict[str, Any]:
    from bitsandbytes.cextension import lib
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    from dpo_cli.core.params import RuntimeParams
    from dpo_cli.models.device import prepare_machine

    if isinstance(words := getattr(lib, "error_msg", None), str):
        return {"library": first_line(RuntimeError(words), 300)}
    machine = prepare_machine(RuntimeParams(), embedded=False)
    torch.manual_seed(0)
    layer: Any = Linear4bit(
        256, 128, bias=False, compute_dtype=machine.compute_dtype, compress_statistics=True, quant_type="nf4"
    )
    plain = layer.weight.data.clone()
    layer = layer.to(machine.device)
    unpacked = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    rounding = float((unpacked.cpu() - plain.float()).norm() / plain.float().norm())
    worst = 0.0
    for rows in _ROWS:
        inputs = torch.randn(rows, 256, device=machine.device, dtype=machine.compute_dtype, requires_grad=True)
        outputs = layer(inputs)
        weights = torch.randn_like(outputs)
        outputs.backward(weights)
        pairs = ((outputs, inputs.detach().float() @ unpacked.T), (inputs.grad, weights.float() @ unpacked))
        for got, expected in pairs:
            worst = max(worst, float((got.float() - expected).norm() / expected.norm()))
    return {"device": str(machine.device), "dtype": machine.dtype_name, "difference": worst, "rounding": rounding}


# --- every file is there, without a network -------------------------------------------------

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000


def _leave_network(attempts: list[str]) -> str:
    """Take this process's network away, and refuse and note what Python still tries; how, in words."""

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            attempts.append(str(arguments[1][0]))
        elif event == "socket.getaddrinfo":
            attempts.append(str(arguments[0]))
        else:
            return
        raise OSError("dpo-cli doctor has taken the network away")

    sys.addaudithook(refuse)
    import ctypes

    with suppress(OSError, AttributeError, TypeError):  # not on Linux
        unshare = ctypes.CDLL(None).unshare
        if unshare(_CLONE_NEWNET) == 0 or unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0:
            return "opened in a process without a network"
    return "opened in a process that refuses every connection"


def _offline() -> None:
    """Open every model that the settings name as a stage does, and as others do, who do not say that it is local."""
    attempts: list[str] = []
    how = _leave_network(attempts)
    from dpo_cli.core.load_params import parse_params

    params = parse_params(json.loads(sys.argv[2]))
    problems: list[tuple[str, int]] = []
    opened: list[str] = []
    for name, open_ in _MODELS.items():
        try:
            if what := open_(params):
                opened.append(f"{name} {what}")
        except DpoCliError as error:
            problems += [(problem, error.exit_code) for problem in error.problems]
    say(problems=problems, opened=opened, attempts=sorted(set(attempts)), blocked=how)


def _open_base(params: Any) -> str:
    from dpo_cli.core.params import EMBEDDED
    from dpo_cli.models.folder import base_folder
    from dpo_cli.models.identity import model_files, read_base_lock

    folder = base_folder(params.model, params.runtime)
    try:
        lock = read_base_lock()
    except StaleArtifactError:
        lock = None
    if params.model.name == EMBEDDED and lock is None:
        return ""  # which stage base will build of nothing
    if lock is not None and lock.name == params.model.name and (gone := set(lock.files) - set(model_files(folder))):
        raise StaleArtifactError(
            f"{folder / sorted(gone)[0]} is missing, which was there when the model was locked; put it back"
        )
    _open_model(folder, params.model)
    return str(folder)


def _open_model(folder: Path, model: Any = None) -> None:
    """Verify a model folder; its tokenizer also without a word that it is local."""
    from transformers import AutoConfig, AutoTokenizer

    from dpo_cli.models.load import quiet_libraries
    from dpo_cli.models.verify import verify_model_folder

    quiet_libraries()
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise MachineError(
            f"{folder / _TOKENIZERS[0]} is missing, and no other file of a tokenizer is there; fetch the whole model"
        )
    verify_model_folder(folder, model)
    with suppress(OSError, ValueError):  # what matters is whether it asks
        AutoConfig.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)


_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def _open_adapter(params: Any) -> str:
    from dpo_cli.models.folder import adapter_folder

    return str(adapter_folder(params.runtime)) if params.sft.method == "adapter" else ""


def _open_judge(params: Any) -> str:
    if params.evaluate.judge != "hf":
        return ""
    given = os.environ.get("DPO_JUDGE_PATH") or params.runtime.judge_path
    if not given:
        raise ParamsError("judge hf needs its model; set runtime.judge_path (or DPO_JUDGE_PATH) to a directory")
    folder = paths.from_root(given)
    _open_model(folder)
    return str(folder)


_MODELS = {"base model": _open_base, "adapter": _open_adapter, "judge": _open_judge}
_TRIALS = {"four-bits": _four_bits, "offline": _offline}

if __name__ == "__main__":
    _TRIALS[sys.argv[1]]()
