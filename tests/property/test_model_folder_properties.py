"""Whatever garbage lies in a model's small files, verification passes or refuses it in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_cli.core.errors import MachineError

_ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.sampled_from([0, -1, 1, 10**9, 0.5, "", "x", "auto", "../../etc/passwd", [], {}, [[]], {"a": {}}, "\x1b[31m"]),
    st.floats(allow_nan=True),
    st.text(max_size=5),
    st.lists(st.integers(-3, 3), max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "factor", "content", "type", "0"]), st.integers(-2, 2), max_size=2),
)
_FILES = {
    "config.json": None,
    "tokenizer.json": None,
    "tokenizer_config.json": ["chat_template", "eos_token", "bos_token", "tokenizer_class", "added_tokens_decoder",
                              "model_max_length", "auto_map"],
    "generation_config.json": ["eos_token_id", "temperature", "do_sample", "max_length"],
}  # fmt: skip


def _spots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON value something can be changed: a few places in long lists."""
    inner = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [path, *(spot for key, one in inner[:12] for spot in _spots(one, (*path, key)))]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_garbage_is_one_line(data: st.DataObject, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from dpo_cli.models.load import quiet_libraries
    from dpo_cli.models.verify import verify_model_folder

    quiet_libraries()
    folder = tmp_path_factory.mktemp("garbage") / "model"
    shutil.copytree(tiny_folder, folder)
    name = data.draw(st.sampled_from(sorted(_FILES)))
    path = folder / name
    tree = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    spots = _spots(tree)[1:] + [(key,) for key in _FILES[name] or ()]
    for spot in data.draw(st.lists(st.sampled_from(spots), min_size=1, max_size=2)):
        node = tree
        for key in spot[:-1]:
            if not isinstance(node, dict | list) or (isinstance(node, dict) and key not in node):
                break
            node = node[key] if isinstance(node, dict) or key < len(node) else None
        if isinstance(node, dict) or (isinstance(node, list) and isinstance(spot[-1], int) and spot[-1] < len(node)):
            node[spot[-1]] = data.draw(_ODD)
    path.write_text(json.dumps(tree), encoding="utf-8")
    try:
        verify_model_folder(folder)
    except MachineError as error:
        for problem in error.problems:
            assert problem.isprintable()
            assert len(problem) < 1000
    finally:
        shutil.rmtree(folder)
