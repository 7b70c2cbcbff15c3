"""Text that is not ours can neither steer the terminal nor break a line or a page."""

from __future__ import annotations

import pytest

from dpo_cli.core.text import in_one_line, markdown, printable, shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, 中文, é, 👩‍👩‍👧", "plain, 中文, é, 👩‍👩‍👧"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("\x9b31m \x7f \x00", r"\x9b31m \x7f \x00"),
        ("abc\u202etxt.exe\u2066", r"abc\u202etxt.exe\u2066"),
        ("file\udcff", r"file\udcff"),
        ("over\rwritten", r"over\x0dwritten"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
    ],
)
def test_control_characters_are_spelled_out(text: str, expected: str) -> None:
    assert printable(text) == expected
    printable(text).encode("utf-8")


def test_a_message_is_one_line_of_bounded_length() -> None:
    assert in_one_line("a\nerror: b\n") == "a\\nerror: b"
    long = in_one_line("x" * 10**6)
    assert len(long) < 2100
    assert long.endswith("... (1000000 characters)")


def test_values_are_shortened() -> None:
    assert shown(-1) == "-1"
    assert shown(0.1) == "0.1"
    assert shown("short") == "'short'"
    for large in ("x" * 10**6, list(range(10**6)), {str(i): i for i in range(10**5)}, 10**500):
        assert len(shown(large)) < 200


def test_markdown_shows_a_name_as_it_is() -> None:
    assert markdown("Qwen2.5-0.5B") == "Qwen2.5-0.5B"
    assert markdown("a|b\n# <img src=x> [c](d) `e`") == r"a\|b\\n\# \<img src=x\> \[c\](d) \`e\`"
