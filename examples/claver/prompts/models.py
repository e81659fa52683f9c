"""Language models that write prompts: behind an endpoint with OpenAI's interface, or a local Hugging Face model."""

from __future__ import annotations

import email.utils
import importlib.metadata
import os
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import torch

__all__ = ["BusyError", "Endpoint", "ModelError", "Reply", "TextModel", "has_key", "local_model"]

KEY = "OPENAI_API_KEY"
LONGEST = 20_000  # characters of a text from outside


class Reply(NamedTuple):
    """What a model says, and what it took."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    cut_off: bool = False  # it reached the limit of tokens
    refused: bool = False


class ModelError(ValueError):
    """The model cannot be asked at all: a wrong key, an unknown model, a request that it does not take."""


class BusyError(RuntimeError):
    """The model does not answer now; `after` says for how many seconds it asks to be left alone, if it does."""

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class TextModel(Protocol):
    """What the maker of prompts needs of a model.

    Attributes:
        made_by: what is recorded of it: `model`, `endpoint` or `path`, `versions`.
        concurrent: whether several threads may ask at once.
    """

    made_by: dict[str, Any]
    concurrent: bool

    def ask(
        self, messages: list[dict[str, str]], *, seed: int, max_tokens: int, temperature: float, top_p: float
    ) -> Reply:
        """Raises BusyError if it is worth to ask again later, else ModelError."""
        ...


class Endpoint:
    """A model behind any endpoint that speaks OpenAI's chat completions: hosted, vLLM, Ollama, llama.cpp.

    The key is that of the environment variable OPENAI_API_KEY. It is sent to the endpoint and nowhere else: what an
    error says is cleaned of it, and it is not kept in this object.

    Raises:
        ImportError: the openai client is missing.
        ModelError: no key for OpenAI's own endpoint, or credentials in the address.
    """

    concurrent = True

    def __init__(self, model: str, base_url: str | None = None, timeout: float = 120.0) -> None:
        try:
            import openai
        except ImportError as error:
            raise ImportError("the openai client is missing: pip install 'kronmask[prompts]'") from error
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        if base_url:
            _server(base_url)
        if not base_url and not os.environ.get(KEY):
            raise ModelError(f"no key in the environment variable {KEY}; a local server needs none, but --base-url")
        self._openai = openai
        self._client = openai.OpenAI(
            base_url=base_url, api_key=os.environ.get(KEY) or "none", timeout=timeout, max_retries=0
        )
        self._model = model
        self._left_out: set[str] = set()  # what the endpoint does not know
        self.made_by = {
            "model": model,
            "endpoint": _server(str(self._client.base_url)),
            "versions": {"openai": importlib.metadata.version("openai")},
        }

    def ask(
        self, messages: list[dict[str, str]], *, seed: int, max_tokens: int, temperature: float, top_p: float
    ) -> Reply:
        """One reply; see `TextModel.ask`. JSON mode and seed, which only help, are left out where unknown."""
        settings: dict[str, Any] = {
            "model": self._model,
            "messages": messages,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "response_format": {"type": "json_object"},
        }
        limit = "max_completion_tokens" if "max_tokens" in self._left_out else "max_tokens"
        settings = {key: value for key, value in settings.items() if key not in self._left_out} | {limit: max_tokens}
        openai = self._openai
        try:
            completion = self._client.chat.completions.create(**settings)
        except openai.APITimeoutError:
            raise BusyError("no answer in time") from None
        except openai.APIConnectionError as error:
            raise BusyError(_clean(f"no connection: {error.__cause__ or error}")) from None
        except openai.BadRequestError as error:
            unknown = [
                key for key in ("response_format", "seed", "max_tokens") if key in str(error) and key in settings
            ]
            if not unknown:
                raise ModelError(_clean(f"the endpoint refuses the request: {error}")) from None
            self._left_out |= set(unknown)
            self.made_by["left_out"] = sorted(self._left_out)
            return self.ask(messages, seed=seed, max_tokens=max_tokens, temperature=temperature, top_p=top_p)
        except openai.APIStatusError as error:
            message = _clean(f"status {error.status_code}: {error}")
            lasting = error.status_code < 500 and error.status_code not in (408, 409, 425, 429)
            if lasting or getattr(error, "code", None) == "insufficient_quota":
                raise ModelError(message) from None
            raise BusyError(message, _retry_after(error.response.headers)) from None
        except (openai.OpenAIError, ValueError) as error:  # a body that is no completion
            raise BusyError(_clean(f"an answer that cannot be read: {error}")) from None
        return _reply(completion)


def _server(url: str) -> str:
    """`scheme://host:port` of an address. Raises ModelError, which does not show it: there may be a key in it."""
    try:
        address = urlsplit(url)
        port = address.port
    except ValueError:
        address, port = urlsplit(""), None
    if "@" in address.netloc or "?" in url or "#" in url:
        raise ModelError(f"the address has user, ? or # in it; credentials belong in the environment variable {KEY}")
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ModelError("--base-url must be an address such as http://localhost:8000/v1, and what is given is none")
    host = f"[{address.hostname}]" if ":" in address.hostname else address.hostname
    return f"{address.scheme}://{host}" + ("" if port is None else f":{port}")


def _reply(completion: Any) -> Reply:
    """What a completion holds; servers leave out what they like."""
    choices = getattr(completion, "choices", None)
    if not choices or getattr(choices[0], "message", None) is None:
        raise BusyError("an answer without a message")
    message, reason = choices[0].message, choices[0].finish_reason
    usage = getattr(completion, "usage", None)
    return Reply(
        (message.content or "")[:LONGEST],
        getattr(usage, "prompt_tokens", 0) or 0,
        getattr(usage, "completion_tokens", 0) or 0,
        cut_off=reason == "length",
        refused=bool(getattr(message, "refusal", None)) or reason == "content_filter",
    )


def _clean(text: str) -> str:
    """A text from outside without the key, which a server may have sent back, and not longer than is worth reading."""
    key = os.environ.get(KEY)
    return (text.replace(key, "***") if key else text)[:LONGEST]


def has_key(text: str) -> bool:
    """Whether a text holds the key; one of fewer than 16 characters may be a word of the language, and is none."""
    key = os.environ.get(KEY, "")
    return len(key) >= 16 and key in text


def _retry_after(headers: Any) -> float | None:
    """Seconds of the headers `Retry-After-Ms` or `Retry-After`, which has seconds or a date."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            return max(0.0, float(value) * scale)
        except ValueError:
            pass
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            continue
    return None


