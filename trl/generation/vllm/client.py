"""The engine behind servers of vLLM: tokens in, tokens out over HTTP, and weights by the routes for training."""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np

from trl.data.records import Completion, VersionSpan
from trl.generation.vllm.engine import About, EngineError, Request, Settings
from trl.generation.vllm.pictures import as_parts, check_read
from trl.import_utils import is_installed, pip_install

logger = logging.getLogger(__name__)
Read = TypeVar("Read")
_TRIES = 3
"""how often a server is asked that gives no answer or a wrong one; one that is away is waited for"""
_GONE = 5.0
"""seconds in which a server that was waited for in vain is asked once: what is tidied up then does not wait anew"""
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SENTINEL = -9999.0
"""what vLLM's servers send for a log-probability that is not finite"""


class ServerEngine:
    """One server of vLLM, or several that serve the same model; all take the same weights.

    Requests are dealt to the servers by their place in the list: the first to the first, and so on in turn. All that
    is asked may be asked twice, and is where a server was away, slow, or answered in half.

    urls: such as "http://127.0.0.1:8000", or several in a list or with commas. wait: seconds to wait for a server that
    is away. timeout: seconds for one answer. at_once: requests in flight to each server. api_key: of `--api-key`.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        wait: float = 240.0,
        timeout: float = 1200.0,
        at_once: int = 64,
        api_key: str | None = None,
    ) -> None:
        self.urls = server_urls(urls)
        self.wait, self.timeout, self.at_once, self.api_key = wait, timeout, at_once, api_key
        self._http = _client(self.urls, timeout, at_once, api_key)
        weakref.finalize(self, self._http.close)
        self._settings: Settings | None = None
        self._said: set[str] = set()
        """servers that are being waited for"""
        self._given_up: dict[str, float] = {}
        """when a server was last waited for in vain"""
        self._lock = threading.Lock()

    # -- what an engine does -----------------------------------------------------------------------

    def about(self) -> About:
        """Who answers; EngineError where servers differ."""
        found = self._each(self._about)
        for url, one in zip(self.urls, found, strict=True):
            if (one.release, one.model, one.max_model_len) != (
                found[0].release, found[0].model, found[0].max_model_len
            ):  # fmt: skip
                raise EngineError(
                    f"the vLLM servers differ: {self.urls[0]} serves {found[0].model} by {found[0].release}, {url} "
                    f"{one.model} by {one.release}; start them alike"
                )
        shared = [name for name in found[0].adapters if all(name in one.adapters for one in found)]
        return About(found[0].release, found[0].model, found[0].max_model_len, tuple(shared))

    def settings(self) -> Settings:
        """How the servers were started; what one does not say is not known."""
        if self._settings is None:
            self._settings = self._asked_settings()
        return self._settings

    def _asked_settings(self) -> Settings:
        try:
            found = self._each(lambda url: self._ask(url, "/server_info?config_format=json", read=_settings))
        except EngineError as error:
            if isinstance(error.__cause__, _Away):
                raise  # it was waited for, and is not waited for again
            return Settings()
        ranks = [one.max_lora_rank for one in found]
        return Settings(
            found[0].dtype if len({one.dtype for one in found}) == 1 else None,
            None if None in ranks else min(rank for rank in ranks if rank is not None),
            tuple(number for one in found for number in one.workers),
        )

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """The completions of each request, in their order, whatever order they arrive in."""

        def ask(place: int) -> list[Completion]:
            request = requests[place]
            body: dict[str, Any] = {"token_ids": list(map(int, request.prompt)), "sampling_params": request.params}
            if request.adapter is not None:
                body["model"] = request.adapter
            if request.pictures:
                body |= {"content_parts": as_parts(request.pictures), "return_token_ids": True}
            return self._ask(
                self._url(place), "/inference/v1/generate", body, lambda answer: _completions(answer, request)
            )

        return self._together(ask, len(requests))

    def prompt_logprobs(self, rows: Sequence[Sequence[int]], top: int = 0, adapter: str | None = None) -> list[Any]:
        """For each row and token but the first: `{token id: log-probability}` of the token, and of the `top` best."""

        def ask(place: int) -> list[dict[int, float]]:
            row = list(map(int, rows[place]))
            params = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": top, "detokenize": False}
            body: dict[str, Any] = {"token_ids": row, "sampling_params": params}
            if adapter is not None:
                body["model"] = adapter
            return self._ask(self._url(place), "/inference/v1/generate", body, lambda answer: _scores(answer, row))

        return self._together(ask, len(rows))

    def tokenized(self, text: str) -> list[int] | None:
        """The text as tokens of the server's own tokenizer, without special ones; None where it has none."""
        try:
            answer = self._ask(self.urls[0], "/tokenize", {"prompt": text, "add_special_tokens": False})
        except EngineError:
            return None
        return list(answer["tokens"]) if isinstance(answer, dict) and "tokens" in answer else None

    def pause(self, *, clear_cache: bool = True, mode: str = "wait") -> None:
        query = f"?mode={mode}&clear_cache={'true' if clear_cache else 'false'}"
        self._each(lambda url: self._ask(url, "/pause" + query, {}))

    def resume(self) -> None:
        self._each(lambda url: self._ask(url, "/resume", {}))

    def load_adapter(self, name: str, folder: str) -> None:
        """Load an adapter, in the place of one of the same name; the folder must be there for the servers too.

        It is unloaded first: what is loaded in place is read from its folder again later, and a server ends whose
        adapter's folder is gone then.
        """

        def load(url: str) -> None:
            if name in self._about(url).adapters:
                self._ask_once(url, "/v1/unload_lora_adapter", {"lora_name": name}, "cannot be found")
            body = {"lora_name": name, "lora_path": str(folder)}
            self._ask_once(url, "/v1/load_lora_adapter", body, "already been loaded")

        self._each(load)

    def _ask_once(self, url: str, path: str, body: Any, done: str) -> None:
        """Ask for what is refused the second time, `done` says why: the first answer may have been lost."""
        try:
            self._ask(url, path, body)
        except EngineError as error:
            if done not in str(error):
                raise

    def reload_weights(self, folder: str) -> None:
        """Replace the weights by those of a folder, which must be there for the servers too; caches are emptied."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._each(lambda url: self._ask(url, "/collective_rpc", body))
        self.reset_cache()

    def reset_cache(self) -> None:
        """Forget keys and values of prompts that other weights computed."""
        self._each(lambda url: self._ask(url, "/reset_prefix_cache", {}))

    def set_version(self, version: str) -> None:
        self._each(lambda url: self._ask(url, "/update_weight_version", {"new_version": version}))

    def versions(self) -> list[str]:
        """The stamp of each server's weights; "default" until one was set."""
        return self._each(lambda url: self._ask(url, "/weight_info", read=lambda answer: str(answer["weight_version"])))

    def close(self) -> None:
        """Close the connections; the servers go on."""
        self._http.close()

    # -- HTTP --------------------------------------------------------------------------------------

    def _url(self, place: int) -> str:
        return self.urls[place % len(self.urls)]

    def _each(self, ask: Callable[[str], Read]) -> list[Read]:
        return [ask(url) for url in self.urls]

    def _together(self, ask: Callable[[int], Read], number: int) -> list[Read]:
        if number <= 1:
            return [ask(place) for place in range(number)]
        left, futures = deque(range(number)), [Future[Read]() for _ in range(number)]

        def work() -> None:
            while left:
                with suppress(IndexError):  # another thread was faster
                    place = left.popleft()
                    try:
                        futures[place].set_result(ask(place))
                    except BaseException as error:  # it is raised where the result is asked for
                        futures[place].set_exception(error)

        for _ in range(min(number, self.at_once * len(self.urls))):  # a pool's threads would be waited for at the exit
            threading.Thread(target=work, name="vllm", daemon=True).start()
        try:
            return [future.result() for future in futures]
        finally:  # Ctrl-C, or an error, waits for no answer
            left.clear()

    def _about(self, url: str) -> About:
        release = self._ask(url, "/version", read=lambda answer: str(answer["version"]))
        models = self._ask(url, "/v1/models", read=lambda answer: list(answer["data"]))
        base = next((model for model in models if not model.get("parent")), None)
        if base is None:
            raise EngineError(f"the server at {url} serves no model; start it with `trl vllm-serve --model ...`")
        adapters = tuple(model["id"] for model in models if model.get("parent"))
        return About(release, str(base.get("root") or base["id"]), base.get("max_model_len"), adapters)

    def _ask(self, url: str, path: str, body: Any = None, read: Callable[[Any], Read] = lambda answer: answer) -> Any:
        """What a server answers, as `read` reads it; EngineError after some tries, or some time where it is away."""
        from tenacity import Retrying, retry_if_exception_type, wait_random_exponential

        tries = Retrying(
            retry=retry_if_exception_type(_Again), stop=self._gives_up, before_sleep=self._say, reraise=True,
            wait=wait_random_exponential(multiplier=min(0.2, self.wait / 10), max=5.0),
        )  # fmt: skip
        try:
            answer = tries(self._once, url, path, body, read)
        except _Again as error:
            raise EngineError(error.said(self.wait)) from error
        self._said.discard(url)
        return answer

    def _gives_up(self, state: Any) -> bool:
        error, now = state.outcome.exception(), time.monotonic()
        if not isinstance(error, _Away):
            return bool(state.attempt_number >= _TRIES)
        over = state.seconds_since_start >= self.wait or now - self._given_up.get(error.url, -math.inf) < _GONE
        if over:
            self._given_up[error.url] = now
        return bool(over)

    def _say(self, state: Any) -> None:
        error = state.outcome.exception()
        if not isinstance(error, _Away):
            logger.warning("%s; asked again", error)
            return
        with self._lock:
            said = error.url in self._said
            self._said.add(error.url)
        if not said:
            logger.warning("%s; it is waited for, %g s at most", error, self.wait)

    def _once(self, url: str, path: str, body: Any, read: Callable[[Any], Read]) -> Read:
        import httpx2

        try:
            answer = self._http.request("GET" if body is None else "POST", url + path, json=body)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise _Away(url, f"does not answer ({error})") from error
        except httpx2.TimeoutException as error:
            raise _Slow(url, f"gave no answer to {path} within {self.timeout:g} s") from error
        except httpx2.TransportError as error:
            raise _Away(url, f"broke off in {path} ({error or type(error).__name__})") from error
        if answer.status_code >= 300:
            _refuse(url, path, answer.status_code, _message(answer.text))
        plain = not answer.text.strip() or "json" not in answer.headers.get("content-type", "")
        try:
            return read({} if plain else json.loads(answer.text))  # plain: it did so, and says it in words at most
        except _Half as error:
            raise _Wrong(url, f"answered {path} with {error}") from error
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise _Wrong(url, f"answered {path} with what is no whole answer ({_one_line(error)})") from error


