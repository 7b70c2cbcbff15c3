"""The page's messages: who may send them, what they say and do not say, and what becomes of a vote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from dpo_cli.labeling.desk import tokens_of
from dpo_cli.labeling.engine import Engine
from dpo_cli.labeling.items import Account, ItemStore, read_items
from dpo_cli.labeling.server import make_app, open_socket
from dpo_cli.labeling.settings import Settings

PORT = 8384
HERE = f"http://127.0.0.1:{PORT}"
ATTACK = "<script>alert(1)</script></textarea>\x1b[31m\u202e"


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Answers of a tuned model and of SFT, with two raters."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "id": f"id-{row}",
            "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"question {row}"}],
            "sft": {"text": f"plain {row} {ATTACK}"},
            "dpo": {"text": f"tuned {row}"},
        }
        for row in range(20)
    ]
    Path("samples.json").write_text(json.dumps(rows), encoding="utf-8")
    store = ItemStore(read_items(Path("samples.json"), "pair", 1, 0, Account()), tmp_path / "votes")
    with Engine(store, Settings(repeats=0), tmp_path / "votes", guideline="Be *fair*.") as engine:
        yield engine


@pytest.fixture
def tokens(engine: Engine) -> dict[str, str]:
    for rater in ("human:anna", "human:ben"):
        engine.join(rater)
    return tokens_of(engine.folder, ["human:anna", "human:ben"])


@pytest.fixture
def client(engine: Engine, tokens: dict[str, str]) -> TestClient:
    app = make_app(engine, {token: rater for rater, token in tokens.items()}, PORT)
    return TestClient(app, base_url=HERE, client=("127.0.0.1", 5000))


def headers(tokens: dict[str, str], name: str = "anna") -> dict[str, str]:
    return {"x-token": tokens[f"human:{name}"]}


def test_what_may_not_ask_is_refused(engine: Engine, client: TestClient, tokens: dict[str, str]) -> None:
    mine = headers(tokens)
    assert client.get("/state", headers=mine).status_code == 200
    assert client.get("/state", headers=mine | {"origin": HERE}).status_code == 200
    assert client.get("/", params={"token": mine["x-token"]}).status_code == 200
    refused: list[dict[str, str]] = [
        {},
        {"x-token": "guess"},
        mine | {"host": "evil.example"},
        mine | {"host": f"evil.example:{PORT}"},
        mine | {"host": "127.0.0.1"},
        mine | {"origin": "http://evil.example"},
        mine | {"origin": "null"},
        mine | {"origin": "http://127.0.0.1:1"},
    ]
    for given in refused:
        assert client.get("/state", headers=given).status_code == 403, given
        assert client.post("/vote", headers=given, json={}).status_code == 403, given
    assert client.get("/").status_code == 403
    assert client.get("/etc/passwd").status_code == 403
    assert client.get("/etc/passwd", headers=mine).status_code == 404
    assert (
        client.get("/state", params={"token": mine["x-token"]}).status_code == 403
    )  # an address is for the page alone
    app = make_app(engine, {tokens["human:anna"]: "human:anna"}, PORT)
    for peer in ("192.168.0.7", "10.0.0.1", "2001:db8::1", "testclient"):
        other = TestClient(app, base_url=HERE, client=(peer, 5000))
        assert other.get("/state", headers=mine).status_code == 403, peer
    with open_socket(0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"  # so that no other machine reaches it at all
    for data, kind, status in (
        ("{", "application/json", 400),
        ("[]", "application/json", 400),
        ("{}", "text/plain", 415),
    ):
        assert client.post("/vote", headers=mine | {"content-type": kind}, content=data).status_code == status
    assert client.post("/vote", headers=mine, json={"key": "x" * 70_000}).status_code == 413
    assert not any(engine.progress(rater).done for rater in tokens)


def test_no_response_names_a_model_a_file_or_another_rater(client: TestClient, tokens: dict[str, str]) -> None:
    said = [client.get("/", params={"token": tokens["human:anna"]})]
    for number in range(5):
        said.append(client.get("/state", headers=headers(tokens)))
        vote = {"number": number, "key": f"{number}", "vote": "AB"[number % 2], "seconds": 2}
        said.append(client.post("/vote", headers=headers(tokens), json=vote))
    said.append(client.post("/undo", headers=headers(tokens), json={"number": 5, "key": "u"}))
    for each in said:
        assert each.status_code == 200
        everything = (each.text + json.dumps(dict(each.headers))).lower()
        assert not re.search(
            r"\b(dpo|sft)\b|samples\.json|/votes|/tmp|human|anna|ben\b|uvicorn|starlette",
            everything.replace("dpo-cli", ""),
        )
    keys = {name for each in said[1:] for name in each.json()}
    assert keys == {"mode", "number", "question", "progress", "guideline"}
    assert set(said[1].json()["question"]) == {"prompt", "answers"}


def test_texts_show_their_control_characters(client: TestClient, tokens: dict[str, str]) -> None:
    found = client.get("/state", headers=headers(tokens)).json()["question"]
    assert [turn["role"] for turn in found["prompt"]] == ["system", "user"]
    [attack] = [text for text in found["answers"] if text.startswith("plain")]
    assert attack.endswith(
        "<script>alert(1)</script></textarea>\u241b[31m\\u202e"
    )  # a text in JSON: the page escapes it


def test_the_page_lets_nothing_run_but_its_own_script(client: TestClient, tokens: dict[str, str]) -> None:
    page = client.get("/", params={"token": tokens["human:anna"]})
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert not re.findall(r"(?:src|href)=\"(?!data:,)", page.text)
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|\beval\b", page.text)


def test_votes_of_two_raters_and_a_late_one(engine: Engine, client: TestClient, tokens: dict[str, str]) -> None:
    def post(name: str, path: str = "/vote", **said: Any) -> Any:
        return client.post(path, headers=headers(tokens, name), json=said)

    assert post("anna", number=0, key="a0", vote="A", strength=3, seconds=4.5).json()["number"] == 1
    assert post("ben", number=0, key="b0", vote="tie").json()["progress"]["done"] == 1
    assert post("anna", number=0, key="a0", vote="A").json()["number"] == 1  # sent again
    assert post("anna", number=0, key="x", vote="B").status_code == 409
    assert post("anna", number=1, key="a1", vote="dpo").status_code == 400
    assert post("anna", number="1", key="a1", vote="A").status_code == 400
    assert post("anna", "/undo", number=1, key="a1").json()["number"] == 2
    assert engine.progress("human:anna").done == 0
    rows = [json.loads(line) for line in (engine.folder / "anna.jsonl").read_text("utf-8").splitlines()]
    assert [(row["vote"], row.get("strength"), row["supersedes"]) for row in rows] == [
        ("A", 3, None),
        ("undone", None, 0),
    ]
    assert rows[0]["guideline"] == engine.guideline_version
    assert {rows[0]["method"], rows[0]["baseline"]} == {"dpo", "sft"}  # in the file alone


def test_tokens_stay_the_same_and_are_for_their_owner(engine: Engine, tokens: dict[str, str], tmp_path: Path) -> None:
    again = tokens_of(engine.folder, ["human:anna", "human:chloe"])
    assert again["human:anna"] == tokens["human:anna"]
    assert again["human:chloe"] not in tokens.values()
    [kept] = (tmp_path / ".scratch/label").iterdir()
    assert kept.stat().st_mode & 0o077 == 0
