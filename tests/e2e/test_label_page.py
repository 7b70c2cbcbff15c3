"""The page of ``dpo-cli label`` in a headless Chromium: by keyboard alone, with two raters, reloads and kills.

Answers say how good they are, so the tests know what each vote must be, whatever the shown order. Where Chromium or its
chromedriver is not installed, the tests are skipped.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.judging.votes import read_rows, read_votes

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="Chromium and its chromedriver are not installed; on Debian: apt-get install chromium chromium-driver",
)

ENTER = "\ue007"
ATTACK = (
    "\x00\x07\x1b[31m\u202e<script>alert(1)</script> <img src=x onerror=alert(2)> </textarea></style>"
    " [link](javascript:alert(3)) ![picture](http://example.com/x.png)\n\n```html\n<script>alert(4)</script>\n```\n"
)


def write_items(folder: Path, num: int, answers: int = 2) -> None:
    """Prompts whose answers are called good 0, good 1, ...; the higher the number, the better."""
    rows = [
        {"prompt": f"prompt {row} {ATTACK}", "completions": [f"good {level}\n\n{ATTACK}" for level in range(answers)]}
        for row in range(num)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Served:
    """``dpo-cli label`` in a process of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "dpo_cli", "-C", str(folder), "label", "items.jsonl", "--out", "votes"]
        self.process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True)
        self.addresses: dict[str, str] = {}
        assert self.process.stderr is not None
        said = ""
        for line in self.process.stderr:
            said += line
            if found := re.match(r"(\w+) votes at (http://\S+)", line):
                self.addresses[found[1]] = found[2]
            if line.startswith("Ctrl-C"):
                return
        raise AssertionError(said)

    @property
    def port(self) -> str:
        return next(iter(self.addresses.values())).rpartition(":")[2].partition("/")[0]

    def end(self, by: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(by)
        self.process.communicate(timeout=30)
        return self.process.returncode


@contextlib.contextmanager
def served(folder: Path, *arguments: str) -> Iterator[Served]:
    found = Served(folder, *arguments)
    try:
        yield found
    finally:
        if found.process.poll() is None:
            assert found.end() == 0


class Voter:
    """A rater in front of a browser window."""

    def __init__(self, driver: Any, window: str) -> None:
        self.driver, self.window = driver, window

    def open(self, address: str) -> None:
        self.driver.switch_to.window(self.window)
        self.driver.get(address)
        self.wait_for("return document.body?.dataset.number !== undefined")

    def wait_for(self, code: str) -> None:
        deadline = time.monotonic() + 20
        while not self.driver.execute_script(code):
            assert time.monotonic() < deadline, self.driver.execute_script("return document.body.innerText")
            time.sleep(0.01)

    @property
    def number(self) -> int:
        """Of the next vote; None is sent while one is on its way."""
        return int(self.driver.execute_script("return document.body.dataset.number"))

    @property
    def levels(self) -> list[int]:
        """How good the answers are, in the shown order; nothing at the end."""
        texts = self.driver.execute_script(
            "return [...document.querySelectorAll('.answer .text')].map(each => each.textContent)"
        )
        return [int(re.findall(r"good (\d)", text)[0]) for text in texts]

    @property
    def prompt(self) -> str:
        return re.findall(
            r"prompt \d+", self.driver.execute_script("return document.querySelector('#prompt').innerText")
        )[0]

    def press(self, *keys: str, sends: bool = True) -> None:
        """Press keys, of which the last one votes or takes back, and wait until that is kept."""
        self.driver.switch_to.window(self.window)
        before = self.number
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)
        if sends:
            self.wait_for(f"return document.body.dataset.number === '{before + 1}'")

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def hosts(self) -> set[str]:
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]
        return {url.partition("?")[0].rpartition("/")[0] for url in urls if not url.startswith("data:")}


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield found
    finally:
        found.quit()


@pytest.fixture
def voter(driver: Any) -> Voter:
    driver.get("about:blank")
    driver.get_log("browser")
    driver.get_log("performance")
    return Voter(driver, driver.current_window_handle)


def rows_of(folder: Path, name: str = "anna") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"votes/{name}.jsonl").read_text("utf-8").splitlines()]


def better(levels: list[int]) -> str:
    return "f" if levels[0] > levels[1] else "j"


