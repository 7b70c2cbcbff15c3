"""The models of an evaluation: what they held is free when the judge is loaded."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bitsandbytes.nn import Linear4bit

from dpo_cli.core import paths
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.manifest import Manifest
from dpo_cli.core.params import RuntimeParams
from dpo_cli.core.training_params import LoraParams
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.evaluation.models import open_models, settings_of
from dpo_cli.models.adapters import SftResult, add_adapter, save_adapter
from dpo_cli.models.project import Project


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_closed_models_leave_no_weight_in_memory(
    kind: str,
    project: Path,
    tiny_folder: Path,
    tokenizer: Any,
    cpu: Any,
    reporter: Any,
    no_gc: None,
    make_llama: Callable[..., Any],
) -> None:
    folder = project / "policy"
    if kind == "adapter":
        adapted = add_adapter(make_llama(len(tokenizer)), LoraParams(r=2, alpha=4.0), seed=0)
        save_adapter(adapted, folder, "tiny")
    else:
        folder = tiny_folder
    opened = Project(
        command="evaluate",
        reporter=reporter,
        runtime=RuntimeParams(),
        machine=cpu,
        base=tiny_folder,
        sft=SftResult("none", "digest"),
        quantization="nf4",
        max_length=256,
        policies={},
        tokenizer=tokenizer,
        encoder=ChatEncoder(tokenizer),
        identity={},
    )
    models = open_models(opened, folder)
    held = []
    for model in (models.policy, models.reference):
        with model.use() as loaded:
            held += [weakref.ref(m.weight) for m in loaded.model.modules() if isinstance(m, Linear4bit)]
    del loaded
    assert len(held) >= 14
    assert all(weight() is not None for weight in held)
    models.close()
    assert not [weight for weight in held if weight() is not None]


@pytest.fixture
def no_gc() -> Any:
    """Nothing is collected but when it is asked for."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_settings_of_another_version_are_refused_with_the_remedy() -> None:
    manifest = Manifest(settings={"train": {"beta": 0.1, "gone": 1}})
    with pytest.raises(StaleArtifactError, match=r"settings of another version of dpo-cli; run: dpo-cli train"):
        settings_of(manifest, paths.DPO_MODEL)
    assert settings_of(Manifest(settings={"train": {"beta": 0.3}}), paths.DPO_MODEL).beta == 0.3
