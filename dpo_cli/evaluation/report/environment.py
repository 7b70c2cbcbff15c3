"""Templates of pages that load nothing and escape every text of a model or a data file."""

from __future__ import annotations

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

_SHARED = "dpo_cli.evaluation.report"


def environment_of(package: str) -> Environment:
    """The templates of a package, beside the style sheets that all pages share."""
    return Environment(
        loader=ChoiceLoader([PackageLoader(name, "") for name in dict.fromkeys((package, _SHARED))]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
