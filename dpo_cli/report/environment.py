"""Templates of pages that load nothing and escape every text of a model or a data file."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined


def page_environment() -> Environment:
    """The templates of all pages, and the style sheets that they share."""
    return Environment(
        loader=PackageLoader("dpo_cli.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