def server_urls(urls: str | Sequence[str]) -> tuple[str, ...]:
    """The servers' addresses; ValueError for one that is none. A path at the end (`/v1`) is left out."""
    listed = urls.split(",") if isinstance(urls, str) else list(urls)
    found = []
    for each in (url.strip() for url in listed):
        parts = urlsplit(each if "://" in each else f"http://{each}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{each!r} is no server's address: give one such as 'http://127.0.0.1:8000'")
        # a server may listen at all addresses, but nobody can be reached there
        host = parts.netloc.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")
        found.append(f"{parts.scheme}://{host}{parts.path.rstrip('/').removesuffix('/v1')}")
    return tuple(dict.fromkeys(found))


def is_loopback(url: str) -> bool:
    """Whether what is sent there stays on this machine."""
    host = urlsplit(url).hostname or ""
    return host in _LOOPBACK or host.startswith("127.")


def require_client() -> None:
    """ImportError with the way out where a package is missing that asks a server."""
    missing = [name for name in ("httpx2", "tenacity") if not is_installed(name)]
    if missing:
        raise ImportError(f"a vLLM server is asked by {' and '.join(missing)}: {pip_install(*missing)}")


def _client(urls: Sequence[str], timeout: float, at_once: int, api_key: str | None) -> Any:
    require_client()
    import httpx2

    most = at_once * len(urls) + 4
    return httpx2.Client(
        timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0), pool=None),
        limits=httpx2.Limits(max_connections=most, max_keepalive_connections=most),
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        trust_env=not all(map(is_loopback, urls)),  # no proxy stands between a machine and itself
    )


