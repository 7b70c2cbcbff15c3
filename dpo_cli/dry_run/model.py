"""Models without numbers on the dry device, as loading would leave them there, and steps of the real training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Linear4bit
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from dpo_cli.core.environment import is_gpu
from dpo_cli.core.interrupts import StopRequest
from dpo_cli.core.params import RuntimeParams
from dpo_cli.core.progress import SilentReporter
from dpo_cli.core.training_params import LoraParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.adapters import add_adapter
from dpo_cli.models.device import Machine
from dpo_cli.models.load import nf4
from dpo_cli.models.project import Workplace
from dpo_cli.models.shapes import random_pairs
from dpo_cli.scoring.fused import NORM, ROTATION, SWIGLU, install
from dpo_cli.scoring.layout import LayoutName
from dpo_cli.scoring.limits import Work
from dpo_cli.scoring.scorer import MAX_READ_SHARE, Scorer
from dpo_cli.training.accumulation import Accumulator, Limits
from dpo_cli.training.protocols import Learner

_BLOCK, _BLOCKS = 64, 256
"""Weights that share a scale in nf4, and scales that share one under double quantization."""


def dry_model(shape: Mapping[str, Any], machine: Machine, quantization: str, lora: LoraParams) -> Any:
    """A frozen model with a trainable adapter; call under ``dry_cuda`` or ``dry_cpu``.

    Its shape is ``model_type``, and what its configuration says; quantization is ``nf4`` or ``none``.
    """
    settings = dict(shape)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with unset_fake_temporarily():
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=machine.compute_dtype)
        if quantization == "nf4":
            _to_four_bits(model, machine.compute_dtype)
        model.requires_grad_(False)
        model.eval()
        if is_gpu(machine.device):
            install(model, [NORM, SWIGLU, ROTATION])
        model = add_adapter(model, lora, 0)
    _put_on_device(model, machine)
    return model


def _to_four_bits(model: Any, dtype: torch.dtype) -> None:
    """As transformers does it: 4-bit layers in place of all linear ones but the head."""
    head = model.get_output_embeddings()
    kept = [name for name, module in model.named_modules() if module is head]
    replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=nf4(dtype))
    model.is_loaded_in_4bit = True


def _put_on_device(model: torch.nn.Module, machine: Machine) -> None:
    """Put a tensor of the dry device in place of each of a model's; shared ones stay shared."""
    done: dict[int, torch.nn.Parameter] = {}
    meta = []  # so that no id is used twice
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            meta.append(parameter)
            if id(parameter) not in done:
                if isinstance(module, Linear4bit) and name == "weight":
                    done[id(parameter)] = _packed(module, machine)
                else:
                    done[id(parameter)] = _plain(parameter, machine.device)
            module._parameters[name] = done[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=machine.device)


def _plain(parameter: torch.nn.Parameter, device: torch.device) -> torch.nn.Parameter:
    data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    return torch.nn.Parameter(data, requires_grad=parameter.requires_grad)


def _packed(layer: Any, machine: Machine) -> torch.nn.Parameter:
    """A 4-bit weight with its scales; bitsandbytes' own kind of parameter cannot be without numbers."""
    device, size = machine.device, layer.in_features * layer.out_features
    num_scales = -(-size // _BLOCK)
    weight: Any = torch.nn.Parameter(
        torch.empty((size + 1) // 2, 1, dtype=torch.uint8, device=device), requires_grad=False
    )
    scales_of_scales = QuantState(
        absmax=torch.empty(-(-num_scales // _BLOCKS), device=device),
        code=torch.empty(256, device=device),
        blocksize=_BLOCKS,
        dtype=torch.float32,
    )
    weight.quant_state = QuantState(
        absmax=torch.empty(num_scales, dtype=torch.uint8, device=device),
        shape=torch.Size((layer.out_features, layer.in_features)),
        dtype=machine.compute_dtype,
        blocksize=_BLOCK,
        code=torch.empty(16, device=device),
        quant_type="nf4",
        offset=torch.empty((), device=device),
        state2=scales_of_scales,
    )
    layer.quant_state = weight.quant_state
    return weight


# --- a step ---------------------------------------------------------------------------------


class DryAccumulator(Accumulator[Any]):
    """The training loop's gradient of a batch without the read-back at its end.

    So a step runs where there are no numbers, and on a real GPU shows what else the host waits for.
    """

    def __init__(self, learner: Learner[Any], max_tokens: int) -> None:
        machine = Machine(torch.device("cpu"), learner.scorer.compute_dtype)
        work = Workplace("dry run", SilentReporter(), RuntimeParams(), machine)
        super().__init__(learner, Limits.of(work, max_tokens), StopRequest())

    def _exchange(
        self, groups: Sequence[TokenGroup], sums_S: torch.Tensor, parameters: Sequence[torch.nn.Parameter]
    ) -> list[float]:
        """As many zeros as the real one reads from the device, in the one read-back of a step."""
        return [0.0] * len(sums_S)


def open_dry_scorer(model: Any, machine: Machine, layout: LayoutName) -> Scorer:
    """What ``open_scorer`` makes of a model whose probe passes; kernels are tried out as there."""
    scorer = Scorer(model, machine.compute_dtype, layout)
    scorer.max_read_share = MAX_READ_SHARE if scorer.can_read_rows else 0.0
    with scorer, torch.no_grad():
        scorer.score(random_pairs("equal", 1, scorer.config.vocab_size))
    return scorer


def mean_visible_pairs(scorer: Scorer, groups: Sequence[TokenGroup], max_tokens: int) -> int:
    """(query, key) pairs that see each other in a micro-batch, a mean over those of a step."""
    batches = [[groups[index] for index in indices] for indices in scorer.split(groups, max_tokens)]
    return Work.of(batches, scorer.layout).visible // len(batches)


def take_optimizer_step(trainable: Sequence[torch.nn.Parameter], norm: torch.Tensor) -> None:
    """Clip the gradients, which have this norm, and take a step of AdamW, as training does; they are gone after it."""
    torch.nn.utils.clip_grads_with_norm_(trainable, 1.0, norm)
    # fused: the other forms read on the CPU how many steps were done, which has no number here
    torch.optim.AdamW(trainable, lr=1e-6, fused=True).step()
    for parameter in trainable:
        parameter.grad = None
