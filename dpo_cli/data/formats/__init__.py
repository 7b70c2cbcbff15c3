"""One reader a format: what its rows look like, and how one becomes a canonical example.

A reader is a module-level :class:`~dpo_cli.data.formats.base.Format`; the registry below is
the only list of them. A new format is one new file and one new line.
"""

from __future__ import annotations

from typing import Any

from dpo_cli.data.formats.alpaca import ALPACA
from dpo_cli.data.formats.base import Format
from dpo_cli.data.formats.hh import HH
from dpo_cli.data.formats.implicit import IMPLICIT
from dpo_cli.data.formats.kwise import KWISE
from dpo_cli.data.formats.messages import MESSAGES
from dpo_cli.data.formats.oasst import OASST, OASST_SFT
from dpo_cli.data.formats.pairs import PAIRS
from dpo_cli.data.formats.preferred import preferred_of
from dpo_cli.data.formats.prompt_completion import PROMPT_COMPLETION
from dpo_cli.data.formats.sharegpt import SHAREGPT
from dpo_cli.data.formats.two_outputs import TWO_OUTPUTS

PREFERENCE_FORMATS: tuple[Format[Any], ...] = (SHAREGPT, PAIRS, HH, IMPLICIT, TWO_OUTPUTS, KWISE, OASST)
SFT_FORMATS: tuple[Format[Any], ...] = (
    *map(preferred_of, (SHAREGPT, PAIRS, HH, IMPLICIT)),
    ALPACA,
    PROMPT_COMPLETION,
    MESSAGES,
    OASST_SFT,
    *map(preferred_of, (TWO_OUTPUTS, KWISE)),
)
"""In the order in which they are tried; the earlier one reads a row that fits both. A row that says which answer was
rejected may have that answer under another name, too, so the preferred one comes before any other."""
