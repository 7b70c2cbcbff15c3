"""GGUF files as exports: a whole model with a Modelfile for Ollama, or the adapter alone; checked by llama.cpp."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dpo_cli.core.artifacts import digest_files, write_text
from dpo_cli.core.errors import MachineError
from dpo_cli.exporting import gguf_model, llama_cpp
from dpo_cli.exporting.faults import deltas_of
from dpo_cli.exporting.gguf_tokenizer import Vocabulary, vocabulary_of
from dpo_cli.exporting.held_out import LLAMA_CPP, HeldOut, held, without_end
from dpo_cli.exporting.modelfile import modelfile, problems_of_modelfile, turns_of
from dpo_cli.exporting.targets import Found, Target, Trained, copy_license
from dpo_cli.models.gguf_file import GgufFile, read_header
from dpo_cli.models.gguf_model import model_of_gguf
from dpo_cli.models.load import load_config, load_model

K_QUANTS = ("q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
"""Types that llama-quantize makes."""
_ASKED_OF_TEMPLATE = 8


def find_quantizer() -> str | None:
    """llama-quantize on the PATH."""
    return shutil.which("llama-quantize")


class Gguf(Target):
    """A whole model for llama.cpp and what is built on it, with a Modelfile for Ollama."""

    @property
    def kind(self) -> str:
        """Its type of quantization."""
        return self.name.removeprefix("gguf-")

    @property
    def what(self) -> str:
        """What it is."""
        onto = ", the adapter merged into the nf4 weights that it was trained on" if self.trained.is_4bit else ""
        return f"a whole model in {self.kind.upper()} for llama.cpp, with a Modelfile for Ollama{onto}"

    @property
    def file(self) -> str:
        """Name of the file."""
        return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', self.trained.name).strip('-') or 'model'}-{self.kind.upper()}.gguf"

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What the file says of its tokens."""
        project = self.trained.project
        num_rows = load_config(project.base).vocab_size
        return vocabulary_of(project.tokenizer, project.encoder, num_rows, self.trained.texts)

    @property
    def begins_with(self) -> str:
        """What llama.cpp puts before every text."""
        return self.trained.project.tokenizer.bos_token if self.vocabulary.begins else ""

    def build(self, folder: Path) -> list[str]:
        """Write the file and its Modelfile."""
        trained = self.trained
        encoder = trained.project.encoder
        gguf_model.layout_of(load_config(trained.project.base), [])  # refuses a family before it is merged
        notes = list(self.vocabulary.notes)
        is_quantized_later = self.kind in K_QUANTS
        kind, written = ("f16", trained.work / "f16.gguf") if is_quantized_later else (self.kind, folder / self.file)
        reporter = trained.project.reporter
        gguf_model.write_model(
            trained.merged(rounded=True), self.vocabulary, written, kind, name=trained.name, reporter=reporter
        )
        if is_quantized_later:
            command = [str(find_quantizer()), str(written), str(folder / self.file), self.kind.upper()]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            written.unlink()
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
                raise MachineError(f"llama-quantize failed: {last}")
        try:
            turns = turns_of(encoder, self.begins_with)
            write_text(folder / "Modelfile", modelfile(self.file, turns, encoder.end_texts))
            if turns.system is None:
                notes.append("the Modelfile leaves system messages out: the chat template has no turn for them")
        except MachineError as error:
            notes += error.problems
        copy_license(trained.project, folder)
        return notes

    def check(self, folder: Path) -> Found:
        """Load it by llama.cpp, or where that is missing read it back here."""
        trained = self.trained
        encoder = trained.project.encoder
        file = read_header(folder / self.file)
        found = Found(problems=_problems_of_header(file, trained))
        if (folder / "Modelfile").is_file():
            text = (folder / "Modelfile").read_text(encoding="utf-8")
            prompts = list(trained.held_out.prompts.values())
            found.problems += problems_of_modelfile(text, encoder, prompts, self.begins_with)
        if llama_cpp.is_there():
            _check_by_llama_cpp(found, trained, folder / self.file, self.begins_with)
        else:
            found.notes.append(no_llama_cpp())
            digest = digest_files(folder, [self.file])
            found.survival = held(trained.held_out, lambda: self._load(file), self.name, digest)
        return found

    def name_weights(self, folder: Path) -> list[str]:
        """Compare tensor by tensor."""
        return self.trained.faults(self._load(read_header(folder / self.file)).state_dict(), rounded=True)

    def _load(self, file: GgufFile) -> Any:
        project = self.trained.project
        folder = self.trained.work / "read-back"
        folder.mkdir()
        made, _ = model_of_gguf(file, folder, project.machine.compute_dtype, project.reporter)
        made.save_pretrained(folder)
        model = load_model(folder, project.machine, quantization="none")
        shutil.rmtree(folder)
        return model


def no_llama_cpp() -> str:
    """What is said where llama.cpp is missing."""
    return (
        "NOT CHECKED by llama.cpp, which is not installed: the file was read back and scored by dpo-cli's engine; for"
        " the whole check: pip install 'dpo-cli[export]'"
    )


