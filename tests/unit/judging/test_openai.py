"""A judge behind a server, over loopback: what it can do is found out, and a server that dies loses no judgment."""

from __future__ import annotations

import json
import math
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.core.errors import MachineError, ParamsError
from dpo_cli.judging.cache import CachedJudge
from dpo_cli.judging.judge import INVALID, Judgment, Question
from dpo_cli.judging.openai import OpenAiJudge, read_answer
from dpo_cli.judging.server import RefusedError, Server
from dpo_cli.judging.templates import Template
from dpo_cli.judging.win_rate import Pair, compare_all, summarize

_PROBES = 3
"""Chat completions with which connect finds out what the fake server can do."""
TEMPLATE = Template("short", "<{prompt}|{a}|{b}> A or B?")
QUESTIONS = [Question(f"prompt {n}", "x" * n, "x" * 5) for n in range(12)]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class FakeServer:
    """Prefers the longer answer on a logistic scale with a bias for A; what else it does is set by attributes.

    Attributes:
        constraint: The field that it knows for constraining answers.
        is_strict: Refuses fields that it does not know, and not only ignores them.
        logprobs: Most probable tokens that it lists at most; 0: refuses to.
        chatter: What it says where it is not constrained; None: the letter.
        dies_after: Chat completions after which it hangs up without an answer.
        trouble: Statuses that the next requests get.
        lists_models: Whether it can say what models it has.
        longest: Characters of a question beyond which it is refused.
    """

    KNOWN = frozenset({"model", "messages", "max_tokens", "temperature", "stream", "logprobs", "top_logprobs"})

    def __init__(self) -> None:
        self.constraint: str | None = "structured_outputs"
        self.is_strict = False
        self.logprobs = 20
        self.chatter: str | None = None
        self.bias = 0.7
        self.dies_after: int | None = None
        self.trouble: list[int] = []
        self.lists_models = True
        self.longest = 10_000
        self.judged: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.lock = threading.Lock()

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        unknown = set(body) - self.KNOWN - {self.constraint}
        if self.is_strict and unknown:
            return 400, {"error": {"message": f"unknown fields {sorted(unknown)}\nmore"}}
        if body.get("top_logprobs", 0) > self.logprobs:
            return 400, {"error": {"message": "too many log-probabilities"}}
        text = body["messages"][0]["content"]
        if len(text) > self.longest:
            return 400, {"detail": "longer than the context"}
        constrained = self.constraint in body
        found = re.match(r"<(.*)\|(.*)\|(.*)>", text)
        if found is None:
            says, p = "hello" if not constrained else "A", 0.5
        else:
            p = sigma(len(found[2]) - len(found[3]) + self.bias)
            says = "A" if p > 0.5 else "B"
            if not constrained and self.chatter is not None:
                says = self.chatter
        choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": says}}
        if body.get("logprobs"):
            rows = [("A", p * 0.5), (" B", (1 - p) * 0.5), ("The", 0.3), ("I", 0.1), ("So", 0.01)]
            rows.sort(key=lambda row: -row[1])
            top = [{"token": token, "logprob": math.log(max(p, 1e-30))} for token, p in rows[: body["top_logprobs"]]]
            choice["logprobs"] = {"content": [{"token": says, "logprob": -1.0, "top_logprobs": top}]}
        return 200, {"choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    fake: FakeServer

    def do_GET(self) -> None:
        if not self.fake.lists_models:
            self.answer(500, "Internal Server Error")
            return
        listed = [{"id": "judge-7b", "created": id(object()), "meta": {"n_params": 7}}]
        self.answer(200 if self.path == "/v1/models" else 404, {"object": "list", "data": listed})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_question = body["messages"][0]["content"].startswith("<")
        with self.fake.lock:
            self.fake.requests.append(body)
            self.fake.headers.append(self.headers)
            if is_question and self.fake.dies_after is not None and len(self.fake.judged) >= self.fake.dies_after:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if self.fake.trouble:
                status = self.fake.trouble.pop(0)
                self.answer(status, "busy", {"Location": "/v1/models"} if status == 302 else {})
                return
            status, answer = self.fake.complete(body)
            if is_question and status == 200:
                self.fake.judged.append(body["messages"][0]["content"])
        self.answer(status, answer)

    def answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(fake: FakeServer) -> Iterator[str]:
    handler = type("Bound", (Handler,), {"fake": fake})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def fake() -> FakeServer:
    return FakeServer()


@pytest.fixture
def url(fake: FakeServer) -> Iterator[str]:
    with serving(fake) as url:
        yield url


@pytest.fixture
def connect(url: str, reporter: Any) -> Callable[..., OpenAiJudge]:
    def make(template: Template = TEMPLATE, model: str | None = None, **settings: Any) -> OpenAiJudge:
        server = Server(url, num_tries=2, sleep=lambda _: None, timeout_s=10)
        return OpenAiJudge.connect(server, model, template, reporter, **settings)

    return make


# --- verdicts -----------------------------------------------------------------------------


@pytest.mark.parametrize("constraint", ["structured_outputs", "guided_choice", "grammar", None])
@pytest.mark.parametrize("is_strict", [False, True])
def test_whatever_a_server_knows_is_found_out_and_used(
    fake: FakeServer, connect: Callable[..., OpenAiJudge], reporter: Any, constraint: str | None, is_strict: bool
) -> None:
    fake.constraint, fake.is_strict, fake.chatter = constraint, is_strict, "Well"
    judge = connect()
    assert (judge.constraint, judge.top_logprobs) == (constraint or "none", 5)
    assert constraint is None or f"constrained by {constraint}" in reporter.said[-1]
    found = dict(judge.judge(QUESTIONS))
    for index, question in enumerate(QUESTIONS):
        p_a = sigma(len(question.a) - len(question.b) + fake.bias)
        assert found[index].p_a == pytest.approx(p_a)
        assert found[index].verdict == ("A" if p_a > 0.5 else "B")
    asked = [body for body in fake.requests if body["messages"][0]["content"].startswith("<")]
    assert len(asked) == len(QUESTIONS)
    for body in asked:
        assert (body["max_tokens"], body["temperature"], body["model"]) == (1, 0, "judge-7b")
    values = {
        "structured_outputs": {"choice": ["A", "B"]},
        "guided_choice": ["A", "B"],
        "grammar": 'root ::= "A" | "B"',
    }
    assert constraint is None or asked[0][constraint] == values[constraint]


def test_without_log_probabilities_the_letter_decides(
    fake: FakeServer, connect: Callable[..., OpenAiJudge], reporter: Any
) -> None:
    fake.logprobs, fake.constraint = 0, None
    judge = connect()
    assert (judge.constraint, judge.top_logprobs) == ("none", 0)
    assert "not constrained, read by its letter" in reporter.said[-1]
    found = dict(judge.judge(QUESTIONS))
    assert [found[n].p_a for n in range(12)] == [0.0] * 5 + [1.0] * 7


def test_answers_that_are_no_letter_are_counted_and_refused(
    fake: FakeServer, connect: Callable[..., OpenAiJudge]
) -> None:
    fake.logprobs, fake.constraint, fake.chatter = 0, None, "Both"
    judge = connect()
    pairs = [Pair(question.prompt, question.a, question.b) for question in QUESTIONS]
    comparisons = compare_all(judge, pairs)
    with pytest.raises(Exception, match=r"no verdict in 11 of 11 comparisons .*take a server that constrains answers"):
        summarize(comparisons, judge.remedy)


@pytest.mark.parametrize(
    ("content", "verdict"),
    [
        ("A", "A"), (" B", "B"), ("**A**", "A"), ('"B".', "B"), ("(A)", "A"), ("B: it is", "B"), ("C", "tie"),
        ("D", "invalid"), ("a", "invalid"), ("Answer", "invalid"), ("", "invalid"), (None, "invalid"),
    ],
)  # fmt: skip
def test_the_first_letter_is_read_where_it_stands_alone(content: str | None, verdict: str) -> None:
    assert read_answer({"message": {"content": content}}, ("A", "B", "C"), 0, constrained=False).verdict == verdict


def listed(*rows: tuple[str, float], content: str = "The") -> dict[str, Any]:
    top = [{"token": token, "logprob": math.log(p) if p else -9999.0} for token, p in rows]
    return {"message": {"content": content}, "logprobs": {"content": [{"top_logprobs": top}]}}


def test_log_probabilities_are_read_among_the_options() -> None:
    def read(*rows: tuple[str, float], top: int = 3, content: str = "The", constrained: bool = True) -> Judgment:
        return read_answer(listed(*rows, content=content), ("A", "B"), top, constrained=constrained)

    assert read(("A", 0.3), ("B", 0.1), ("The", 0.5)).p_a == pytest.approx(0.75)
    assert read(("A", 0.2), (" A", 0.1), ("B", 0.1)).p_a == pytest.approx(0.75)
    # B is not listed: it has the least of those listed at most, or nothing where all are listed
    assert read(("The", 0.6), ("A", 0.3), ("I", 0.1)).p_a == pytest.approx(0.75)
    assert read(("The", 0.6), ("A", 0.3), top=5).p_a == 1
    assert read(("A", 0.9), ("B", 0.0), ("I", 0.0)).p_a == 1
    assert read(("The", 0.6), ("I", 0.3), ("So", 0.1)) == INVALID
    assert read(("The", 0.6), ("I", 0.3), ("So", 0.1), content="B").verdict == "B"
    bare = {"message": {"content": "A"}, "logprobs": None}
    assert read_answer(bare, ("A", "B"), 5, constrained=True).verdict == "A"
    # a server that is free to say anything says something else: the odd A among its alternatives is no verdict
    assert read(("The", 0.9), ("A", 0.02), ("B", 0.01), constrained=False) == INVALID
    assert read(("The", 0.9), ("A", 0.02), ("B", 0.01), constrained=False, content="B").verdict == "B"
    assert read(("A", 0.5), ("B", 0.1), ("The", 0.3), constrained=False).p_a == pytest.approx(5 / 6)


@pytest.mark.parametrize("logprob", [math.nan, math.inf, 0.5, "NaN"])
def test_what_is_no_log_probability_is_not_believed(logprob: Any) -> None:
    answer = listed(("A", 0.3), ("B", 0.1))
    answer["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = logprob
    with pytest.raises(MachineError, match=r"gives (nan|inf|0\.5) as the log-probability of 'A'"):
        read_answer(answer, ("A", "B"), 3, constrained=True)


def test_a_question_that_the_server_finds_too_long_has_no_verdict(
    fake: FakeServer, connect: Callable[..., OpenAiJudge]
) -> None:
    fake.longest = 200
    found = dict(connect().judge([QUESTIONS[0], Question("why", "because " * 40, "no")]))
    assert found[1] == INVALID
    assert found[0].verdict == "B"


# --- trouble ------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [1, 4])
def test_a_server_that_dies_midway_loses_no_judgment(
    fake: FakeServer, connect: Callable[..., OpenAiJudge], tmp_path: Path, parallel: int
) -> None:
    expected = dict(connect().judge(QUESTIONS))
    fake.judged.clear()
    fake.dies_after, num_before = 5, len(fake.requests)
    judge = CachedJudge(connect(parallel=parallel), tmp_path, 5)
    with pytest.raises(MachineError, match=r"does not answer \(.*; tried 2 times\).*start it and run this again"):
        list(judge.judge(QUESTIONS))
    assert judge.num_asked == 5
    vain = len(fake.requests) - num_before - 5
    assert vain <= 2 * 2 * parallel + _PROBES  # what was under way when it died, and not all that was waiting
    fake.dies_after = None
    again = CachedJudge(connect(parallel=parallel), tmp_path, 5)
    assert dict(again.judge(QUESTIONS)) == expected
    assert again.num_asked == len(QUESTIONS) - 5
    assert len(fake.judged) == len(set(fake.judged)) == len(QUESTIONS)
    third = CachedJudge(connect(parallel=parallel), tmp_path, 5)
    assert dict(third.judge(QUESTIONS)) == expected
    assert third.num_asked == 0


def test_a_busy_server_is_asked_again_after_growing_pauses(fake: FakeServer, url: str) -> None:
    pauses: list[float] = []
    server = Server(url, num_tries=4, backoff_s=0.5, sleep=pauses.append)
    fake.trouble = [503, 429, 500]
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    assert server.post("/chat/completions", body)["choices"]
    assert pauses == [0.5, 1.0, 2.0]
    fake.trouble = [503] * 4
    with pytest.raises(MachineError, match=r"does not answer \(status 503, busy; tried 4 times\)"):
        server.post("/chat/completions", body)


@pytest.mark.parametrize(("status", "says"), [(401, "status 401, busy"), (302, "status 302")])
def test_a_refusal_is_not_tried_again_and_a_redirection_not_followed(
    fake: FakeServer, url: str, status: int, says: str
) -> None:
    fake.trouble = [status, 200]
    body = {"messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(RefusedError, match=says) as caught:
        Server(url).post("/chat/completions", body)
    assert caught.value.status == status
    assert caught.value.exit_code == 6
    assert len(fake.requests) == 1


def test_a_server_that_is_not_there_or_silent_is_one_line(reporter: Any) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        settings: dict[str, Any] = {"num_tries": 2, "sleep": lambda _: None, "timeout_s": 0.1}
        with pytest.raises(MachineError, match=rf"http://127.0.0.1:{port}/v1 does not answer \(.*refused") as caught:
            OpenAiJudge.connect(Server(f"http://127.0.0.1:{port}", **settings), None, TEMPLATE, reporter)
        assert len(str(caught.value).splitlines()) == 1
        silent.listen()
        with pytest.raises(MachineError, match=r"no answer within 0.1 s; tried 2 times"):
            OpenAiJudge.connect(Server(f"http://127.0.0.1:{port}", **settings), None, TEMPLATE, reporter)


def test_a_model_that_the_server_does_not_have_is_refused_where_it_lists_its_models(
    fake: FakeServer, connect: Callable[..., OpenAiJudge]
) -> None:
    """Where it does not, as transformers serve without a cache folder, it is asked for the named one."""
    with pytest.raises(MachineError, match="has no model 'judge-70b'; it has judge-7b"):
        connect(model="judge-70b")
    fake.lists_models = False
    assert connect(model="judge-70b").identity["about"] == {}
    with pytest.raises(MachineError, match="status 500"):
        connect()


def test_something_else_than_an_openai_compatible_server_is_named(
    fake: FakeServer, connect: Callable[..., OpenAiJudge], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "complete", lambda body: (200, {"choices": []}))
    with pytest.raises(MachineError, match="it is not OpenAI-compatible"):
        connect()


def test_a_key_and_extra_fields_are_sent(fake: FakeServer, url: str, reporter: Any) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    judge = OpenAiJudge.connect(Server(url, api_key="secret"), "judge-7b", TEMPLATE, reporter, extra=extra)
    list(judge.judge(QUESTIONS[:1]))
    assert fake.headers[-1]["Authorization"] == "Bearer secret"
    assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for body in fake.requests)
    assert judge.identity["extra"] == extra
    assert "secret" not in json.dumps(judge.identity)


def test_what_a_judgment_is_known_by_is_the_same_from_run_to_run(connect: Callable[..., OpenAiJudge]) -> None:
    first, second = connect(), connect()
    assert first.identity == second.identity
    assert connect(Template("other", TEMPLATE.text + "!")).identity != first.identity
    assert first.identity["about"] == {"id": "judge-7b", "meta": {"n_params": 7}}


# --- where it may be ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://192.0.2.1:8000", "https://api.openai.com/v1", "http://10.0.0.5/v1", "http://0.0.0.0:8000",
        "http://localhost.evil.org", "http://127.0.0.1.evil.org/v1", "http://gpu-box:8000", "http://[2001:db8::1]:80",
    ],
)  # fmt: skip
def test_another_host_is_refused_unless_it_is_allowed_by_name(url: str) -> None:
    with pytest.raises(ParamsError, match=r"must be of this machine \(127.0.0.1\), got .* into allowed_hosts"):
        Server(url, allowed_hosts=["gpu-box-2", "evil.org"])
    assert Server("http://gpu-box:8000", allowed_hosts=["GPU-box"]).url == "http://gpu-box:8000/v1"


def test_this_machine_is_always_allowed() -> None:
    for url in ("http://127.0.0.1:8080", "http://localhost:1/v1/", "http://[::1]:8000/v1", "http://127.9.9.9"):
        assert Server(url).url.endswith("/v1")


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8080",
        "ftp://127.0.0.1",
        "http://",
        "",
        "http://127.0.0.1@evil.org/",
        "http://127.0.0.1:x/",
        "file:///etc",
    ],
)
def test_what_is_no_address_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(ParamsError, match="the judge's url must be"):
        Server(url)


def test_no_proxy_is_asked(fake: FakeServer, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://192.0.2.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert Server(url, num_tries=1, timeout_s=5).get("/models")["object"] == "list"
