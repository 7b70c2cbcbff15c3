"""``dpo-cli doctor``: the checks in their order, and what to make of what was tried in processes of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.core import checkup, paths
from dpo_cli.core.checkup import GIB, Finding, faults_of, pip, run
from dpo_cli.core.environment import users_environment
from dpo_cli.core.errors import DpoCliError, MachineError, says_out_of_memory
from dpo_cli.models import trials
from dpo_cli.models.trials import Trial

if TYPE_CHECKING:  # pydantic may be what is missing
    from dpo_cli.core.params import Params

_LONGEST_S = 60.0
"""Seconds after which what is tried in a process of its own is given up; it takes five."""


def examine(look_at_data: Callable[[Params], None]) -> Iterator[Finding]:
    """Everything, for the project in the working directory if it is one; findings come as soon as they are known.

    What fails because a package is missing or of the wrong version is no fault of its own.

    Args:
        look_at_data: Raises errors of the data that the settings name.
    """
    in_project = paths.PARAMS.is_file()
    products = Trial.start(trials.__name__, "four-bits")
    dvc = checkup.start_dvc(in_project=in_project)
    are_right = True
    for finding in checkup.packages():
        are_right &= finding.status != "bad"
        yield finding
    opened: list[Trial] = []

    def settings() -> Iterator[Finding]:
        from dpo_cli.core.load_params import load_params

        params = load_params(paths.PARAMS)
        opened.append(start_offline(params))
        yield Finding("settings", "good", f"{paths.PARAMS} is right")
        try:
            look_at_data(params)
        except DpoCliError as error:
            yield from faults_of("data", error)

    def card() -> Iterator[Finding]:
        tried = products.result(_LONGEST_S)
        found = gpu(tried, read_card(), card_without_driver(), users_environment())
        yield found
        yield four_bits(tried)
        yield from checkup.windows(has_gpu=found.status in ("good", "warn"))

    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("system", lambda: [checkup.system()]),
        *([("settings", settings)] if in_project else []),
        ("memory", lambda: [checkup.memory()]),
        ("disk", lambda: checkup.disks(in_project=in_project)),
        ("clock", lambda: [checkup.clock()]),
        ("git", lambda: [checkup.git(in_project=in_project)]),
        *([("dvc links", lambda: [checkup.links()])] if in_project else []),
        ("gpu", card),
        ("dvc", lambda: [checkup.dvc(dvc, _LONGEST_S / 4, in_project=in_project)]),
        ("offline", lambda: _offline(opened, in_project=in_project)),
    ]
    for name, check in checks:
        try:
            for finding in check():
                if not are_right and finding.status == "bad" and finding.name in ("4-bit", "offline", "dvc"):
                    found = f"put the packages right first: {finding.found}"
                    yield Finding(finding.name, "plain", found)
                else:
                    yield finding
        except DpoCliError as error:
            yield from faults_of(name, error)
        except ImportError as error:
            yield Finding(name, "plain", f"not looked at: {error}")


def _offline(opened: Sequence[Trial], *, in_project: bool) -> Iterator[Finding]:
    if not in_project:
        yield Finding("offline", "plain", f"{Path.cwd()} is no project folder: its files were not looked for")
    for trial in opened:
        yield from offline(trial.result(_LONGEST_S))


# --- driver, PyTorch, bitsandbytes ----------------------------------------------------------


def read_card() -> dict[str, str]:
    """What NVIDIA's driver says of the first card; empty where there is no driver."""
    tool = shutil.which("nvidia-smi") or shutil.which("/usr/lib/wsl/lib/nvidia-smi")
    if tool is None:
        return {}
    asked = ("name", "driver_version", "power.limit")
    try:
        line, words = run(tool, f"--query-gpu={','.join(asked)}", "--format=csv,noheader,nounits").stdout, run(tool)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in line.partition("\n")[0].split(",")]
    if len(values) != len(asked):
        return {}
    cuda = re.search(r"CUDA Version:\s*([\d.]+)", words.stdout)
    return dict(zip(asked, values, strict=True)) | ({"cuda": cuda[1]} if cuda else {})


_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD"}