class _LocalModel:
    """A causal language model of transformers; one thread at a time."""

    concurrent = False

    def __init__(self, model: Any, tokenizer: Any, path: Path) -> None:
        self._model, self._tokenizer, self._lock = model, tokenizer, threading.Lock()
        versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
        self.made_by = {"model": path.resolve().name, "endpoint": "local", "versions": versions}

    @torch.no_grad()
    def ask(
        self, messages: list[dict[str, str]], *, seed: int, max_tokens: int, temperature: float, top_p: float
    ) -> Reply:
        tokenizer, model = self._tokenizer, self._model
        if getattr(tokenizer, "chat_template", None):
            text = _chat_text(tokenizer, messages)
        else:
            text = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages) + "\n\nassistant: "
        tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)  # (1, L)
        context = getattr(model.config, "max_position_embeddings", None)
        room = max_tokens if context is None else min(max_tokens, context - tokens.shape[1])
        if room < 1:
            raise ModelError(f"the request has {tokens.shape[1]} tokens, the model takes {context}")
        with self._lock, torch.random.fork_rng():
            torch.manual_seed(seed)
            output = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=temperature > 0,
                temperature=temperature or None,
                top_p=top_p,
                top_k=0,
                max_new_tokens=room,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )[0, tokens.shape[1] :]
        ended = len(output) < room or int(output[-1]) == tokenizer.eos_token_id
        return Reply(
            tokenizer.decode(output, skip_special_tokens=True), tokens.shape[1], len(output), cut_off=not ended
        )


def _chat_text(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The messages by the chat template; where that has no system role, the system's go into the first of the user."""
    from jinja2 import TemplateError

    (system, user), *others = messages[:2], *messages[2:]
    joined = [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *others]
    for each in (messages, joined):
        try:
            return str(tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            reason = error
    raise ModelError(f"the chat template of the model does not take the messages: {reason}")


def local_model(path: str | Path) -> TextModel:
    """A Hugging Face model from a folder; nothing is downloaded and no code of the folder is run.

    Raises:
        ImportError: transformers is missing.
        ModelError: there is no such folder, or no model in it.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError("a local model needs transformers: pip install 'kronmask[prompts]'") from error
    path = Path(path)
    if not path.is_dir():
        raise ModelError(f"--local takes the folder of a model, and {path} is none")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: no model that transformers can read: {error}") from None
    return _LocalModel(model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer, path)
