"""Short film reviews written in code, their beginnings, and the reward: how positive VADER finds a review."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_GOOD = """brilliant|wonderful|moving|clever|great|charming|warm|funny|excellent|superb|delightful|fresh|honest
|beautiful|enjoyable|gripping|amazing|sweet|good|nice"""
_BAD = """awful|dull|boring|weak|terrible|stupid|lazy|annoying|ugly|horrible|flat|sad|disappointing|pathetic|cheap
|pointless|confusing|tired|bad|poor"""
_PLAIN = "slow|long|loud|quiet|strange|old-fashioned|dark|short|simple|busy|serious|ordinary|odd|unusual"
_PARTS = """acting|plot|script|music|ending|dialogue|camera work|cast|pacing|story|humor|first half|final act|lead actor
|direction|soundtrack|editing|opening scene|villain|main character"""
_KINDS = """western|comedy|thriller|horror film|drama|documentary|musical|war film|cartoon|crime film|love story
|road movie|remake|fantasy film"""
_TIMES = """last night|on a long flight|in an empty cinema|at a festival|on a rainy Sunday|with my parents
|for the second time|with an old friend|because of the poster|on television|with the children"""
_TOPICS = """two brothers|a small town|a lost dog|a bank robbery|a young teacher|an old sailor|a family on the road
|a trip to the moon|a singer|a city in winter"""
_WHO = "My wife|My brother|My father|Everyone around us|Our neighbor|My best friend|The whole family|My daughter"
_LIKED = "loved|enjoyed|liked|admired|adored"
_HATED = "hated|disliked|regretted|could not stand|did not care for"
_PRAISE = """I would recommend it to anyone.|What a joy.|It is worth every minute.|I laughed all the way home.
|A perfect evening.|See it while you can.|I was happy that I went."""
_BLAME = """I want my money back.|What a waste of time.|I nearly fell asleep.|Avoid it.|I was glad when it ended.
|It is a mess from start to finish.|A complete failure."""
_EVEN = """I have seen better and worse.|It lasts two hours.|Make of that what you will.|I do not know what to think.
|The seats were full.|It is based on a book."""
_OPENINGS = (
    "The {part} was {quality} and the {part} {quality}.",
    "The {quality} {part} and the {quality} {part} stay with you.",
    "{who} saw this {kind} {time} and {felt} the {part}.",
    "I watched this {kind} {time}, and the {part} was {quality}.",
    "This is a {quality} {kind} about {topic} with a {quality} {part}.",
    "As a fan of every {kind}, I {felt} the {part}.",
    "After a {quality} beginning, the {part} becomes {quality}.",
    "I expected a {quality} {kind}, but the {part} was {quality}.",
    "Watching a {kind} about {topic} {time} was {quality}.",
    "Nobody told me that the {part} would be so {quality}.",
    "We went to this {kind} {time} and {felt} it.",
    "In the end a {kind} about {topic} needs a {quality} {part}.",
    "From the first scene the {part} is {quality}.",
    "{who} said that the {part} was {quality}, and I agree.",
)
_MOODS = {
    "good": (_GOOD, _LIKED, _PRAISE),
    "bad": (_BAD, _HATED, _BLAME),
    "even": (_PLAIN, f"{_LIKED}|{_HATED}", _EVEN),
}
_analyzer = cache(SentimentIntensityAnalyzer)


def reward(prompt: str, answer: str) -> float:
    """VADER's compound score of the review made of both, in [-1, 1].

    Source: Hutto and Gilbert 2014.
    """
    return float(_analyzer().polarity_scores(prompt + answer)["compound"])


def review(rng: random.Random) -> str:
    """A review of one or two sentences, mostly in one mood."""
    mood = rng.choice(list(_MOODS))

    def choose(words: str) -> str:
        return rng.choice(words.replace("\n", "").split("|"))

    def colored(place: int) -> str:
        return choose(_MOODS[mood if rng.random() < 0.7 else rng.choice(list(_MOODS))][place])

    text = rng.choice(_OPENINGS)
    simple = {"part": _PARTS, "kind": _KINDS, "time": _TIMES, "topic": _TOPICS, "who": _WHO}
    while "{" in text:
        name = text[text.index("{") + 1 : text.index("}")]
        word = choose(simple[name]) if name in simple else colored(0 if name == "quality" else 1)
        text = text.replace(f"{{{name}}}", word, 1)
    text = re.sub(r"\b([Aa])(?= [aeiou])", r"\1n", text)
    return f"{text} {colored(2)}" if rng.random() < 0.5 else text


def split_reviews(seed: int, number: int) -> list[tuple[str, str]]:
    """Reviews as (a beginning of 2 to 8 words, the rest), each beginning once."""
    return list(_split(random.Random(f"reviews {seed}"), number))


def prefixes(seed: int, number: int) -> list[str]:
    """Different beginnings of 2 to 8 words of other reviews than those that the model learns from."""
    return [beginning for beginning, _ in _split(random.Random(f"prefixes {seed}"), number)]


def _split(rng: random.Random, number: int) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    while len(seen) < number:
        words = review(rng).split()
        length = rng.randint(2, 8)
        beginning, rest = " ".join(words[:length]), " ".join(words[length:])
        if rest and not beginning.endswith(".") and beginning not in seen:
            seen.add(beginning)
            yield beginning, f" {rest}"
