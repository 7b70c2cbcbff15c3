"""The page on which people vote: one file of HTML, and four small messages, on loopback alone.

Every rater has an address of his own, whose token says who he is; nobody sees another's votes. What is sent to the page
names no model and no file: a prompt, answers in the order in which they are shown, and how far the rater is. Requests
from another machine, for another host, of another origin or without a token are refused.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from dpo_cli.core.errors import MachineError
from dpo_cli.core.text import visible
from dpo_cli.labeling.engine import Engine
from dpo_cli.labeling.keys import KEYS, NOT_RANKED, NOTE, STRENGTHS, help_of
from dpo_cli.labeling.state import state_of
from dpo_cli.labeling.votes import BadVote
from dpo_cli.report.style import page_environment

LOOPBACK = "127.0.0.1"
_HOSTS = (LOOPBACK, "localhost", "[::1]")
_LARGEST = 1 << 16
_PATIENCE_S = 3
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_Answer = Callable[[Request, str], Awaitable[Response]]


class _Refused(Exception):
    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


def make_app(engine: Engine, tokens: Mapping[str, str], port: int) -> Starlette:
    """The page and its messages.

    Args:
        engine: Asks, and keeps votes; the raters have joined it.
        tokens: The rater of each token.
        port: Where it listens, which requests must name.
    """
    page, policy = _page()

    async def index(request: Request, rater: str) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    async def state(request: Request, rater: str) -> Response:
        return JSONResponse(state_of(engine, rater) | {"guideline": visible(engine.guideline)})

    async def vote(request: Request, rater: str) -> Response:
        said = await _body(request)
        told = {name: said.get(name) for name in ("strength", "seconds")}
        engine.vote(rater, said.get("number", -1), said.get("key", ""), said.get("vote"), **told)
        return JSONResponse(state_of(engine, rater))

    async def undo(request: Request, rater: str) -> Response:
        said = await _body(request)
        engine.undo(rater, said.get("number", -1), said.get("key", ""))
        return JSONResponse(state_of(engine, rater))

    async def nothing(request: Request, rater: str) -> Response:
        raise _Refused(404, "not found")

    def guarded(answer: _Answer) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            try:
                response = await answer(request, _rater(request, tokens, port))
            except _Refused as refused:
                response = PlainTextResponse(f"{refused}\n", refused.status)
            except BadVote as bad:
                response = JSONResponse({"error": str(bad)}, 409 if bad.is_late else 400)
            response.headers.update(_HEADERS)
            return response

        return handle

    return Starlette(
        routes=[
            Route("/", guarded(index), methods=["GET"]),
            Route("/state", guarded(state), methods=["GET"]),
            Route("/vote", guarded(vote), methods=["POST"]),
            Route("/undo", guarded(undo), methods=["POST"]),
            Route("/{path:path}", guarded(nothing), methods=["GET", "POST"]),
        ]
    )


def _rater(request: Request, tokens: Mapping[str, str], port: int) -> str:
    """Who asks; refuses whoever may not."""
    peer = request.client.host if request.client else ""
    try:
        is_local = ipaddress.ip_address(peer).is_loopback
    except ValueError:
        is_local = False
    if not is_local:
        raise _Refused(403, "only from this machine")
    hosts = [f"{host}:{port}" for host in _HOSTS]
    if request.headers.get("host") not in hosts:
        raise _Refused(403, "another host")
    origin = request.headers.get("origin")
    if origin is not None and origin not in [f"http://{host}" for host in hosts]:
        raise _Refused(403, "another origin")
    given = request.headers.get("x-token") or (request.query_params.get("token") if request.url.path == "/" else None)
    for token, rater in tokens.items():
        if given and hmac.compare_digest(given.encode(), token.encode()):
            return rater
    raise _Refused(403, "no valid token: open the address that dpo-cli label printed")


async def _body(request: Request) -> dict[str, Any]:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise _Refused(415, "JSON is expected")
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > _LARGEST:
            raise _Refused(413, "too long")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _Refused(400, "an object is expected")
    return found


def _page() -> tuple[str, str]:
    """The page, and the policy that lets nothing run or load but what is in it."""
    folder = resources.files("dpo_cli.labeling").joinpath("page")
    theme = page_environment().get_template("theme.css.jinja").render()
    style = theme + folder.joinpath("label.css").read_text(encoding="utf-8")
    keys = {mode: {each.key: each._asdict() for each in keys} for mode, keys in KEYS.items()}
    told = {
        "KEYS": keys,
        "HELP": {mode: help_of(mode) for mode in KEYS},
        "STRENGTHS": STRENGTHS,
        "NOT_RANKED": NOT_RANKED,
    }
    script = '"use strict";\n' + "".join(f"const {name} = {json.dumps(value)};\n" for name, value in told.items())
    script += "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in ("markdown.js", "label.js"))
    template = Environment(autoescape=False, undefined=StrictUndefined).from_string(  # holds nothing but our own files
        folder.joinpath("label.html.jinja").read_text(encoding="utf-8")
    )
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
        " require-trusted-types-for 'script'"
    )
    return template.render(style=style, script=script, note=NOTE), policy


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def open_socket(port: int) -> socket.socket:
    """A socket on loopback; port 0: any that is free.

    Raises:
        MachineError: The port is taken.
    """
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((LOOPBACK, port))
        found.listen()  # who comes before the server is ready waits for it
    except OSError as error:
        found.close()
        raise MachineError(
            f"port {port} cannot be had ({error.strerror}); name another one: --port 0 takes any"
        ) from None
    return found


def serve(app: Starlette, listening: socket.socket) -> None:
    """Answer until Ctrl-C or SIGTERM."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_PATIENCE_S,
    )
    uvicorn.Server(config).run(sockets=[listening])
