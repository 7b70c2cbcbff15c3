"""The table of cards that are not there: what is wrong is said before minutes have gone by, and a stop is heard."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cards


@pytest.fixture(autouse=True)
def without_stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "load_stub", lambda: None)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--cards", "rtx-9999"], 2, "invalid choice: 'rtx-9999'"),
        (["--pairs", "0"], 2, "must be a number of at least 1, got 0"),
        (["--shapes", "llama-9"], 3, "must be one of"),
        (["--out", "folder"], 6, "folder is a folder; name a file: --out FILE.md"),
        (["--out", "nowhere/cards.md"], 6, "nowhere/cards.md cannot be written: "),
        (["--out", "file/cards.md"], 6, "file/cards.md cannot be written: "),
    ],
)
def test_what_is_wrong_is_said_at_once(
    words: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    with pytest.raises(SystemExit) as end:
        cards.main(words)
    assert end.value.code == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_leaves_the_table_of_before(
    signum: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        os.kill(os.getpid(), signum)

    monkeypatch.setattr("dpo_cli.dry_run.prediction.predict_speed", stop)
    (out := tmp_path / "cards.md").write_text("before", encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        cards.main(["--out", str(out)])
    assert end.value.code == 130
    assert "dpo-cli: stopped" in capsys.readouterr().err
    assert [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()] == ["before"]
