"""A server on this machine that speaks OpenAI's chat completions and answers as a test tells it to."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

from claver.prompts.build import KINDS

Answer = dict[str, Any]


def made_up_sentence(name: str, kind: str, number: int, words: int = 7) -> str:
    """A sentence of words that no other sentence has."""
    draw = Random(f"{name}/{kind}/{number}")
    made_up = ("".join(draw.choice("bdfgklmnprtv") + draw.choice("aou") for _ in range(4)) for _ in range(words))
    return " ".join(made_up).capitalize() + "."


def entry_for(name: str, kinds: tuple[str, ...] = KINDS, per_kind: int = 5) -> dict[str, list[str]]:
    return {kind: [made_up_sentence(name, kind, i) for i in range(per_kind)] for kind in kinds}


def asked(request: dict[str, Any]) -> tuple[str, list[str]]:
    """The class that a request is about, and the kinds that are wanted."""
    questions = [json.loads(m["content"]) for m in request["messages"] if m["role"] == "user"]
    name = [question["action"] for question in questions if "action" in question][-1]
    return name, questions[-1]["kinds"]


def good(request: dict[str, Any]) -> Answer:
    """Fitting sentences of the kinds that are wanted."""
    name, kinds = asked(request)
    return says(json.dumps(entry_for(name, tuple(kinds))))


def says(text: str | None, finish: str = "stop", **message: Any) -> Answer:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return {"status": 200, "body": body}


def fails(status: int, message: str = "no", headers: dict[str, str] | None = None, code: str | None = None) -> Answer:
    return {"status": status, "body": {"error": {"message": message, "code": code}}, "headers": headers or {}}


def first(
    answer: Answer | Callable[[dict[str, Any]], Answer], then: Callable[[dict[str, Any]], Answer] = good, times: int = 1
) -> Callable[[dict[str, Any]], Answer]:
    """Answers the first requests of each class in one way and the others in another."""
    seen: Counter[str] = Counter()

    def both(request: dict[str, Any]) -> Answer:
        name = asked(request)[0]
        seen[name] += 1
        return (answer(request) if callable(answer) else answer) if seen[name] <= times else then(request)

    return both


class ChatServer:
    """Answers each request by `answer(request)`; used as a context manager.

    Attributes:
        requests: what was asked, in order.
        keys: the `Authorization` headers.
        times: when each request came, in seconds of `time.monotonic`.
        most: how many requests there were at a time.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Answer] = good, seconds: float = 0.0, port: int = 0) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.most = self.now = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append(request)
                    outer.keys.append(self.headers.get("Authorization"))
                    outer.times.append(time.monotonic())
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                time.sleep(seconds)
                given = answer(request) if self.path.endswith("/chat/completions") else fails(404)
                time.sleep(given.get("seconds", 0.0))
                with outer.lock:
                    outer.now -= 1
                raw = given.get("raw")
                body = json.dumps(given["body"]).encode() if raw is None else raw
                try:
                    self.send_response(given["status"])
                    for name, value in given.get("headers", {}).items():
                        self.send_header(name, value)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:  # whoever asked did not wait
                    pass

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def names(self) -> list[str]:
        return [asked(request)[0] for request in self.requests]
