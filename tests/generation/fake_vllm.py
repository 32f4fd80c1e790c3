"""A small server that speaks vLLM's protocol on a tiny model of ours, with faults on order.

Recorded from vllm 0.32: the routes, the names in bodies and answers, and how they fail.

    with FakeVLLM(model) as server:
        server.faults.append(Fault("500", path="/inference"))
        ServerEngine(server.url)...
"""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import json
import random
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import torch
from safetensors.torch import load_file

from trl.data.pictures import Album, reader_of
from trl.generation import LocalSampler, SamplingParams


@dataclass
class Fault:
    """Something that goes wrong in the next `times` requests to a path that begins so, after `after` good ones.

    kinds: refuse (the connection is closed without an answer), slow (the answer comes after `seconds`), die (the server
    is gone in the midst of an answer and stays away), 404, 500, 503, oom, half (JSON that is cut off), short (a
    log-probability is missing), nan (one is none), missing (a completion is missing), abort, stranger (a token that no
    policy knows), restart (the weights are those of the start, and so is their version), stale (a sync answers
    success and leaves the weights), other-version (the completions bear this stamp: "other").
    """

    kind: str
    path: str = "/inference"
    times: int = 1
    after: int = 0
    seconds: float = 1.0


@dataclass
class FakeVLLM:
    """The server; a context. `first` are its weights at the start, and after each start anew."""

    first: Any
    tokenizer: Any = None
    release: str = "0.32.0"
    name: str = "folder/of/the/model"
    max_model_len: int | None = None
    tied_head_stays: bool = False
    """a reload answers success and leaves the head as it was, as vLLM does to models whose head is tied"""
    processed: bool = True
    """--logprobs-mode processed_logprobs; else the model's own at temperature 1"""
    masks: bool = False
    """--return-sampling-mask"""
    delays: random.Random | None = None
    """answers come after up to 20 ms, drawn from it"""
    api_key: str | None = None
    routes_for_training: bool = True
    dtype: str = "torch.float32"
    max_lora_rank: int = 16
    """0: started without --enable-lora"""
    says_prompt: bool = True
    """whether it says how it has read a prompt, where it is asked to; older releases do not"""
    faults: list[Fault] = field(default_factory=list)
    calls: list[tuple[str, Any]] = field(default_factory=list)
    """paths and bodies in the order in which they arrived"""

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.may_run = threading.Event()
        self.port = 0
        self._forget()

    # -- starting and ending -----------------------------------------------------------------------

    def __enter__(self) -> FakeVLLM:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, or start anew at the same port with the first weights."""
        fake = self

        class Handler(_Handler):
            server_of = fake

        self._forget()
        self.http = _Server(("127.0.0.1", self.port), Handler)
        self.port = self.http.server_address[1]
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Gone, as after `kill -9`: who connects is refused."""
        http, self.http = getattr(self, "http", None), None
        if http is not None:
            http.shutdown()
            http.server_close()
            for each in list(http.open):
                _cut(each)

    def begin_anew(self) -> FakeVLLM:
        """As it was at its start, whatever a test before has done to it."""
        if self.http is None:
            self.start()
        self._forget()
        self.faults.clear()
        self.calls.clear()
        self.delays = self.api_key = self.max_model_len = None
        self.processed = True
        return self

    def _forget(self) -> None:
        self.model = copy.deepcopy(self.first).eval().requires_grad_(False)
        self.adapters: dict[str, Any] = {}
        self.unloaded: Any = None
        self.version, self.paused = "default", False
        self.may_run.set()

    # -- what it does ------------------------------------------------------------------------------

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        """(status, what it says); None says nothing."""
        get = {
            "/version": lambda: {"version": self.release},
            "/v1/models": self._models,
            "/health": lambda: None,
            "/server_info": self._server_info,
            "/weight_info": lambda: {"weight_version": self.version},
            "/is_paused": lambda: {"is_paused": self.paused},
        }
        post = {
            "/inference/v1/generate": lambda: self._generate(body),
            "/tokenize": lambda: self._tokenize(body),
            "/pause": lambda: self._pause(query),
            "/resume": self._resume,
            "/collective_rpc": lambda: self._rpc(body),
            "/update_weight_version": lambda: self._stamp(body["new_version"]),
            "/reset_prefix_cache": lambda: None,
            "/v1/load_lora_adapter": lambda: self._load_adapter(body),
            "/v1/unload_lora_adapter": lambda: self._unload_adapter(body),
        }
        table = get if method == "GET" else post
        closed = path in TRAINING and not self.routes_for_training
        if path not in table or closed:
            return 404, {"detail": "Not Found"}
        try:
            return 200, table[path]()
        except _Refused as error:
            return error.status, {"error": {"message": str(error), "type": "BadRequestError", "code": error.status}}

    def _models(self) -> dict[str, Any]:
        base = {"id": self.name, "root": self.name, "parent": None, "max_model_len": self._longest()}
        adapters = [{"id": name, "root": name, "parent": self.name} for name in self.adapters]
        return {"object": "list", "data": [base, *adapters]}

    def _server_info(self) -> dict[str, Any]:
        adapters = {"max_lora_rank": self.max_lora_rank, "max_loras": 1} if self.max_lora_rank else None
        parallel = {"world_size": 1, "data_parallel_size": 1, "tensor_parallel_size": 1}
        config = {"model_config": {"dtype": self.dtype}, "lora_config": adapters, "parallel_config": parallel}
        return {"vllm_config": config, "vllm_env": {}, "system_env": {}}

    def _longest(self) -> int | None:
        return self.max_model_len or getattr(self.first.config, "max_position_embeddings", None)

    def _network(self, name: str | None) -> Any:
        if name in (None, self.name):
            return self.model
        if name not in self.adapters:
            raise _Refused(404, f"The model `{name}` does not exist. Valid aliases: {self.name}.")
        return self.adapters[name]

    def _generate(self, body: Any) -> dict[str, Any]:
        self.may_run.wait(30)
        ids, asked = body["token_ids"], body["sampling_params"]
        if body.get("content_parts"):
            ids = self._expanded(ids, body["content_parts"])
        with self.lock:
            network = self._network(body.get("model"))
            known = self.first.config.get_text_config().vocab_size
            if max(ids) >= known:
                raise _Refused(400, f"Token id {max(ids)} is out of vocabulary")
            if len(ids) >= (self._longest() or 10**9):
                raise _Refused(400, f"This model's maximum context length is {self._longest()} tokens.")
            if asked["temperature"] == 0 and asked.get("n", 1) > 1:
                raise _Refused(400, f"n must be 1 when using greedy sampling, got {asked['n']}.")
            answer: dict[str, Any] = {"request_id": "0", "choices": [], "prompt_logprobs": None}
            if body.get("return_token_ids") and self.says_prompt:
                reader = reader_of(self.tokenizer)
                answer["prompt_token_ids"] = ids if reader is None else reader.plain(ids)
            if asked.get("prompt_logprobs") is not None:
                answer["prompt_logprobs"] = prompt_logprobs(network, ids, asked["prompt_logprobs"])
            for index in range(asked.get("n", 1)):
                answer["choices"].append(self._choice(network, ids, asked, index))
            return answer

    def _expanded(self, ids: list[int], parts: list[dict[str, Any]]) -> list[int]:
        """The prompt with the pictures' tokens where their placeholders stand, one for each."""
        numbers = []
        for part in parts:
            assert part["type"] == "image_url"
            assert part["uuid"].isdigit()
            numbers.append(Album.keep(base64.b64decode(part["url"].removeprefix("data:image/png;base64,"))))
        reader = reader_of(self.tokenizer)
        if reader is None:
            raise _Refused(400, f"{self.name} is not a multimodal model")
        (placeholder,) = self.tokenizer(reader.placeholder, add_special_tokens=False)["input_ids"]
        rest = iter(numbers)
        return [own for token in ids for own in (reader.ids_of(next(rest)) if token == placeholder else [token])]

    def _choice(self, network: Any, ids: list[int], asked: dict[str, Any], index: int) -> dict[str, Any]:
        greedy = asked["temperature"] == 0
        ends = tuple(asked.get("stop_token_ids") or ())
        seed = asked.get("seed")
        params = SamplingParams(
            max_new_tokens=asked.get("max_tokens", 16), temperature=asked["temperature"],
            top_k=0 if greedy else max(asked.get("top_k", 0), 0), top_p=1.0 if greedy else asked.get("top_p", 1.0),
            min_p=0.0 if greedy else asked.get("min_p", 0.0), repetition_penalty=asked.get("repetition_penalty", 1.0),
            min_new_tokens=asked.get("min_tokens", 0), stop_token_ids=ends, stop_strings=tuple(asked.get("stop") or ()),
            seed=None if seed is None else seed + index,
        )  # fmt: skip
        ((one,),) = LocalSampler(network, self.tokenizer).sample([ids], params)
        numbers = one.logprobs if self.processed and not greedy else one.raw_logprobs
        content = [
            {"token_id": token, "logprob": number, "rank": 1, "top_logprobs": []}
            for token, number in zip(one.ids, numbers, strict=True)
        ]
        logprobs = {"content": content} if asked.get("logprobs") is not None else None
        masks = kept_tokens(network, ids, one.ids, params) if self.masks and params.top_k else None
        return {
            "index": index, "finish_reason": one.finish_reason, "token_ids": one.ids, "logprobs": logprobs,
            "sampling_mask": masks, "routed_experts": None,
            "weight_versions": [{"version": self.version, "start": 0, "end": len(one.ids)}],
        }  # fmt: skip

    def _tokenize(self, body: Any) -> dict[str, Any]:
        if self.tokenizer is None:
            raise _Refused(400, "no tokenizer")
        ids = self.tokenizer(body["prompt"], add_special_tokens=body.get("add_special_tokens", True))["input_ids"]
        return {"tokens": ids, "count": len(ids), "max_model_len": self._longest()}

    def _pause(self, query: dict[str, list[str]]) -> dict[str, str]:
        if query.get("mode", ["abort"])[0] not in ("abort", "wait", "keep"):
            raise _Refused(422, "mode")
        self.may_run.clear()
        with self.lock:  # what is being answered is answered first
            self.paused = True
        return {"status": "paused"}

    def _resume(self) -> dict[str, str]:
        self.paused = False
        self.may_run.set()
        return {"status": "resumed"}

    def _rpc(self, body: Any) -> dict[str, Any]:
        if body["method"] != "reload_weights":
            raise _Refused(400, f"no method {body['method']}")
        if "stale" not in body:
            with self.lock:
                self._reload(Path(body["kwargs"]["weights_path"]))
        return {"results": [None]}

    def _reload(self, folder: Path) -> None:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise _Refused(500, f"Cannot find any model weights with `{folder}`")
        loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
        head = self.model.get_output_embeddings()
        before = head.weight.detach().clone()
        _, unknown = self.model.load_state_dict(loaded, strict=False)
        if unknown:
            raise _Refused(500, f"There is no module or parameter named {unknown[0]!r}")
        if self.tied_head_stays:
            head.weight = torch.nn.Parameter(before, requires_grad=False)

    def _stamp(self, version: str) -> dict[str, Any]:
        self.version = version
        return {"success": True, "new_version": version}

    def _unload_adapter(self, body: Any) -> str:
        if body["lora_name"] not in self.adapters:
            raise _Refused(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        self.unloaded = self.adapters.pop(body["lora_name"])
        return f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    def _load_adapter(self, body: Any) -> str:
        from peft import PeftModel

        name, folder = body["lora_name"], body["lora_path"]
        if not self.max_lora_rank:
            raise _Refused(400, "LoRA is not enabled")
        if name in self.adapters and not body.get("load_inplace"):
            raise _Refused(400, f"The lora adapter '{name}' has already been loaded.")
        if not Path(folder, "adapter_config.json").exists():
            raise _Refused(404, f"Loading lora {name} failed: No adapter found for {folder}")
        if "stale" in body and self.unloaded is not None:
            self.adapters[name] = self.unloaded
            return f"Success: LoRA adapter '{name}' added successfully."
        with self.lock:
            base = copy.deepcopy(self.model)
            self.adapters[name] = PeftModel.from_pretrained(base, folder).eval().requires_grad_(False)
        return f"Success: LoRA adapter '{name}' added successfully."


TRAINING = (
    "/server_info", "/pause", "/resume", "/collective_rpc", "/update_weight_version", "/weight_info",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
)  # fmt: skip
"""routes that a server has only if it was started for training"""


def prompt_logprobs(model: Any, ids: list[int], top: int) -> list[dict[str, Any] | None]:
    with torch.no_grad():
        logprobs_TV = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    entries: list[dict[str, Any] | None] = [None]
    for row_V, token in zip(logprobs_TV[:-1], ids[1:], strict=True):
        best = row_V.topk(len(row_V) if top < 0 else top).indices.tolist() if top else []
        entries.append(
            {str(t): {"logprob": float(row_V[t]), "rank": int((row_V > row_V[t]).sum()) + 1} for t in [token, *best]}
        )
    return entries


def kept_tokens(model: Any, prompt: list[int], ids: list[int], params: SamplingParams) -> list[list[int]]:
    """For each token the ids that top-k and top-p left."""
    from trl.generation.filters import filter_logits

    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
    filtered_TV = filter_logits(logits_TV, params, None, None)
    return [row.isfinite().nonzero().flatten().tolist() for row in filtered_TV]


def as_text(array: np.ndarray) -> str:
    """Numbers as the server sends them: an `.npy` file in base64."""
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


class _Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, *given: Any) -> None:
        self.open: set[socket.socket] = set()
        super().__init__(*given)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # who asked has hung up


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server_of: FakeVLLM
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *anything: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def _serve(self, method: str) -> None:
        fake, parts = self.server_of, urlsplit(self.path)
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(text) if text else None
        with fake.lock:
            fake.calls.append((parts.path, body))
            fault = self._fault(parts.path)
            wait = fake.delays.uniform(0, 0.02) if fake.delays is not None else 0.0
        time.sleep(wait)
        if fake.api_key is not None and self.headers.get("Authorization") != f"Bearer {fake.api_key}":
            return self._send(401, {"error": "Unauthorized"})
        if fault is not None and self._fail_before(fault, body):
            return None
        status, answer = fake.answer(method, parts.path, parse_qs(parts.query), body)
        if fault is not None and status == 200:
            if fault.kind == "half":
                return self._send(200, answer, cut=0.5)
            spoil(answer, fault)
        return self._send(status, answer)

    def _fault(self, path: str) -> Fault | None:
        for fault in self.server_of.faults:
            if path.startswith(fault.path) and fault.times > 0:
                if fault.after > 0:
                    fault.after -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def _fail_before(self, fault: Fault, body: Any) -> bool:
        """Whether nothing more is to be said."""
        fake = self.server_of
        if fault.kind == "slow":
            time.sleep(fault.seconds)
        elif fault.kind == "refuse":
            self._hang_up()
            return True
        elif fault.kind == "die":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.wfile.flush()
            threading.Thread(target=fake.stop, daemon=True).start()
            self._hang_up()
            return True
        elif fault.kind == "restart":
            with fake.lock:
                fake._forget()
        elif fault.kind == "stale" and isinstance(body, dict):
            body["stale"] = True
        elif fault.kind in ERRORS:
            self._send(*ERRORS[fault.kind])
            return True
        return False

    def _hang_up(self) -> None:
        self.close_connection = True
        _cut(self.connection)

    def _send(self, status: int, answer: Any, cut: float = 1.0) -> None:
        in_words = isinstance(answer, str)
        text = b"" if answer is None else (answer if in_words else json.dumps(answer)).encode()
        text = text[: int(len(text) * cut)]
        self.send_response(status)
        if not in_words:
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


ERRORS = {
    "404": (404, {"detail": "Not Found"}),
    "500": (500, {"error": {"message": "EngineCore encountered an issue.", "type": "InternalServerError"}}),
    "503": (503, {"error": {"message": "Service Unavailable"}}),
    "oom": (500, {"error": {"message": "CUDA out of memory. Tried to allocate 2.00 GiB."}}),
}


def spoil(answer: Any, fault: Fault) -> None:
    """What is wrong in an answer to `/inference/v1/generate` that is whole JSON."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not choices:
        return
    first = choices[0]
    if fault.kind == "short":
        first["logprobs"]["content"].pop()
    elif fault.kind == "nan":
        first["logprobs"]["content"][0]["logprob"] = -9999.0
    elif fault.kind == "missing":
        choices.pop()
    elif fault.kind == "abort":
        first["finish_reason"] = "abort"
        del first["token_ids"][1:], first["logprobs"]["content"][1:]
    elif fault.kind == "stranger":
        first["token_ids"][0] = first["logprobs"]["content"][0]["token_id"] = 10**6
    elif fault.kind == "other-version":
        for choice in choices:
            choice["weight_versions"][0]["version"] = "other"
