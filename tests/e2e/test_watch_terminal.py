"""``dpo-cli watch`` in a pseudo-terminal: it follows a training that another process logs, and ends at a key."""

from __future__ import annotations

import shutil
from pathlib import Path

from dpo_cli.core.live_log import LiveLog
from tests.pseudo_terminal import PseudoTerminal
from tests.report_folder import COMMITTED


def test_it_follows_a_training_and_shows_another(tmp_path: Path) -> None:
    seat = PseudoTerminal(tmp_path, "watch")
    try:
        seat.wait_for(lambda: "Waiting for a training to begin" in seat.text)
        shutil.copytree(COMMITTED / "sft", tmp_path / "reports" / "sft")
        seat.wait_for(lambda: "sft: finished, step 129 of 129" in seat.text)
        log = LiveLog(tmp_path / ".scratch" / "train" / "fingerprint", 50, [])
        for step in range(1, 31):
            rewards = {"rewards/chosen": -0.1 * (step - 1), "rewards/rejected": -0.2 * (step - 1)}
            log.add({"step": step, "loss": 0.7 - step / 100, "grad_norm": 1.0, **rewards})
        seat.wait_for(lambda: "train: running, step 30 of 50" in seat.text and "both fall: common" in seat.text)
        seat.wait_for(lambda: "Preference loss" in seat.text)
        assert "0.400" in seat.text  # the last loss
        assert any("\u2801" <= sign <= "\u28ff" for sign in seat.text)
        log.add({"step": 31, "loss": 0.3})
        seat.wait_for(lambda: "step 31 of 50" in seat.text)
        seat.press("\t")
        seat.wait_for(lambda: "sft: finished" in seat.text)
        seat.press("q")
        assert seat.end() == 0
    finally:
        seat.process.kill()