def test_forty_pairs_by_keyboard_with_undo_strength_help_and_a_reload(tmp_path: Path, voter: Voter) -> None:
    write_items(tmp_path, 40)
    meant: dict[str, tuple[str, int | None]] = {}  # by prompt: which answer, and by how much
    says_what_is_written = False
    with served(tmp_path, "--rater", "anna", "--port", "0", "--repeats", "0") as server:
        voter.open(server.addresses["anna"])
        for turn in range(40):
            prompt, levels = voter.prompt, voter.levels
            if turn == 11:
                voter.press("t")
                assert voter.prompt != prompt
                voter.press("u")  # takes it back, and asks it again in the same order
                assert (voter.prompt, voter.levels) == (prompt, levels)
            if turn == 15:
                says_what_is_written = voter.driver.execute_script(
                    "const main = document.querySelector('#main'); return !main.querySelector('script, img, a, style')"
                    " && main.textContent.split('␀␇␛[31m\\\\u202e<script>alert(1)</script>').length === 4"
                )
            if turn == 20:
                voter.open(server.addresses["anna"])  # a reload in the middle
                assert (voter.prompt, voter.levels) == (prompt, levels)
            if turn == 30:
                voter.press("?", sends=False)
                voter.press("t", sends=False)  # is no vote while the help is open
                voter.press("\ue00c", sends=False)
                assert voter.number == turn + 2
            special = {5: ("t", "tie"), 6: ("b", "both bad"), 7: ("s", "skip")}.get(turn)
            if special:
                voter.press(special[0])
                meant[prompt] = special[1], None
            elif turn % 3 == 0:
                voter.press("1", "3", better(levels))
                meant[prompt] = "good 1", 3
            else:
                voter.press(better(levels))
                meant[prompt] = "good 1", None
        voter.wait_for("return !document.querySelector('#end').hidden")
        assert voter.levels == []
        assert not voter.complaints()  # no script of the answers ran, nothing was refused
        assert says_what_is_written
        assert voter.hosts() == {f"http://127.0.0.1:{server.port}"}
    assert len(rows_of(tmp_path)) == 42
    said = {}
    for _, row in read_rows(tmp_path / "votes/anna.jsonl"):
        shown = [answer[0]["content"] for answer in row["completions"]]
        vote = shown["AB".index(row["vote"])][:6] if row["vote"] in "AB" else row["vote"]
        said[re.findall(r"prompt \d+", row["prompt"][0]["content"])[0]] = vote, row["strength"]
        assert 0 <= row["seconds"] < 60
    assert said == meant
    assert {row["vote"] for row in rows_of(tmp_path)} == {"A", "B", "tie", "both bad", "skip", "undone"}
    assert len(read_votes(tmp_path / "votes/anna.jsonl")) == 39  # all but what was skipped


def test_ten_rankings_with_ties(tmp_path: Path, voter: Voter) -> None:
    write_items(tmp_path, 10, answers=4)
    ranks = {3: 1, 2: 2, 1: 2, 0: 3}  # the two in the middle are tied
    with served(tmp_path, "--rater", "anna", "--port", "0", "--mode", "ranking", "--repeats", "0") as server:
        voter.open(server.addresses["anna"])
        for turn in range(10):
            key = {level: str(place + 1) for place, level in enumerate(voter.levels)}
            if turn == 3:
                voter.press(key[0], key[1], "r", sends=False)  # starts over
            if turn == 4:
                voter.press(key[3], ENTER, sends=False)  # not all are ranked
                assert "every answer" in voter.driver.execute_script(
                    "return document.querySelector('#notice').innerText"
                )
                voter.press(key[3], sends=False)  # takes it away
            voter.press(key[3], key[2], "t", key[1], key[0], ENTER)
        assert not voter.complaints()
    for row in rows_of(tmp_path):
        levels = [int(answer[0]["content"][5]) for answer in row["completions"]]
        assert row["vote"] == [ranks[level] for level in levels]


def test_ten_thumbs(tmp_path: Path, voter: Voter) -> None:
    write_items(tmp_path, 5)
    with served(tmp_path, "--rater", "anna", "--port", "0", "--mode", "thumbs", "--repeats", "0") as server:
        voter.open(server.addresses["anna"])
        for _ in range(10):
            voter.press("j" if voter.levels == [1] else "f")
        assert not voter.complaints()
    assert {(row["completions"][0][0]["content"][:6], row["vote"]) for row in rows_of(tmp_path)} == {
        ("good 0", "down"),
        ("good 1", "up"),
    }


def test_two_raters_at_once(tmp_path: Path, voter: Voter) -> None:
    write_items(tmp_path, 12)
    driver = voter.driver
    with served(tmp_path, *("--rater", "anna", "--rater", "ben"), "--overlap", "2", "--port", "0") as server:
        voter.open(server.addresses["anna"])
        driver.switch_to.new_window("tab")
        ben = Voter(driver, driver.current_window_handle)
        ben.open(server.addresses["ben"])
        try:
            for turn in range(12):
                for each in (voter, ben):
                    driver.switch_to.window(each.window)
                    each.press("t" if each is ben and turn % 2 else better(each.levels))
        finally:
            driver.switch_to.window(ben.window)
            driver.close()
            driver.switch_to.window(voter.window)
    anna, ben_ = (read_votes(tmp_path / f"votes/{name}.jsonl") for name in ("anna", "ben"))
    assert {vote.item for vote in anna} == {vote.item for vote in ben_}
    assert len(anna) == len(ben_) == 12
    assert len({vote.result for vote in anna}) == 1  # always the better one
    assert sorted(vote.result for vote in ben_).count(1) == 6


def test_a_server_that_is_killed_after_each_vote_loses_none_and_doubles_none(tmp_path: Path, voter: Voter) -> None:
    write_items(tmp_path, 20)
    arguments = ("--rater", "anna", "--repeats", "0")
    server = Served(tmp_path, *arguments, "--port", "0")
    address, port = server.addresses["anna"], server.port
    voter.open(address)
    for turn in range(20):
        if turn % 2:  # killed before the vote is sent: the page sends it until a new server keeps it
            server.end(signal.SIGKILL)
            voter.press(better(voter.levels), sends=False)
            server = Served(tmp_path, *arguments, "--port", port)
            voter.wait_for(f"return document.body.dataset.number === '{turn + 1}'")
        else:
            voter.press(better(voter.levels))
            server.end(signal.SIGKILL)
            server = Served(tmp_path, *arguments, "--port", port)
        assert server.addresses["anna"] == address
        assert len(rows_of(tmp_path)) == turn + 1
    assert server.end() == 0
    votes = read_votes(tmp_path / "votes/anna.jsonl")
    assert len({vote.item for vote in votes}) == 20 == len(votes)
    assert len({vote.result for vote in votes}) == 1
