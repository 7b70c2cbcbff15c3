"""``dpo-cli report``: it writes the page, says where it is, and opens it only where somebody can look."""

from __future__ import annotations

import sys
import webbrowser
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.cli import report
from dpo_cli.core import paths
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.stages import report as stage
from tests.report_folder import write_reports


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that a browser was asked to open; there is a display, and no CI."""
    addresses: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: addresses.append(url) or True)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("DISPLAY", ":0")
    return addresses


def test_it_writes_says_where_and_opens(project: Path, opened: list[str], reporter: Any) -> None:
    write_reports(10)
    report.make_report(is_opened=True, reporter=reporter)
    assert reporter.said == ["wrote reports/report.html and 16 figures in reports/figures"]
    assert opened == [(project / paths.REPORT_HTML).as_uri()]


@pytest.mark.usefixtures("project")
def test_it_opens_nothing_where_it_is_told_so_or_nobody_looks(
    opened: list[str], reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_reports(10)
    monkeypatch.setattr(stage, "write_report", lambda path: None)
    report.make_report(is_opened=False, reporter=reporter)
    monkeypatch.setenv("CI", "true")
    report.make_report(is_opened=True, reporter=reporter)
    monkeypatch.delenv("CI")
    monkeypatch.delenv("DISPLAY")
    report.make_report(is_opened=True, reporter=reporter)
    assert opened == []
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    report.make_report(is_opened=True, reporter=reporter)
    assert len(opened) == 1


@pytest.mark.usefixtures("project", "opened")
def test_without_a_browser_it_says_so(reporter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "write_report", lambda path: None)
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    report.make_report(is_opened=True, reporter=reporter)
    assert reporter.said[1:] == ["no browser could be started; open the page by hand"]


@pytest.mark.usefixtures("project")
def test_a_missing_stage_is_named(opened: list[str], reporter: Any) -> None:
    with pytest.raises(StaleArtifactError, match="run: dpo-cli convert-sft"):
        report.make_report(is_opened=True, reporter=reporter)
    assert opened == []
    assert not paths.REPORTS.exists()