def card_without_driver(devices: Path = Path("/sys/bus/pci/devices")) -> str:
    """The maker of a graphics card that the system sees on its bus; empty if there is none."""
    for device in sorted(devices.glob("*")):
        with suppress(OSError):
            if (device / "class").read_text(encoding="ascii").startswith("0x03"):
                vendor = (device / "vendor").read_text(encoding="ascii").strip()
                if vendor in _VENDORS:
                    return _VENDORS[vendor]
    return ""


_MOSTLY_FREE = 0.8
_WHEELS = ((13, 0), (12, 8), (12, 6))
"""Versions of CUDA for which PyTorch has wheels, the newest first."""


def _wheel_for(cuda: str) -> str:
    """What installs the PyTorch for a driver that knows CUDA up to here."""
    known = _numbers(cuda)
    for wheel in _WHEELS:
        if wheel <= known:
            index = f"https://download.pytorch.org/whl/cu{wheel[0]}{wheel[1]}"
            return pip("--force-reinstall", "torch", "--index-url", index)
    return "update NVIDIA's driver to 580 or newer"


def _numbers(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major or 0), int(re.match(r"\d*", minor)[0] or 0)  # type: ignore[index] (it matches)


def gpu(tried: Mapping[str, Any], card: Mapping[str, str], maker: str, environment: Mapping[str, str]) -> Finding:
    """Whether driver and PyTorch go together.

    Args:
        tried: What the trial of 4-bit products said.
        card: See :func:`read_card`.
        maker: See :func:`card_without_driver`.
        environment: Variables of the user's shell.
    """

    def bad(found: str, remedy: str) -> Finding:
        return Finding("gpu", "bad", found, remedy)

    if "torch" not in tried:
        return Finding("gpu", "plain", "not tried: PyTorch cannot be imported")
    named = f"PyTorch {tried['torch']}"
    if tried["available"]:
        return _usable_gpu(tried, named, card.get("driver_version"))
    if card:
        cuda = card.get("cuda", "")
        driver = f"driver {card['driver_version']}"
        hidden = environment.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None and not re.search(r"\d", hidden.replace("-1", "")):
            return bad(f"CUDA_VISIBLE_DEVICES={hidden} hides {card['name']}", "run: unset CUDA_VISIBLE_DEVICES")
        if tried["cuda"] is None:
            made_for = "AMD cards" if tried["hip"] else "CPUs"
            return bad(f"{named} cannot use {card['name']}: it is made for {made_for}", _wheel_for(cuda))
        if cuda and _numbers(tried["cuda"])[0] > _numbers(cuda)[0]:
            found = f"{named} needs CUDA {tried['cuda']}, and {driver} of {card['name']} goes up to {cuda}"
            return bad(found, f"update NVIDIA's driver to 580 or newer, or {_wheel_for(cuda)}")
        said = f": {tried['warning']}" if "warning" in tried else ""
        return bad(f"{named} does not find {card['name']}, {driver}{said}", "restart the machine; ask nvidia-smi again")
    if maker == "NVIDIA":
        return bad("there is an NVIDIA card, but no driver", "install NVIDIA's driver, 580 or newer, and restart")
    if maker and tried["hip"] is None:
        remedy = pip("--force-reinstall", "torch", "--index-url", "https://download.pytorch.org/whl/rocm7.0")
        return Finding("gpu", "warn", f"there is an {maker} card, and {named} cannot use it", remedy)
    return Finding("gpu", "plain", f"none; {named} computes on the CPU")


def _usable_gpu(tried: Mapping[str, Any], named: str, driver: str | None) -> Finding:
    """One that PyTorch finds: whether it has kernels for it, and memory."""
    capability = (int(tried["capability"][0]), int(tried["capability"][1]))
    if tried["hip"] is None and not _has_kernels(tried["kernels"], capability):
        found = f"{named} has no kernels for {tried['name']} (compute capability {capability[0]}.{capability[1]})"
        return Finding("gpu", "bad", found, _wheel_for("13.0" if capability >= (7, 5) else "12.6"))
    free, total = tried["free"] / GIB, tried["total"] / GIB
    found = f"{tried['name']}, {named}, driver {driver or 'unknown'}, {free:.1f} GiB free of {total:.1f}"
    if free < _MOSTLY_FREE * total:
        found += ": something else uses the rest"
        return Finding("gpu", "warn", found, "run nvidia-smi and close what it lists")
    return Finding("gpu", "good", found)


