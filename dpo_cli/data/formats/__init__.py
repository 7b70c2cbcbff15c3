"""One reader a format: what its rows look like, and how one becomes a canonical example.

A reader is a module-level :class:`~dpo_cli.data.formats.base.Format`; the registry below is
the only list of them. A new format is one new file and one new line.
"""

from __future__ import annotations

from dpo_cli.data.formats.alpaca import ALPACA
from dpo_cli.data.formats.base import Format
from dpo_cli.data.formats.hh import HH
from dpo_cli.data.formats.pairs import PAIRS
from dpo_cli.data.formats.sharegpt import SHAREGPT
from dpo_cli.data.schema import PreferenceExample, SftExample

SFT_FORMATS: tuple[Format[SftExample], ...] = (ALPACA,)
PREFERENCE_FORMATS: tuple[Format[PreferenceExample], ...] = (SHAREGPT, PAIRS, HH)
