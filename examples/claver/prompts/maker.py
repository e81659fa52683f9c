"""Makes a prompt file for any classes with a language model: class by class, checked, resumable, several at a time."""

from __future__ import annotations

import datetime
import hashlib
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..class_names import class_key
from .build import KINDS, SENTENCES_PER_KIND, load_tokenizer
from .files import form_faults, read_prompt_file, write_prompt_file
from .models import BusyError, ModelError, Reply, TextModel, has_key
from .request import PROMPT_VERSION, ReplyError, Request, check_class_names, read_reply, rivals_of, sentence_key, taken

__all__ = ["Made", "MakerSettings", "make_prompts"]

LONGEST_WAIT = 600.0  # seconds that a server may ask for


@dataclass(frozen=True)
class MakerSettings:
    """How prompts are made. Temperature and top-p are the paper's; prices are for a million tokens.

    Attributes:
        attempts: replies for a class until it is given up.
        patience: times that a request is sent again when the model does not answer; then the run stops.
        backoff: seconds before the first of these, doubled for each, where the model does not say.
    """

    kinds: tuple[str, ...] = KINDS
    per_kind: int = SENTENCES_PER_KIND
    temperature: float = 0.9
    top_p: float = 0.95
    seed: int = 0
    max_tokens: int = 2048
    concurrency: int = 4
    attempts: int = 5
    patience: int = 6
    backoff: float = 1.0
    price_in: float | None = None
    price_out: float | None = None

    def __post_init__(self) -> None:
        if not self.kinds or len(set(self.kinds)) < len(self.kinds) or set(self.kinds) - set(KINDS):
            raise ValueError(f"kinds must be some of {', '.join(KINDS)}, each once, not {', '.join(self.kinds)}")
        for name in ("per_kind", "max_tokens", "concurrency", "attempts", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.temperature <= 2 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature is 0 to 2 and top-p above 0 to 1, not {self.temperature} and {self.top_p}")


@dataclass
class Made:
    """What a run did: how many classes it made and found made, and why others failed."""

    made: int = 0
    found: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    usage: dict[str, float] = field(default_factory=dict)


class _StoppedError(RuntimeError):
    """The run ends; what is under way is given up."""


class _Run:
    """What the threads of a run share: the file, the tokens used, and when the model may be asked again."""

    def __init__(self, classes: Sequence[str], out: Path, model: TextModel, settings: MakerSettings) -> None:
        self.classes, self.out, self.model, self.settings = list(classes), out, model, settings
        self.encoder = load_tokenizer()
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.failure: ModelError | None = None  # why the run ends early
        self.ask_from = 0.0  # time.monotonic
        self.entries: dict[str, Any] = {}
        self.usage: dict[str, float] = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
        self.asked_before = 0  # requests of earlier runs
        self.header: dict[str, Any] = {
            "about": f"Interpretive prompts for {len(classes)} classes, made by a language model and not reviewed.",
            "kinds": list(settings.kinds),
            "per_kind": settings.per_kind,
            "made": {
                **model.made_by,
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "seed": settings.seed,
                "prompt_version": PROMPT_VERSION,
                "date": datetime.date.today().isoformat(),
            },
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            self._continue()
        self.used = {sentence_key(text) for entry in self.entries.values() for kind in entry.values() for text in kind}

    def _continue(self) -> None:
        """Takes over what an earlier run wrote. Raises ValueError if that was made otherwise."""
        file = read_prompt_file(self.out)
        there = file.header.get("made")
        if not isinstance(there, dict):
            raise ValueError(f"{self.out} is there already and was not made by this command; choose another --out")
        ours, theirs = {**self.header["made"], **self.header}, {**there, **file.header}
        different = [
            f"{key} = {theirs.get(key)!r} there, {ours.get(key)!r} here"
            for key in ("model", "endpoint", "temperature", "top_p", "seed", "prompt_version", "kinds", "per_kind")
            if theirs.get(key) != ours.get(key)
        ]
        if different:
            raise ValueError(f"{self.out} was made with other settings ({'; '.join(different)}); choose another --out")
        wanted = {class_key(name): name for name in self.classes}
        for name, entry in file.entries.items():
            if class_key(name) not in wanted:
                raise ValueError(f"{self.out} has the class {name!r}, which is not in the list; choose another --out")
            if not form_faults(name, entry, self.settings.kinds):
                self.entries[wanted[class_key(name)]] = entry
        self.usage.update(there.get("usage", {}))
        self.asked_before = int(self.usage["requests"])
        self.header = file.header | {"made": self.header["made"]}  # what people wrote into it stays

    def count(self, reply: Reply) -> None:
        settings = self.settings
        with self.lock:
            self.usage["requests"] += 1
            self.usage["prompt_tokens"] += reply.prompt_tokens
            self.usage["completion_tokens"] += reply.completion_tokens
            if settings.price_in is not None or settings.price_out is not None:
                cost = reply.prompt_tokens * (settings.price_in or 0) + reply.completion_tokens * (
                    settings.price_out or 0
                )
                self.usage["cost"] = round(self.usage.get("cost", 0) + cost / 1e6, 6)

    def keep(self, name: str, entry: dict[str, list[str]]) -> bool:
        """Writes a class into the file, unless another thread has just used one of its sentences."""
        keys = {sentence_key(text) for kind in entry.values() for text in kind}
        with self.lock:
            if keys & self.used:
                return False
            self.used |= keys
            self.entries[name] = {kind: entry[kind] for kind in self.settings.kinds}
            self.write()
        return True

    def write(self) -> None:
        self.header["made"] |= self.model.made_by | {"usage": dict(self.usage)}
        write_prompt_file(
            self.out, self.header, {name: self.entries[name] for name in self.classes if name in self.entries}
        )

    def ask(self, messages: list[dict[str, str]], *, seed: int, max_tokens: int) -> Reply:
        """A reply, with patience. Raises _StoppedError if there is none, or if the run has ended meanwhile."""
        settings = self.settings
        for trial in range(settings.patience + 1):
            while (left := self.ask_from - time.monotonic()) > 0 and not self.stop.wait(left):
                pass
            if self.stop.is_set():
                raise _StoppedError
            try:
                reply = self.model.ask(
                    messages,
                    seed=seed,
                    max_tokens=max_tokens,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                )
            except ModelError as error:
                raise self.give_up(error) from None
            except BusyError as error:
                if trial == settings.patience:
                    raise self.give_up(ModelError(f"no answer after {trial + 1} requests, the last: {error}")) from None
                pause = settings.backoff * 2**trial if error.after is None else min(error.after, LONGEST_WAIT)
                with self.lock:  # for all: the server is the same
                    self.ask_from = max(self.ask_from, time.monotonic() + pause)
            else:
                self.count(reply)
                return reply
        raise AssertionError("the last trial returns or gives up")

    def give_up(self, error: ModelError) -> _StoppedError:
        """Ends the run for all threads."""
        with self.lock:
            self.failure = self.failure or error
        self.stop.set()
        return _StoppedError()


def make_prompts(
    classes: Sequence[str],
    out: str | Path,
    model: TextModel,
    settings: MakerSettings | None = None,
    *,
    progress: bool = True,
) -> Made:
    """Makes the sentences of all classes that `out` does not have yet; the file is whole after every class.

    Returns:
        What was made; a class whose replies were all wrong is in `failed`, and the next run tries it again.

    Raises:
        ValueError: names that are no names or occur twice, a file that was made otherwise, or a model that does not
            answer (ModelError); what was made before is in the file.
    """
    settings = settings or MakerSettings()
    check_class_names(classes)
    if len({class_key(name) for name in classes}) < len(classes):
        raise ValueError("two classes have the same name but for its spelling")
    run = _Run(classes, Path(out), model, settings)
    made = Made(found=len(run.entries), usage=run.usage)
    missing = [name for name in classes if name not in run.entries]
    if missing:
        run.write()  # a place where nothing can be written is found before anything is asked
    bar = tqdm(total=len(classes), initial=made.found, desc="making prompts", unit="class", disable=not progress)
    pool = ThreadPoolExecutor(settings.concurrency if model.concurrent else 1)
    futures: dict[Future[str], str] = {}
    try:
        futures = {pool.submit(_make_class, run, name): name for name in missing}
        left = set(futures)
        while left:
            done, left = wait(left, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                failure = future.result()
                if failure:
                    made.failed[futures[future]] = failure
                    bar.write(f"{futures[future]}: {failure}")
                else:
                    made.made += 1
                    bar.update()
            bar.set_postfix(
                {key: f"{value:g}" if key != "cost" else f"{value:.4f}" for key, value in run.usage.items()}
            )
    except _StoppedError:
        raise ModelError(
            f"{run.failure}\n{len(run.entries)} of {len(classes)} classes are in {out}; "
            "the same command goes on from there"
        ) from None
    finally:
        run.stop.set()
        pool.shutdown(cancel_futures=True)
        bar.close()
        if futures:
            with run.lock:
                run.write()
    return made


def _make_class(run: _Run, name: str) -> str:
    """Makes one class and keeps it; returns why it failed, or nothing."""
    settings = run.settings
    request = Request(name, rivals_of(name, run.classes), settings.kinds, settings.per_kind)
    others = [other for other in run.classes if other != name]
    good: dict[str, list[str]] = {}
    before: tuple[str, Sequence[str]] | None = None
    faults: list[str] = []
    max_tokens = settings.max_tokens
    for attempt in range(settings.attempts):
        pending = [kind for kind in settings.kinds if kind not in good]
        draw = f"{settings.seed}/{run.asked_before + attempt}/{name}"  # another one when a later run asks again
        seed = int.from_bytes(hashlib.sha256(draw.encode()).digest()[:4], "big") >> 1
        reply = run.ask(request.messages(pending, before), seed=seed, max_tokens=max_tokens)
        before = None
        if reply.refused:
            faults = ["the model refuses"]
            continue
        try:
            content = read_reply(reply.text)
        except ReplyError as error:
            if reply.cut_off:
                faults = [f"the reply was cut off at {max_tokens} tokens"]
                max_tokens = min(2 * max_tokens, 4 * settings.max_tokens)
            else:
                faults = [str(error)]
                if "{" in reply.text and not has_key(reply.text):  # prose is best asked again from the start
                    before = (reply.text.encode(errors="replace").decode(), faults)
            continue
        if has_key(reply.text) or has_key(json.dumps(content, ensure_ascii=False)):  # never kept, sent back or shown
            faults = ["the reply has the key in it"]
            continue
        found, faults = taken(content, request, pending, good, run.encoder, others, run.used)
        good |= found
        if len(good) == len(settings.kinds):
            if run.keep(name, good):
                return ""
            good, faults = {}, ["a sentence was used for another class at the same time"]
            continue
        before = (reply.text, faults[:20])
    return f"given up after {settings.attempts} replies, the last fault: {faults[0] if faults else 'none'}"
