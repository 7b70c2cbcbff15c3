"""HTTP with an OpenAI-compatible server on this machine, or on a host that the user allows by name.

No proxy is asked and no redirection followed: what is judged goes to the host of the URL or nowhere.
"""

from __future__ import annotations

import ipaddress
import json
import time
from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import urlsplit

import httpx2

from dpo_cli.core.errors import MachineError, ParamsError

_TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}
_LONGEST_PAUSE_S = 30.0


class RefusedError(MachineError):
    """The server does not take a request as it is, and says so with an HTTP status."""

    def __init__(self, problem: str, status: int) -> None:
        super().__init__(problem)
        self.status = status


class Server:
    """A server's address and how patiently it is asked; may be used by several threads at once.

    Args:
        url: Such as ``http://127.0.0.1:8080`` or ``http://127.0.0.1:8080/v1``.
        allowed_hosts: Hosts that may be talked to besides this machine.
        api_key: Sent as a bearer token; empty: none.
        timeout_s: Seconds to wait for an answer.
        num_tries: How often a request is sent before the server counts as gone.
        backoff_s: Pause before the second try, seconds; it doubles from try to try.
        sleep: Waits.

    Raises:
        ParamsError: The URL is none, or its host is not allowed.
    """

    def __init__(
        self,
        url: str,
        *,
        allowed_hosts: Collection[str] = (),
        api_key: str = "",
        timeout_s: float = 120.0,
        num_tries: int = 5,
        backoff_s: float = 0.5,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = _checked_url(url, allowed_hosts)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self._timeout_s = timeout_s
        self._num_tries = num_tries
        self._backoff_s = backoff_s
        self._sleep = sleep
        self._client = httpx2.Client(headers=headers, timeout=timeout_s, trust_env=False, follow_redirects=False)

    @property
    def is_private(self) -> bool:
        """Whether what is sent cannot be read on its way: it stays on this machine, or is encrypted."""
        parts = urlsplit(self.url)
        return parts.scheme == "https" or is_loopback(parts.hostname or "")

    def get(self, path: str) -> Any:
        """The JSON of a path below the URL.

        Raises:
            MachineError: See :meth:`post`.
        """
        return self._ask("GET", path, None)

    def post(self, path: str, body: Any) -> Any:
        """The JSON that answers a JSON body.

        Raises:
            RefusedError: The server does not take it (an HTTP status that another try would not change).
            MachineError: It does not answer, or not with JSON, however often it is asked.
        """
        return self._ask("POST", path, json.dumps(body).encode())

    def _ask(self, method: str, path: str, data: bytes | None) -> Any:
        problem, pause = "", self._backoff_s
        for number in range(self._num_tries):
            if number:
                self._sleep(min(pause, _LONGEST_PAUSE_S))
                pause *= 2
            try:
                response = self._client.request(method, f"{self.url}{path}", content=data)
                if response.is_success:
                    return response.json()
            except httpx2.TimeoutException:
                problem = f"no answer within {self._timeout_s:g} s"
            except httpx2.HTTPError as error:
                problem = str(error) or type(error).__name__
            except ValueError:
                problem = "its answer is not JSON"
            else:
                problem = f"status {response.status_code}, {_explained(response)}"
                if response.status_code not in _TRANSIENT:
                    raise RefusedError(f"{self.url}{path} refuses the request: {problem}", response.status_code)
        raise MachineError(
            f"the judge's server {self.url} does not answer ({problem}; tried {self._num_tries} times);"
            " what it has judged is kept: start it and run this again"
        )


def _explained(response: httpx2.Response) -> str:
    """What a server says of its error, one line."""
    text = response.text
    try:
        found = response.json()
        found = found.get("error", found.get("message", found.get("detail", text)))
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        pass
    return next(iter((text.strip() or response.reason_phrase).splitlines()), "without a word")[:200]


def _checked_url(url: str, allowed_hosts: Collection[str]) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urlsplit("")
    if parts.scheme not in ("http", "https") or not host or parts.username or parts.query or parts.fragment:
        raise ParamsError(f"the judge's url must be like http://127.0.0.1:8080/v1, got {url!r}")
    if not is_loopback(host) and host not in {name.lower() for name in allowed_hosts}:
        raise ParamsError(
            f"the judge's url must be of this machine (127.0.0.1), got {host}: prompts and answers would leave it;"
            f" if they may, put {host} into allowed_hosts"
        )
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def is_loopback(host: str) -> bool:
    """Whether a host is this machine for certain: ``localhost`` or an address of the loopback network."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
