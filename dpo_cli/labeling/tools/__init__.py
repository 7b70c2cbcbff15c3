"""Other annotation tools: what they are given to ask people, and what they say that people answered."""

from __future__ import annotations

from dpo_cli.labeling.tools.argilla import ARGILLA
from dpo_cli.labeling.tools.base import Tool
from dpo_cli.labeling.tools.label_studio import LABEL_STUDIO
from dpo_cli.labeling.tools.potato import POTATO

TOOLS: dict[str, Tool] = {tool.name: tool for tool in (LABEL_STUDIO, ARGILLA, POTATO)}
"""Each in a file of its own, by the name that it has on the command line."""