def _problems_of_header(file: GgufFile, trained: Trained) -> list[str]:
    """What a file says of ends and template, against the tokenizer that the model was trained with."""
    encoder = trained.project.encoder
    found = []
    end = file.metadata.get("tokenizer.ggml.eos_token_id")
    if end != encoder.end_id:
        token = encoder.tokenizer.convert_ids_to_tokens(encoder.end_id)
        found.append(f"the end token is lost: the file's eos_token_id is {end}, and turns end with {token!r}")
    if file.metadata.get("tokenizer.chat_template") != encoder.template:
        found.append("the file's chat template is another than the tokenizer's")
    return found


def _check_by_llama_cpp(found: Found, trained: Trained, path: Path, begins_with: str, lora: Path | None = None) -> None:
    """Tokens, template, ends, log-probabilities and greedy answers, all as llama.cpp has them."""
    held_out, encoder = trained.held_out, trained.project.encoder
    stops = set(encoder.stop_ids)
    threads = torch.get_num_threads()
    with llama_cpp.serve(path, held_out.num_context, lora=lora, threads=threads) as server:
        for text, group in zip(trained.texts, _one_each(held_out), strict=True):
            if server.tokenize(text.removeprefix(begins_with)) != list(group):
                found.problems.append(f"llama.cpp makes other tokens of the prompt {text[-60:]!r}")
                break
        if not encoder.opener and "strftime" not in encoder.template:
            for prompt, text in list(zip(held_out.prompts.values(), trained.texts, strict=True))[:_ASKED_OF_TEMPLATE]:
                theirs = server("/apply-template", {"messages": prompt})["prompt"]
                if theirs.removeprefix(begins_with) != text.removeprefix(begins_with):
                    found.problems.append(f"the chat template writes another prompt in llama.cpp: {theirs[-80:]!r}")
                    break
        asked = held_out.asked
        for token in sorted(stops):
            if not server.stops_at(asked[0].tokens, token):
                name = repr(encoder.tokenizer.convert_ids_to_tokens(token))
                said = f"llama.cpp does not end an answer at {name}"
                if token == encoder.end_id:
                    found.problems.append(f"the end token is lost: {said}")
                else:
                    found.notes.append(f"{said}, which is not what turns end with, but the model's settings name it")
        num_answers = sum(len(group.completions) for group in held_out.groups)
        logps = {}
        label = f"export: {path.name} by llama.cpp"
        with trained.project.reporter.meter(label, num_answers + len(asked), "answers") as meter:
            for group in held_out.groups:
                for key, completion in zip(group.keys, group.completions, strict=True):
                    logps[key] = server.token_logps(group.prompt, completion)
                    meter.advance(1)
            answers = {}
            for prompt in asked:
                tokens = server.greedy(prompt.tokens, held_out.steps.evaluate.max_new_tokens)
                answers[prompt.id] = without_end(tokens, stops)
                meter.advance(1)
    found.survival = held_out.compare(logps, answers, LLAMA_CPP)


def _one_each(held_out: HeldOut) -> list[tuple[int, ...]]:
    """The token ids of each prompt, in the order of the prompts."""
    by_id = {group.group: group.prompt for group in held_out.groups}
    return [tuple(by_id[id]) for id in held_out.prompts]


class GgufLora(Gguf):
    """The adapter alone, for llama.cpp's --lora."""

    @property
    def what(self) -> str:
        """What it is applied to."""
        return f"an adapter for llama.cpp (--lora), on a GGUF file of the full-precision base model {self.trained.name}"

    @property
    def file(self) -> str:
        """Name of the file."""
        return "adapter.gguf"

    def build(self, folder: Path) -> list[str]:
        """Write the adapter."""
        gguf_model.write_lora(
            self.trained.adapted(self.trained.adapter, rounded=False), folder / self.file, self.trained.name
        )
        return []

    def check(self, folder: Path) -> Found:
        """Apply it to the base's weights in F16, by llama.cpp, or to its plain ones here."""
        trained = self.trained
        found = Found()
        if not llama_cpp.is_there():
            found.notes.append(no_llama_cpp())
            digest = digest_files(folder, [self.file])
            found.survival = held(trained.held_out, lambda: self._applied(folder), self.name, digest)
            return found
        base = trained.work / "base.gguf"
        reporter = trained.project.reporter
        gguf_model.write_model(
            trained.frozen(rounded=False), self.vocabulary, base, "f16", name=trained.name, reporter=reporter
        )
        _check_by_llama_cpp(found, trained, base, self.begins_with, folder / self.file)
        base.unlink()
        return found

    def name_weights(self, folder: Path) -> list[str]:
        """Compare tensor by tensor."""
        return self.trained.faults(self._applied(folder).state_dict(), rounded=False)

    def _applied(self, folder: Path) -> Any:
        model = self.trained.frozen(rounded=False)
        weights = model.state_dict()
        names = list(deltas_of(self.trained.adapted(self.trained.adapter, rounded=False)))
        layout = gguf_model.layout_of(model.config, names)
        for name, delta in gguf_model.read_lora(folder / self.file, layout).items():
            weights[name] += delta.to(weights[name])
        return model
