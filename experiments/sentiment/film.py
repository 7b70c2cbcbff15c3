"""Film reviews from a grammar, how positive one is, and a small language model that writes like them.

The model stands for the paper's GPT-2 that was fine-tuned on IMDB, the reward for its sentiment classifier: the
probability that a review is positive, a logistic function of the valences of its words.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from dpo_cli.models.embedded import END, PAD, build_model, pack_rows, pretraining_loss, pretraining_optimizer

VALENCES = {
    **dict.fromkeys("good fine nice sweet".split(), 1.0),
    **dict.fromkeys("great funny lovely moving clever warm".split(), 2.0),
    **dict.fromkeys("brilliant perfect".split(), 3.0),
    **dict.fromkeys("flat long loud odd".split(), -1.0),
    **dict.fromkeys("bad dull silly weak cold boring".split(), -2.0),
    **dict.fromkeys("awful terrible".split(), -3.0),
    **dict.fromkeys("old new short quiet dark".split(), 0.0),
    "loved": 2.0,
    "enjoyed": 1.0,
    "liked": 1.0,
    "disliked": -1.0,
    "hated": -2.0,
    "regretted": -1.0,
}
"""What a word says of a film, in units of the log-odds that a review is positive."""
DEGREES = {"very": 1.5, "truly": 1.5, "rather": 0.5, "quite": 0.75, "not": -0.75}
"""What becomes of the next word's valence."""
SCALE = 0.5
"""Log-odds a unit of valence."""

_VERBS = ("loved", "enjoyed", "liked", "disliked", "hated", "regretted")
_ADJECTIVES = tuple(word for word in VALENCES if word not in _VERBS)
_PLAIN = {word: VALENCES[word] for word in _ADJECTIVES}
_QUALITIES = {f"{degree} {word}": factor * VALENCES[word] for degree, factor in DEGREES.items() for word in _ADJECTIVES}
_LIKINGS = {word: VALENCES[word] for word in _VERBS}
_ASPECTS = ("plot", "cast", "story", "music", "ending", "script", "film", "camera", "pace", "humor", "sound", "hero")
_OTHER = ("the", "was", "a", "with", "and", "i", "is", "this", "found", ".")
_SPREAD = 0.8
"""Deviation of the valences in a review from its mood."""
UNKNOWN = "<|unknown|>"
TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ '" + END + "' }}{% endif %}{% endfor %}"
)
"""A review goes on where its beginning, the prompt, ends."""


def reward(prompt: str, answer: str) -> float:
    """The probability in (0, 1) that the review made of both is positive."""
    total, degree = 0.0, 1.0
    for word in re.findall(r"\w+", prompt + answer):
        total += degree * VALENCES.get(word, 0.0)
        degree = DEGREES.get(word, 1.0)
    return 1 / (1 + math.exp(-SCALE * total))


def review(rng: random.Random) -> str:
    """A review of one or two sentences in one mood, from -3 (it says what is awful) to 3 (what is brilliant)."""
    mood = rng.choice((-3, -2, -1, 0, 1, 2, 3))

    def choose(valences: Mapping[str, float]) -> str:
        weights = [math.exp(-(((valence - mood) / _SPREAD) ** 2) / 2) for valence in valences.values()]
        return rng.choices(list(valences), weights)[0]

    def quality() -> str:
        return choose(_QUALITIES if rng.random() < 0.5 else _PLAIN)

    def sentence() -> str:
        one, other = rng.sample(_ASPECTS, 2)
        return rng.choice(
            (
                f"the {one} was {quality()}",
                f"the {one} was {quality()} and the {other} was {quality()}",
                f"i {choose(_LIKINGS)} the {one}",
                f"i found the {one} {quality()} and the {other} was {quality()}",
                f"a {quality()} film with a {quality()} {one}",
                f"this is a {quality()} {one}",
            )
        )

    return " ".join(f"{sentence()} ." for _ in range(rng.choice((1, 2, 2))))


def prefixes(seed: int, number: int) -> list[str]:
    """Different beginnings of 2 to 8 words of reviews, as the paper takes them."""
    rng = random.Random(f"prefixes {seed}")
    found: dict[str, None] = {}
    while len(found) < number:
        found[" ".join(review(rng).split()[: rng.randint(2, 8)])] = None
    return list(found)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every word, bare and with a space before it."""
    words = [
        PAD,
        END,
        UNKNOWN,
        *(f"{space}{word}" for word in (*VALENCES, *DEGREES, *_ASPECTS, *_OTHER) for space in ("", " ")),
    ]
    model = WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\S+"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
    fast.chat_template = TEMPLATE
    return fast


def build_film_model(folder: Path, num_steps: int, seed: int = 0) -> float:
    """Pretrain the model on reviews and save it with its tokenizer; returns its last loss, nats a token."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed, num_layers=2)
    optimizer, schedule = pretraining_optimizer(model, num_steps)
    loss = torch.zeros(())
    for step in range(num_steps):
        rng = random.Random(f"reviews {seed} {step}")
        loss = pretraining_loss(model, pack_rows(iter(partial(_example, tokenizer, rng), None)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss.item()


def _example(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> tuple[list[int], list[int]]:
    """A review as (its first word, the others with the end), in token ids."""
    first, *others = tokenizer(review(rng) + END, add_special_tokens=False)["input_ids"]
    return [first], others