def _settings(answer: Any) -> Settings:
    config = answer["vllm_config"]
    adapters, parallel = config.get("lora_config"), config["parallel_config"]
    workers = parallel["world_size"] * parallel.get("data_parallel_size", 1)
    return Settings(str(config["model_config"]["dtype"]), adapters["max_lora_rank"] if adapters else 0, (workers,))


# -- answers ---------------------------------------------------------------------------------------


def _completions(answer: Any, request: Request) -> list[Completion]:
    choices, copies = sorted(answer["choices"], key=lambda choice: choice["index"]), request.params.get("n", 1)
    check_read(request, answer.get("prompt_token_ids"))
    if [choice["index"] for choice in choices] != list(range(copies)):
        raise _Half(f"{len(choices)} completions for {copies}")
    return [_completion(choice) for choice in choices]


def _completion(choice: Any) -> Completion:
    ids, content = list(map(int, choice["token_ids"])), choice["logprobs"]["content"]
    reason, mask, experts = choice["finish_reason"], choice.get("sampling_mask"), choice.get("routed_experts")
    if reason not in ("stop", "length"):
        raise _Half(f"a completion that ended by {reason!r}, not by itself")
    if not ids:
        raise _Half("a completion without a token")
    if len(content) != len(ids) or [entry["token_id"] for entry in content] != ids:
        raise _Half(f"{len(content)} log-probabilities for {len(ids)} tokens")
    logprobs = [float(entry["logprob"]) for entry in content]
    if not all(math.isfinite(each) and each > _SENTINEL for each in logprobs):
        raise _Half("a log-probability that is not finite")
    if mask is not None and len(mask) != len(ids):
        raise _Half(f"{len(mask)} sampling masks for {len(ids)} tokens")
    spans = tuple(VersionSpan(str(s["version"]), s["start"], s["end"]) for s in choice.get("weight_versions") or ())
    if spans and [end for _, _, end in spans][-1] != len(ids):
        raise _Half(f"weight versions of {spans[-1].end} tokens for {len(ids)}")
    return Completion(ids, logprobs, logprobs, reason, spans, mask, None if experts is None else _array(experts))


