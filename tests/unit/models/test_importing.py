"""Import of models: every source becomes an ordinary folder that computes the same, or one line and nothing."""

from __future__ import annotations

import json
import os
import pickle
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.core.errors import MachineError, ParamsError
from dpo_cli.models.describe import describe_model
from dpo_cli.models.importing import GgufOptions, import_model
from tests import gguf_files

Make = Callable[..., Any]

IDS = torch.tensor([[5, 17, 90, 33, 8, 41, 12]])


def _import(source: Path, out: Path, reporter: Any) -> Any:
    return import_model([source], out, GgufOptions(), reporter)[1]


def _logits(folder: Path, auto: Any = AutoModelForCausalLM) -> torch.Tensor:
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model folder of one's own, with what else such folders hold."""
    copy = tmp_path / "source"
    copy.mkdir()
    for path in tiny_folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "LICENSE").write_text("A License\n\nDo as you like.\n", encoding="utf-8")
    (copy / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n", encoding="utf-8")
    (copy / "modeling_tiny.py").write_text("raise SystemExit", encoding="utf-8")
    return copy


def _write_pickles(folder: Path, *, num_files: int = 1) -> None:
    """Put pickled weights, the head once more under its own name, in place of safetensors."""
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    if num_files == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    places = {name: f"pytorch_model-0000{1 + index % num_files}-of-00002.bin" for index, name in enumerate(names)}
    for file in set(places.values()):
        torch.save({name: state[name] for name in names if places[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")


# --- ordinary folders and the Hub's cache -------------------------------------------------


def test_an_ordinary_folder_is_copied_but_for_what_is_no_part_of_the_model(
    folder: Path, tmp_path: Path, reporter: Any
) -> None:
    before = _files(folder)
    found = _import(folder, tmp_path / "out", reporter)
    after = _files(tmp_path / "out")
    assert {name: before[name] for name in after} == after
    assert before.keys() - after.keys() == {"modeling_tiny.py"}
    assert [note for note in found.notes if "left behind" in note and "modeling_tiny.py" in note]
    assert found.figures["license"] == "mit"
    assert found.figures["license_files"] == ["LICENSE"]


def test_a_snapshot_of_the_hubs_cache_becomes_files_of_its_own(folder: Path, tmp_path: Path, reporter: Any) -> None:
    cache = tmp_path / "models--org--tiny"
    snapshot, blobs = cache / "snapshots" / "0123abcd", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("0123abcd", encoding="utf-8")
    (cache / "snapshots" / "older").mkdir()
    source, _ = import_model([cache], tmp_path / "out", GgufOptions(), reporter)
    assert source.revision == "0123abcd"
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    torch.testing.assert_close(_logits(tmp_path / "out"), _logits(snapshot), rtol=0, atol=0)
    (cache / "refs/main").unlink()
    with pytest.raises(MachineError, match="holds 2 snapshots and refs/main names none of them; give one: .*0123abcd"):
        _import(cache, tmp_path / "more", reporter)
    (snapshot / "tokenizer.json").resolve().unlink()
    with pytest.raises(MachineError, match=r"tokenizer\.json points to .* which is missing: the download is not comp"):
        _import(snapshot, tmp_path / "more", reporter)
    assert not (tmp_path / "more").exists()


# --- pickled weights ----------------------------------------------------------------------


@pytest.mark.parametrize("num_files", [1, 2])
def test_pickled_weights_become_safetensors_of_the_same_numbers(
    num_files: int, folder: Path, tmp_path: Path, reporter: Any
) -> None:
    expected = _logits(folder)
    _write_pickles(folder, num_files=num_files)
    _import(folder, tmp_path / "out", reporter)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == ["model.safetensors"]
    torch.testing.assert_close(_logits(tmp_path / "out"), expected, rtol=0, atol=0)


class _Attack:
    def __reduce__(self) -> Any:
        return os.system, ("touch attacked",)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(
    folder: Path, tmp_path: Path, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _write_pickles(folder)
    weights = folder / "pytorch_model.bin"
    whole = weights.read_bytes()
    state: Mapping[str, Any] = torch.load(weights)
    torch.save(dict(state) | {"extra": _Attack()}, weights)
    with pytest.raises(MachineError, match=r"pytorch_model\.bin is refused: .* run code .*\((posix|nt)\.system\)"):
        _import(folder, tmp_path / "out", reporter)
    weights.write_bytes(pickle.dumps(_Attack()))
    with pytest.raises(MachineError, match=r"pytorch_model\.bin is "):
        _import(folder, tmp_path / "out", reporter)
    for damaged in (whole[: len(whole) // 2], b"", b"PK\x03\x04" + bytes(99), whole[:200] + bytes(200) + whole[400:]):
        weights.write_bytes(damaged)
        with pytest.raises(MachineError) as error:
            _import(folder, tmp_path / "out", reporter)
        assert len(error.value.problems) == 1
        assert "\n" not in error.value.problems[0]
    assert not (tmp_path / "attacked").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


# --- multimodal checkpoints ---------------------------------------------------------------

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
_PIXTRAL = _CLIP | {"model_type": "pixtral", "head_dim": 16}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
FAMILIES: dict[str, dict[str, Any]] = {
    "Gemma3": {"text_config": _TEXT | {"sliding_window": 4}, "vision_config": _CLIP, "mm_tokens_per_image": 4},
    "Llava": {"text_config": _TEXT | {"model_type": "llama"}, "vision_config": _CLIP},
    "Qwen2VL": {"text_config": _TEXT | {"rope_parameters": _ROPE}, "vision_config": _QWEN_VISION},
    "Mistral3": {"text_config": _TEXT | {"model_type": "mistral"}, "vision_config": _PIXTRAL},
}  # fmt: skip


@pytest.fixture
def make_multimodal(tokenizer: Any, tmp_path: Path) -> Callable[..., Path]:
    """``make(family)``: folder of a tiny random model of texts and images."""

    def make(family: str, **changes: Any) -> Path:
        values = FAMILIES[family] | changes
        special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "vocab_size": len(tokenizer)}
        text = values["text_config"] | special
        config = getattr(transformers, f"{family}Config")(**(values | {"text_config": text}))
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        folder = tmp_path / family
        model.save_pretrained(folder)
        kept = {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token, "unk_token": tokenizer.pad_token}
        model_json = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        is_qwen = family.startswith("Qwen")  # which transformers loads with a tokenizer of their own, whatever is saved
        own = transformers.Qwen2Tokenizer(
            vocab=model_json["vocab"], merges=[tuple(merge) for merge in model_json["merges"]], **kept
        )
        own.chat_template = tokenizer.chat_template
        (own if is_qwen else tokenizer).save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_part_of_a_multimodal_model_computes_the_same_of_a_text(
    family: str, make_multimodal: Make, tmp_path: Path, reporter: Any
) -> None:
    whole = make_multimodal(family)
    found = _import(whole, tmp_path / "out", reporter)
    assert found.figures["architecture"].endswith("ForCausalLM")
    torch.testing.assert_close(
        _logits(tmp_path / "out"), _logits(whole, AutoModelForImageTextToText), rtol=0, atol=2e-5
    )
    assert not [name for name in _files(tmp_path / "out") if "processor" in name]


def test_a_model_whose_text_part_is_another_model_by_itself_is_refused(
    make_multimodal: Make, tmp_path: Path, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_cli.models import rebuild

    whole = make_multimodal("Qwen2VL")
    monkeypatch.setattr(rebuild, "_PLAIN_TEXT", {"qwen2_vl_text": "llama"})  # which has no bias
    with pytest.raises(MachineError, match="its language model is not that of llama"):
        _import(whole, tmp_path / "out", reporter)
    monkeypatch.setattr(rebuild, "_PLAIN_TEXT", {})
    with pytest.raises(MachineError, match=r"qwen2_vl \(qwen2_vl_text\) is of no family that can be used by itself"):
        _import(whole, tmp_path / "out", reporter)
    assert not (tmp_path / "out").exists()


# --- GGUF ---------------------------------------------------------------------------------

_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<think>' + m.role + ' ' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<think>assistant ' }}{% endif %}"
)


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A tiny GGUF file with a template whose turns end in another token than texts do."""
    pytest.importorskip("gguf")
    place = tmp_path / "gguf"
    place.mkdir()
    (place / "LICENSE").write_text("Some License\n", encoding="utf-8")
    return gguf_files.write(
        place / "tiny.gguf",
        gguf_files.tensors_of(),
        gguf_files.settings_of(rope__dimension_count=16),
        tokenizer=gguf_files.vocabulary() | {"chat_template": _TEMPLATE},
        general={"license": "apache-2.0", "name": "Tiny"},
    )


def test_a_gguf_file_brings_template_end_tokens_and_license(gguf_file: Path, tmp_path: Path, reporter: Any) -> None:
    found = _import(gguf_file, tmp_path / "out", reporter)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == _TEMPLATE
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    generation = json.loads((tmp_path / "out/generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == [2, end]
    assert [token["text"] for token in found.figures["end_tokens"]] == ["<eos>", "<|end|>"]
    assert found.figures["license"] == "apache-2.0"
    assert (tmp_path / "out/LICENSE").read_text(encoding="utf-8") == "Some License\n"
    umask = os.umask(0)
    os.umask(umask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o666 & ~umask}
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
    assert "import: reading the file" in {meter.label for meter in reporter.meters}
    assert all(meter.done == meter.total for meter in reporter.meters)


def test_pieces_make_the_same_model_as_the_whole(gguf_file: Path, tmp_path: Path, reporter: Any) -> None:
    whole = _import(gguf_file, tmp_path / "whole", reporter).figures["files"]["model.safetensors"]
    data = gguf_file.read_bytes()
    for number in range(3):
        cut = slice(number * len(data) // 3, (number + 1) * len(data) // 3)
        (tmp_path / f"tiny.gguf.part{number:02}").write_bytes(data[cut])
    by_name = _import(tmp_path / "tiny.gguf.part00", tmp_path / "named", reporter)
    assert by_name.figures["files"]["model.safetensors"] == whole
    pieces = sorted(tmp_path.glob("*.part*"))
    _, given = import_model(pieces, tmp_path / "given", GgufOptions(), reporter)
    assert given.figures["files"]["model.safetensors"] == whole
    pieces[1].unlink()
    with pytest.raises(MachineError, match=r"part00 is cut off"):
        _import(pieces[0], tmp_path / "more", reporter)
    with pytest.raises(MachineError, match=r"part02 is one of 3 pieces, and tiny\.gguf\.part01 is missing"):
        _import(pieces[2], tmp_path / "more", reporter)


def test_files_that_llama_cpp_split_make_the_same_model(gguf_file: Path, tmp_path: Path, reporter: Any) -> None:
    whole = _import(gguf_file, tmp_path / "whole", reporter).figures["files"]["model.safetensors"]
    tensors = gguf_files.tensors_of()
    names, settings = list(tensors), gguf_files.settings_of(rope__dimension_count=16)
    for number, part in enumerate((names[:9], names[9:])):
        place = tmp_path / f"tiny-0000{number + 1}-of-00002.gguf"
        rest: dict[str, Any] = {"tokenizer": {}} if number else {}
        split = (number, 2, len(names))
        gguf_files.write(place, {name: tensors[name] for name in part}, {} if number else settings, split=split, **rest)
    found = _import(tmp_path / "tiny-00001-of-00002.gguf", tmp_path / "out", reporter)
    assert found.figures["files"]["model.safetensors"] == whole
    with pytest.raises(MachineError, match="it says that it is the first of 2 pieces; 2 were given, .* numbers 1, 0"):
        import_model(sorted(tmp_path.glob("*-of-*"), reverse=True), tmp_path / "more", GgufOptions(), reporter)


def test_a_damaged_gguf_file_is_one_line_and_nothing_is_left(gguf_file: Path, tmp_path: Path, reporter: Any) -> None:
    data = gguf_file.read_bytes()
    count = data.index(b"llama.block_count") + len(b"llama.block_count") + 4
    scores = data.index(b"ggml.scores") + len(b"ggml.scores") + 4
    huge = (1 << 60).to_bytes(8, "little")
    damaged = {
        "empty": b"",
        "text": b"GIF89a" + data,
        "version": data[:4] + (99).to_bytes(4, "little") + data[8:],
        "tensors": data[:8] + huge + data[16:],
        "entries": data[:16] + huge + data[24:],
        "a length": data[:24] + huge + data[32:],
        "layers": data[:count] + (1_000_000_000).to_bytes(4, "little") + data[count + 4 :],
        "an array": data[:scores] + bytes(4) + huge + data[scores + 12 :],
    }
    damaged |= {f"cut at {cut}": data[:cut] for cut in (3, 5, 20, 100, 3000, len(data) // 2, len(data) - 1)}
    for what, content in damaged.items():
        gguf_file.write_bytes(content)
        with pytest.raises(MachineError) as error:
            _import(gguf_file, tmp_path / "out", reporter)
        (problem,) = error.value.problems
        assert problem.startswith(str(gguf_file)), (what, problem)
        assert "\n" not in problem
        assert len(problem) < 700
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gguf"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"architecture": "clip"}, "holds the image part of a model"),
        ({"architecture": "unheard-of"}, "no model can be made of architecture 'unheard-of'"),
        ({"pre": "unheard-of", "model": "gpt2"}, "how its vocabulary cuts a text into words .* is not known"),
        ({"feed_forward_length": 64}, r"holds \d+ numbers, and the model .* takes \d+: it would not be"),
        ({"eos_token_id": 10**6}, r"tokenizer\.ggml\.eos_token_id is 1000000, and there are 478 tokens"),
    ],
)  # fmt: skip
def test_a_gguf_file_that_is_not_understood_is_refused(
    changes: dict[str, Any], problem: str, tmp_path: Path, reporter: Any
) -> None:
    pytest.importorskip("gguf")
    vocabulary = gguf_files.vocabulary()
    if changes.get("model") == "gpt2":
        vocabulary["merges"] = ["t h"]
    settings = gguf_files.settings_of(rope__dimension_count=16)
    for place in (vocabulary, settings):
        place |= {key: value for key, value in changes.items() if key in place}
    architecture = changes.get("architecture", "llama")
    file = gguf_files.write(
        tmp_path / "tiny.gguf", gguf_files.tensors_of(), settings, architecture=architecture, tokenizer=vocabulary
    )
    with pytest.raises(MachineError, match=problem):
        _import(file, tmp_path / "out", reporter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.gguf"]


# --- the commands -------------------------------------------------------------------------


def test_the_commands_say_what_a_folder_holds_and_change_nothing(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = CliRunner().invoke(app, ["model", "import", str(folder), "--out", str(out), "--json"])
    assert made.exit_code == 0, made.output
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    told = CliRunner().invoke(app, ["model", "info", str(out), "--json"])
    assert told.exit_code == 0
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before
    ours, theirs = (json.loads(result.stdout.splitlines()[-1])["model"] for result in (made, told))
    assert {name: ours[name] for name in theirs if name not in ("folder", "notes")} == {
        name: value for name, value in theirs.items() if name not in ("folder", "notes")
    }
    assert theirs["greedy_answer"] == ours["greedy_answer"]
    again = CliRunner().invoke(app, ["model", "import", str(folder), "--out", str(out)])
    assert again.exit_code == ParamsError.exit_code
    assert "exists already" in again.stderr


def test_options_without_effect_and_unknown_sources_are_refused(folder: Path, tmp_path: Path, reporter: Any) -> None:
    out = tmp_path / "out"
    with pytest.raises(ParamsError, match="--dtype has no effect on a folder"):
        import_model([folder], out, GgufOptions(dtype="bfloat16"), reporter)
    with pytest.raises(ParamsError, match="--dtype must be one of float32, bfloat16, float16, got 'int8'"):
        import_model([folder], out, GgufOptions(dtype="int8"), reporter)
    with pytest.raises(MachineError, match="nowhere is missing"):
        _import(tmp_path / "nowhere", out, reporter)
    with pytest.raises(MachineError, match="model.safetensors is no GGUF file.*; give the folder that it lies in"):
        _import(folder / "model.safetensors", out, reporter)
    (folder / "config.json").rename(folder / "params.json")
    with pytest.raises(MachineError, match="is in Meta's or Mistral's own format"):
        _import(folder, out, reporter)


def test_weights_with_nan_are_refused(folder: Path, reporter: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(MachineError, match=r"model\.norm\.weight holds NaN or infinity"):
        describe_model(folder, reporter, "info")
