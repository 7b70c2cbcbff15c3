"""Write what is derived from the code: dvc.yaml, params.yaml, the embedded data, docs.

python tools/generate.py           write the files
python tools/generate.py --check   name those that differ from the code, and exit 1
"""

from __future__ import annotations

import difflib
import html
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dpo_cli.cli.new_project import project_files, rows_json  # noqa: E402
from dpo_cli.core import paths  # noqa: E402
from dpo_cli.core.load_params import load_params  # noqa: E402
from dpo_cli.core.params import Params, iter_settings  # noqa: E402
from dpo_cli.core.params_text import EMBEDDED_PRESET, range_of, unit_of  # noqa: E402
from dpo_cli.data import world  # noqa: E402
from tools.objectives import PICTURE, objectives_md, objectives_svg  # noqa: E402

EXAMPLE = "examples/smollm2"
_EXAMPLE_GITIGNORE = """
# made by make real
/data/raw
/data/prompts
"""
_GENERATED = "<!-- Written by tools/generate.py; edit the code, then run: make docs -->"


def params_md() -> str:
    """docs/params.md: a table a section."""
    lines = [
        "# Settings of params.yaml",
        "",
        _GENERATED,
        "",
        "The defaults suit a model of a few billion parameters on one consumer GPU. The embedded default of this"
        " repository sets some of them otherwise; the last column says which.",
    ]
    section = ""
    for path, field in iter_settings():
        name = path.split(".")[0]
        if name != section:
            section = name
            model = Params.model_fields[name].annotation
            lines += ["", f"## {name}", "", (model.__doc__ or "").strip(), ""]
            lines += ["| setting | meaning | unit | values | default | embedded |", "|---|---|---|---|---|---|"]
        default = field.get_default(call_default_factory=True)
        cells = [f"`{path}`", field.description or "", unit_of(field), range_of(field), _cell(default)]
        cells.append(_cell(EMBEDDED_PRESET[path]) if path in EMBEDDED_PRESET else "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def cli_md() -> str:
    """docs/cli.md: the help of every command."""
    command = [sys.executable, "-m", "typer", "dpo_cli.cli.app", "utils", "docs", "--name", "dpo-cli"]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    text = re.sub(
        r"^# `dpo-cli`$", f"# The commands of dpo-cli\n\n{_GENERATED}", html.unescape(text), count=1, flags=re.M
    )
    return _with_whole_summaries(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")


def _with_whole_summaries(text: str) -> str:
    """Lists of commands with the first line of each command's section, which Typer cuts off at 45 characters."""
    summaries = dict(re.findall(r"^#+ `dpo-cli ([^`]+)`\n\n(.+)$", text, flags=re.M))
    lines, group = [], ""
    for line in text.splitlines():
        if heading := re.match(r"#+ `dpo-cli ([^`]+)`", line):
            group = f"{heading[1]} "
        item = re.match(r"\* `([\w-]+)`: ", line)
        found = summaries.get(f"{group}{item[1]}") if item else None
        lines.append(f"* `{item[1]}`: {found}" if item and found else line)
    return "\n".join(lines) + "\n"


def example_files() -> dict[str, str]:
    """The example's project files: what init writes, with the values that its params.yaml has."""
    values: dict[str, object] = {}
    params = load_params(ROOT / EXAMPLE / "params.yaml")
    for path, field in iter_settings():
        value: Any = params
        for name in path.split("."):
            value = getattr(value, name)
        if value != field.get_default(call_default_factory=True):
            several = isinstance(value, list) and all(isinstance(each, BaseModel) for each in value)
            values[path] = [each.model_dump(exclude_defaults=True) for each in value] if several else value
    files = project_files(values)
    del files[".gitattributes"]
    return files | {".gitignore": files[".gitignore"] + _EXAMPLE_GITIGNORE}


def generated_files() -> dict[Path, str]:
    """Every generated file with its content."""
    texts = project_files(EMBEDDED_PRESET)
    del texts[".gitignore"]
    texts |= {
        "docs/cli.md": cli_md(),
        "docs/objectives.md": objectives_md(_GENERATED),
        f"docs/{PICTURE}": objectives_svg(),
        "docs/params.md": params_md(),
        (paths.RAW / "instructions.json").as_posix(): rows_json(world.instruction_rows(0)),
        (paths.RAW / "preferences.json").as_posix(): rows_json(world.preference_rows(0)),
    }
    texts |= {f"{EXAMPLE}/{name}": text for name, text in example_files().items()}
    return {ROOT / name: text for name, text in texts.items()}


def main() -> int:
    """Write or check."""
    check = sys.argv[1:] == ["--check"]
    stale = 0
    for path, text in generated_files().items():
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        if before == text:
            continue
        name = path.relative_to(ROOT).as_posix()
        if check:
            stale += 1
            difference = difflib.unified_diff(
                before.splitlines(), text.splitlines(), name, "generated", lineterm="", n=1
            )
            print("\n".join([*difference][:20]))
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"wrote {name}")
    if stale:
        print(f"{stale} generated files differ from the code; run: make docs")
    return int(stale > 0)


if __name__ == "__main__":
    sys.exit(main())