def _array(text: str) -> np.ndarray:
    """Numbers that came as text: an `.npy` file in base64."""
    return np.load(io.BytesIO(base64.b64decode(text)))  # type: ignore[no-any-return]


def _scores(answer: Any, row: Sequence[int]) -> list[dict[int, float]]:
    entries = answer["prompt_logprobs"]
    if len(entries) != len(row):
        raise _Half(f"log-probabilities of {len(entries)} tokens for {len(row)}")
    scored = [{int(token): float(one["logprob"]) for token, one in entry.items()} for entry in entries[1:]]
    for token, entry in zip(row[1:], scored, strict=True):
        if token not in entry or not math.isfinite(entry[token]):
            raise _Half(f"no log-probability of the token {token}")
    return scored


# -- errors ----------------------------------------------------------------------------------------


class _Half(Exception):
    """An answer that is not whole."""


class _Again(Exception):
    """Something that may be asked again."""

    def __init__(self, url: str, what: str) -> None:
        super().__init__(f"the vLLM server at {url} {what}")
        self.url = url

    def said(self, wait: float) -> str:
        return f"{self}, {_TRIES} times; look at its log"


class _Away(_Again):
    def said(self, wait: float) -> str:
        return (
            f"{self}, for {wait:g} s: start it with `trl vllm-serve --model ...`, name another one by "
            "vllm_server_base_url, or sample without it by use_vllm=False"
        )


class _Slow(_Again):
    def said(self, wait: float) -> str:
        return f"{self}, {_TRIES} times: raise vllm_request_timeout, or ask for less at a time"


class _Wrong(_Again):
    pass


def _refuse(url: str, path: str, status: int, text: str) -> None:
    """Raise what a status means."""
    if "out of memory" in text.lower() or "outofmemory" in text.lower():
        raise EngineError(
            f"the vLLM server at {url} is out of memory ({text}): start it with a smaller --max-num-seqs, "
            "--max-model-len or --gpu-memory-utilization"
        )
    if status in (429, 502, 503, 504):
        raise _Away(url, f"answers with status {status}{': ' + text if text else ''}")
    if status >= 500:
        raise _Wrong(url, f"answered {path} with status {status}: {text}")
    if status in (401, 403):
        raise EngineError(f"the vLLM server at {url} asks for a key: give its --api-key in VLLM_API_KEY")
    if status in (404, 405) and ("not found" in text.lower() or not text or "not allowed" in text.lower()):
        raise EngineError(
            f"the server at {url} has no {path.partition('?')[0]}: start vLLM with `trl vllm-serve`, which opens the "
            "routes for training"
        )
    raise EngineError(f"the vLLM server at {url} refused {path.partition('?')[0]} (status {status}): {text}")


def _message(text: str) -> str:
    """What a server said of an error, on one line."""
    try:
        said = json.loads(text)
        inner = said.get("error", said.get("detail", said)) if isinstance(said, dict) else said
        text = str(inner.get("message", inner)) if isinstance(inner, dict) else str(inner)
    except ValueError:
        pass
    return _one_line(text)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:300]
