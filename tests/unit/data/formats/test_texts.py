"""Where texts are cut: between words, never inside anything that is read as one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.data.formats.texts import shared_tokens

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
WAVE, DARK, LIGHT = "\U0001f44b", "\U0001f3ff", "\U0001f3fb"
FRANCE, GERMANY, FINLAND = "\U0001f1eb\U0001f1f7", "\U0001f1e9\U0001f1ea", "\U0001f1eb\U0001f1ee"
ENGLAND = "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
SCOTLAND = "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f"


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        # words, with the white space before them
        ("The sky is blue", "The sky is black", "The sky is"),
        ("The sky is blue", "The sky is", "The sky is"),
        ("The sky is ", "The sky is blue", "The sky is"),
        ("The sky is \n blue", "The sky is \n green", "The sky is"),
        ("The sky is  blue", "The sky is blue", "The sky is"),
        ("Skyward", "Sky", ""),
        ("don't", "don", ""),
        ("don't go", "don't stay", "don't"),
        ("l’eau", "l’air", ""),
        ("a well-known man", "a well-being", "a"),
        ("soft\u00adware", "soft\u00adness", ""),
        ("می\u200cخواهم", "می\u200cروم", ""),
        ("see a.example.org", "see a.example.com", "see"),
        ("me@here.org", "me@there.org", ""),
        # marks stand alone, but not inside a word
        ("Well, yes", "Well, no", "Well,"),
        ("Well, yes", "Well.", "Well"),
        ("What?!", "What??", "What?"),
        ("(yes)", "(no)", "("),
        ('He said "yes"', 'He said "no"', 'He said "'),
        # numbers
        ("It costs 15", "It costs 150", "It costs"),
        ("It costs 3.14", "It costs 3.5", "It costs"),
        ("It costs 3.14", "It costs 3", "It costs"),
        ("It costs 1,000", "It costs 1,500", "It costs"),
        ("It costs 3. So", "It costs 3. No", "It costs 3."),
        ("x = -5", "x = -6", "x ="),
        ("x = -5", "x = - 5", "x ="),
        ("at 12:30", "at 12:45", "at"),
        ("5%", "5$", "5"),
        ("snake_case", "snake_eyes", ""),
        # signs that belong to the character before them
        ("cafe\u0301 noir", "cafe noir", ""),
        ("cafe\u0301 noir", "cafe\u0301 blanc", "cafe\u0301"),
        ("e\u0301", "e\u0300", ""),
        ("नमस्ते", "नमस्कार", ""),
        ("כָּל", "כָּר", ""),
        ("한국어", "한국인", ""),
        ("\u1112\u1161\u11ab", "\u1112\u1161", ""),
        # emoji
        (f"Hi {FAMILY}", f"Hi {FAMILY[:3]}", "Hi"),
        (f"Hi {FAMILY}", f"Hi {FAMILY} you", f"Hi {FAMILY}"),
        (f"{WAVE}{DARK}", f"{WAVE}{LIGHT}", ""),
        (f"{WAVE}{DARK} a", f"{WAVE}{DARK} b", f"{WAVE}{DARK}"),
        (f"{WAVE}{WAVE}", WAVE, WAVE),
        (FRANCE, FINLAND, ""),
        (FRANCE + GERMANY, FRANCE + FINLAND, FRANCE),
        (FRANCE + GERMANY, FRANCE[0], ""),
        (f"go {ENGLAND}", f"go {SCOTLAND}", "go"),
        ("\u2764\ufe0f", "\u2764\ufe0e", ""),
        ("1\ufe0f\u20e3", "1", ""),
        # scripts without spaces: character by character
        ("你好吗", "你好呀", "你好"),
        ("天空是蓝色的。", "天空是蓝的。", "天空是蓝"),
        ("第12章", "第13章", "第"),
        ("用GPT模型", "用GPT工具", "用GPT"),
        ("用GPT模型", "用GPU模型", "用"),
        ("カタカナ", "カタログ", "カタ"),
        ("か\u3099", "か", ""),
        ("กำลังกิน", "กำลังไป", "กำลัง"),
        ("กิ", "กี", ""),
        ("葛\U000e0100城", "葛\U000e0101城", ""),
        ("ខ្មែរ", "ខ្ញុំ", ""),
        ("答:是", "答:否", "答:"),
        # nothing in common
        ("a", "b", ""),
        ("", "a", ""),
        ("", "", ""),
        (" a", "a", ""),
        ("same", "same", "same"),
    ],
)
def test_what_two_texts_share_is_whole(one: str, other: str, shared: str) -> None:
    assert one[: shared_tokens(one, other)] == other[: shared_tokens(other, one)] == shared


SIGNS = st.sampled_from(
    [*"ab9 .,'-\n你ก", "\u0301", "\u200d", "\U0001f44b", "\U0001f3ff", "\U0001f1eb", "\U0001f1f7", "\u3099", "\ufe0f"]
)
TEXTS = st.lists(SIGNS, max_size=12).map("".join)


def is_boundary(text: str, place: int) -> bool:
    return shared_tokens(text, text[:place]) == place


@given(TEXTS, TEXTS, TEXTS)
def test_a_cut_is_a_boundary_of_both_texts_and_the_last_one_they_share(start: str, one: str, other: str) -> None:
    one, other = start + one, start + other
    cut = shared_tokens(one, other)
    assert one[:cut] == other[:cut]
    assert is_boundary(one, cut)
    assert is_boundary(other, cut)
    longer = range(cut + 1, min(len(one), len(other)) + 1)
    assert not any(one[:end] == other[:end] and is_boundary(one, end) and is_boundary(other, end) for end in longer)
    assert cut == shared_tokens(other, one)


@given(TEXTS)
def test_a_text_shares_all_of_itself(text: str) -> None:
    assert shared_tokens(text, text) == len(text)


def test_long_texts_without_a_boundary_take_no_time() -> None:
    for sign in ("a", "\u0301", "\U0001f1eb", " ", "你"):
        text = sign * 100_000
        assert shared_tokens(f"{text}x", f"{text}y") <= len(text)
