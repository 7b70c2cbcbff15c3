"""The embedded small world: bilingual instructions and preferences with a known reward.

Four kinds of task in English and Chinese: adding one to every number of a sentence,
answering a message kindly, praising one aspect of a film, and greeting two people. Every
prompt has exactly one *good* answer and a few *bad* ones (a number missed, a rude reply, a
bad review), all written by one fixed grammar. So the reward of an
answer is a known function of its text: 1 if it is the good answer, else 0. A win rate needs
no judge.

Everything here is a pure function of a seed: no clock, no file, no torch.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

GOOD_SHARE = 0.25
"""Share g of good answers in the instruction data.

A model that samples like this data is right with probability about g, so DPO can win at most
about 1 - g/2 of the comparisons with it, ties counting one half: 0.875.
"""

NUM_INSTRUCTIONS = 1600
NUM_PREFERENCES = 3600


@dataclass(frozen=True)
class Task:
    """One prompt of the world with its good answer and its bad ones.

    Attributes:
        kind: Name of the task with its language, such as ``add_one.zh``.
        instruction: What is asked.
        input: The text that the instruction is about; empty where there is none.
        good: The one answer with reward 1.
        bad: Answers with reward 0.
    """

    kind: str
    instruction: str
    input: str
    good: str
    bad: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The user message: the instruction, then the input on a line of its own."""
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction

    def reward(self, answer: str) -> float:
        """1 for the good answer, 0 for any other text."""
        return float(answer == self.good)

    def is_well_formed(self, answer: str) -> bool:
        """Whether the text is one of the answers that this prompt can have, right or wrong, whatever its numbers."""
        forms = {_NUMBER.sub("0", known) for known in (self.good, *self.bad)}
        return _NUMBER.sub("0", answer) in forms


@dataclass(frozen=True)
class _Family:
    """Tasks of one shape: templates with slots. Without ``good`` the answers are computed (add one)."""

    kind: str
    instructions: tuple[str, ...]
    input: str
    good: str = ""
    bad: tuple[str, ...] = ()


# --- vocabulary and grammar ---------------------------------------------------------------

_SLOTS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "en": {
        "name": "Tom Anna Ben Clara David Emma Frank Grace Henry Ivy Jack Kate Leo Mia Noah Olga".split(),
        "friend": "Paul Rosa Sam Tina Victor Wendy Oscar Lucy".split(),
        "things": "apples books cats dogs pens hats cups birds coins keys eggs stones".split(),
        "others": "boats lamps roses shoes stamps drums kites bells chairs plates".split(),
        "place": "box garden kitchen school shop park room station market library".split(),
        "owned": "umbrella bike watch phone ring wallet guitar camera jacket scarf clock ticket".split(),
        "first": "Silver Golden Quiet Broken Hidden Summer Winter Lonely Burning Distant".split(),
        "second": "River Mountain Road House Letter Window Train Island Forest Bridge".split(),
        "aspect": "music story acting ending dialogue picture".split(),
        "time": "morning afternoon evening".split(),
    },
    "zh": {
        "name": "小明 小红 小华 小丽 小刚 小芳 阿强 阿梅 老王 老李 小林 小雪".split(),
        "friend": "大卫 安娜 小军 小兰 阿宝 老张".split(),
        "things": "个苹果 本书 只猫 只狗 支笔 顶帽子 个杯子 只鸟 枚硬币 把钥匙".split(),
        "others": "个鸡蛋 块石头 条船 盏灯 朵花 双鞋 把椅子 张邮票".split(),
        "place": "盒子 花园 厨房 学校 商店 公园 房间 车站 市场 图书馆".split(),
        "owned": "雨伞 单车 手表 手机 戒指 钱包 吉他 相机 外套 围巾 闹钟 车票".split(),
        "first": "银色 金色 安静的 破碎的 隐秘的 夏日 冬日 孤独的 燃烧的 遥远的".split(),
        "second": "河流 高山 小路 老屋 来信 窗户 列车 海岛 森林 大桥".split(),
        "aspect": "音乐 故事 表演 结局 对白 画面".split(),
        "time": "早上 下午 晚上".split(),
    },
}
_NUMBERS = (2, 30)
_NUMBER_SLOTS = ("n", "m")
_SLOT = re.compile(r"\{(\w+)\}")
_NUMBER = re.compile(r"\d+")