def _has_kernels(kernels: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether PyTorch was built for a card: for its generation up to its minor version, or as PTX, like sm_86."""
    for kind, major, minor in re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(kernels)):
        built = (int(major), int(minor))
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


_TOLERANCE = {"float32": 1e-4}
_TOLERANCE_OF_16_BITS = 2e-2
_ROUNDING = 0.15
"""Of normal weights in nf4 it is 0.09 (root mean squares)."""


def four_bits(tried: Mapping[str, Any]) -> Finding:
    """Whether 4-bit products are right, forward and backward."""

    def bad(found: str, remedy: str) -> Finding:
        return Finding("4-bit", "bad", found, remedy)

    again = pip("--force-reinstall", "bitsandbytes")
    where = tried.get("device", "the GPU" if tried.get("available") else "the CPU")
    if "difference" in tried:
        off, rounding = tried["difference"], tried["rounding"]
        products = f"products on {where} in {tried['dtype']}, forward and backward, are {off:.0e} off"
        found = f"nf4 rounds weights by {rounding:.1%}; {products}"
        is_right = off <= _TOLERANCE.get(tried["dtype"], _TOLERANCE_OF_16_BITS) and rounding <= _ROUNDING
        return Finding("4-bit", "good", found) if is_right else bad(f"{found}: wrong numbers", again)
    if "library" in tried:
        cuda = f" for CUDA {tried['cuda']}" if tried.get("cuda") else ""
        remedy = "run: unset BNB_CUDA_VERSION" if "BNB_CUDA_VERSION" in os.environ else again
        return bad(f"bitsandbytes has no library{cuda} that can be loaded: {tried['library']}", remedy)
    words = tried.get("error") or tried.get("ended") or "nothing was said"
    if missing := re.search(r"No module named '(\w+)", words):
        return Finding("4-bit", "plain", f"not tried: {missing[1]} is missing")
    if says_out_of_memory(words):
        return bad(f"no memory is left on {where}", "close other programs that use it")
    return bad(
        f"4-bit products on {where} fail: {words}", again if "torch" in tried else pip("--force-reinstall", "torch")
    )


# --- files ----------------------------------------------------------------------------------

_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


def start_offline(params: Params) -> Trial:
    """Open what the settings name, with no way out: see :func:`_offline`. The switches against downloads are off."""
    environment = {name: value for name, value in users_environment().items() if name not in _SWITCHES}
    return Trial.start(trials.__name__, "offline", params.model_dump_json(), environment=environment)


def offline(tried: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether all that was opened was there."""
    given = users_environment().get("HF_HUB_OFFLINE")
    unset = given is None or given.lower() not in ("1", "true", "yes", "on")
    how = tried.get("blocked", "")
    if "opened" not in tried:
        words = tried.get("ended", "nothing was said")
        if missing := re.search(r"No module named '(\w+)", words):
            yield Finding("offline", "plain", f"not tried: {missing[1]} is missing")
        else:
            yield Finding("offline", "bad", f"opening the model fails: {words}", "run: dpo-cli base")
        return
    shell = "HF_HUB_OFFLINE is not set in this shell, so other programs would look for it on the network"
    for problem, code in tried["problems"]:
        for fault in faults_of("offline", MachineError(problem)):
            found = f"{fault.found}; {shell}" if unset and "missing" in problem else fault.found
            remedy = f"{fault.remedy}; and run: export HF_HUB_OFFLINE=1" if found != fault.found else fault.remedy
            yield Finding("offline", "bad", found, remedy, code)
    if tried["attempts"]:
        hosts = ", ".join(tried["attempts"])
        yield Finding("offline", "bad", f"opening it asks the network ({hosts})", "run: export HF_HUB_OFFLINE=1")
    if not tried["problems"] and not tried["attempts"]:
        opened = ", ".join(tried["opened"]) or "nothing outside of the project is needed"
        note = "; HF_HUB_OFFLINE is not set in this shell, dpo-cli sets it for itself" if unset else ""
        yield Finding("offline", "good", f"complete: {opened}; {how}, nothing asked for it{note}")