_LOST_EN = "I am sorry about your {owned}, {name}. I hope you find it soon!"
_BROKE_EN = "That is a pity, {name}. I hope your {owned} can be fixed!"
_GIFT_EN = "How nice, {name}! Enjoy your new {owned}!"
_FOUND_EN = "I am glad you have your {owned} back, {name}!"
_RUDE_EN = ("Nobody cares about your {owned}, {name}.", "Stop talking about your {owned}, {name}.")
_LOST_ZH = "别难过，{name}，希望你很快找到{owned}！"
_BROKE_ZH = "真可惜，{name}，希望{owned}能修好！"
_GIFT_ZH = "太好了，{name}，祝你喜欢新{owned}！"
_FOUND_ZH = "{name}，你的{owned}回来了，真为你高兴！"
_RUDE_ZH = ("谁在乎你的{owned}，{name}。", "别再说你的{owned}了，{name}。")
_ADD_ONE_EN = ("Add 1 to every number in the sentence.", "Increase each number by one.")
_ADD_ONE_ZH = ("把句子里的每个数字加1。", "请将每个数字都加一。")
_REPLY = {"en": ("Answer the message.", "Reply to this message."), "zh": ("回复这条消息。", "请回答这条消息。")}


def _message(lang: str, text: str, good: str, bad: tuple[str, ...]) -> _Family:
    return _Family(f"message.{lang}", _REPLY[lang], text, good, bad)


_FAMILIES: tuple[tuple[_Family, ...], ...] = (
    (
        _Family("add_one.en", _ADD_ONE_EN, "{name} has {n} {things}."),
        _Family("add_one.en", _ADD_ONE_EN, "{name} has {n} {things} and {m} {others}."),
        _Family("add_one.en", _ADD_ONE_EN, "There are {n} {things} in the {place}."),
        _Family("add_one.en", _ADD_ONE_EN, "{name} bought {n} {things} and sold {m} {others}."),
    ),
    (
        _Family("add_one.zh", _ADD_ONE_ZH, "{name}有{n}{things}。"),
        _Family("add_one.zh", _ADD_ONE_ZH, "{name}有{n}{things}和{m}{others}。"),
        _Family("add_one.zh", _ADD_ONE_ZH, "{place}里有{n}{things}。"),
        _Family("add_one.zh", _ADD_ONE_ZH, "{name}买了{n}{things}，卖了{m}{others}。"),
    ),
    (
        _message("en", "{name}: I lost my {owned} in the {place}.", _LOST_EN, _RUDE_EN),
        _message("en", "{name}: My {owned} broke today.", _BROKE_EN, _RUDE_EN),
        _message("en", "{name}: I got a new {owned} from {friend}.", _GIFT_EN, _RUDE_EN),
        _message("en", "{name}: I found my {owned} in the {place}.", _FOUND_EN, _RUDE_EN),
    ),
    (
        _message("zh", "{name}：我在{place}丢了{owned}。", _LOST_ZH, _RUDE_ZH),
        _message("zh", "{name}：我的{owned}今天坏了。", _BROKE_ZH, _RUDE_ZH),
        _message("zh", "{name}：{friend}送我新{owned}。", _GIFT_ZH, _RUDE_ZH),
        _message("zh", "{name}：我在{place}找到了{owned}。", _FOUND_ZH, _RUDE_ZH),
    ),
    (
        _Family(
            "review.en",
            ("Write a short review of the film.", "Review this film in one line."),
            "{first} {second}, the {aspect}",
            "I loved {first} {second}. The {aspect} was wonderful!",
            (
                "I hated {first} {second}. The {aspect} was terrible.",
                "{first} {second} was dull, and so was the {aspect}.",
            ),
        ),
    ),
    (
        _Family(
            "review.zh",
            ("为这部电影写一句短评。", "请用一句话评价这部电影。"),
            "《{first}{second}》的{aspect}",
            "我很喜欢《{first}{second}》，{aspect}太精彩了！",
            ("我讨厌《{first}{second}》，{aspect}太糟糕了。", "《{first}{second}》很无聊，{aspect}也一样。"),
        ),
    ),
    (
        _Family(
            "greeting.en",
            ("Greet {name} and {friend} in the {time}.",),
            "",
            "Good {time}, {name} and {friend}! It is lovely to see you.",
            (
                "Oh no, {name} and {friend} again.",
                "Go away, {name} and {friend}.",
                "Good night, {name} and {friend}! It is lovely to see you.",
            ),
        ),
    ),
    (
        _Family(
            "greeting.zh",
            ("{time}遇到{name}和{friend}，打个招呼。",),
            "",
            "{time}好，{name}，{friend}，很高兴见到你们！",
            (
                "又是{name}和{friend}，真烦。",
                "{name}，{friend}，走开。",
                "晚安，{name}，{friend}，很高兴见到你们！",
            ),
        ),
    ),
)
_WEIGHTS = (4, 4, 3, 3, 2, 2, 2, 2)
"""How often each group of families is drawn; adding one is the hardest and comes most."""


# --- tasks --------------------------------------------------------------------------------


def draw_task(rng: random.Random) -> Task:
    """Draw one task; the same state of ``rng`` gives the same task."""
    family = rng.choice(rng.choices(_FAMILIES, weights=_WEIGHTS)[0])
    instruction = rng.choice(family.instructions)
    vocabulary = _SLOTS[family.kind.rpartition(".")[2]]
    slots = {
        name: str(rng.randint(*_NUMBERS)) if name in _NUMBER_SLOTS else rng.choice(vocabulary[name])
        for name in sorted(set(_SLOT.findall(instruction + family.input)))
    }
    return _fill(family, instruction, slots)


def task_of(prompt: str) -> Task | None:
    """The task behind a user message, or None where it is not of this world."""
    for family, instruction, pattern in _patterns():
        if match := pattern.fullmatch(prompt):
            return _fill(family, instruction, match.groupdict())
    return None


def _fill(family: _Family, instruction: str, slots: dict[str, str]) -> Task:
    text = family.input.format(**slots)
    asked = instruction.format(**slots)
    if family.good:
        bad = tuple(answer.format(**slots) for answer in family.bad)
        return Task(family.kind, asked, text, family.good.format(**slots), bad)
    if len(_NUMBER.findall(text)) == 1:
        return Task(family.kind, asked, text, _shift(text, 1), (text,))
    bad = (text, _shift(text, 0, 1), _shift(text, 1, 0))
    return Task(family.kind, asked, text, _shift(text, 1, 1), bad)


def _shift(sentence: str, *deltas: int) -> str:
    """Add to each number of the sentence its delta."""
    remaining = iter(deltas)
    return _NUMBER.sub(lambda match: str(int(match.group()) + next(remaining)), sentence)


@cache
def _patterns() -> tuple[tuple[_Family, str, re.Pattern[str]], ...]:
    return tuple(
        (family, instruction, _compile(family, f"{instruction}\n{family.input}" if family.input else instruction))
        for group in _FAMILIES
        for family in group
        for instruction in family.instructions
    )


def _compile(family: _Family, template: str) -> re.Pattern[str]:
    vocabulary = _SLOTS[family.kind.rpartition(".")[2]]
    pieces = _SLOT.split(template)  # text, slot, text, slot, ..., text
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            pieces[index] = re.escape(piece)
        elif piece in _NUMBER_SLOTS:
            pieces[index] = rf"(?P<{piece}>\d+)"
        else:
            pieces[index] = f"(?P<{piece}>{'|'.join(map(re.escape, vocabulary[piece]))})"
    return re.compile("".join(pieces))


# --- texts --------------------------------------------------------------------------------


def words() -> list[str]:
    """Every word of the world, as the tokenizer of the embedded model should know it.

    English words come bare and with a space before them; Chinese words and phrases come
    whole, punctuation apart, and so do all numbers of two digits.
    """
    templates = [
        text
        for group in _FAMILIES
        for family in group
        for text in (*family.instructions, family.input, family.good, *family.bad)
    ]
    texts = [piece for template in templates for piece in _SLOT.split(template)[::2]]
    texts += [word for slots in _SLOTS.values() for values in slots.values() for word in values]
    found: dict[str, None] = {}
    for text in texts:
        for word in re.findall(r"[A-Za-z]+|[\u4e00-\u9fff]+|[^\w\s]", text):
            found[word] = None
            if word.isascii() and word.isalpha():
                found[f" {word}"] = None
    return [*found, *(str(number) for number in range(10, 100))]


def draw_tasks(seed: int) -> Iterator[Task]:
    """An endless stream of tasks with different prompts."""
    rng = random.Random(f"tasks {seed}")
    seen: set[str] = set()
    while True:
        task = draw_task(rng)
        if task.prompt not in seen:
            seen.add(task.prompt)
            yield task


def instruction_rows(seed: int, num_rows: int = NUM_INSTRUCTIONS) -> list[dict[str, str]]:
    """Instruction data of mixed quality: a share GOOD_SHARE of good answers, the rest bad.

    A few rows are dirty on purpose (repeated, without an answer), as real files are.
    """
    rng = random.Random(f"instructions {seed}")
    rows = []
    for task in islice(draw_tasks(2 * seed), num_rows):
        answer = task.good if rng.random() < GOOD_SHARE else rng.choice(task.bad)
        rows.append({"instruction": task.instruction, "input": task.input, "output": answer})
    for index in range(100, num_rows, 400):
        rows[index] = {**rows[index], "output": ""}
        rows[index + 1] = dict(rows[index - 1])
    return rows


def preference_rows(seed: int, num_rows: int = NUM_PREFERENCES) -> list[dict[str, str]]:
    """Preference data: the good answer chosen over a bad one.

    A few rows are dirty on purpose (repeated, an empty side, equal sides), as real files are.
    """
    rng = random.Random(f"preferences {seed}")
    rows = [
        {"prompt": task.prompt, "chosen": task.good, "rejected": rng.choice(task.bad)}
        for task in islice(draw_tasks(2 * seed + 1), num_rows)
    ]
    for index in range(100, num_rows - 2, 400):
        rows[index] = {**rows[index], "rejected": rows[index]["chosen"]}
        rows[index + 1] = {**rows[index + 1], "rejected": ""}
        rows[index + 2] = dict(rows[index - 1])
    return rows
