"""The sampler that asks an engine of vLLM, whose weights follow the policy's."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from trl.data.pictures import read_by, reader_of
from trl.data.records import Completion
from trl.generation.engine import check_shown
from trl.generation.rows import make_rows
from trl.generation.sampler import Sampler, SamplingParams
from trl.generation.stopping import StopStrings, end_tokens
from trl.generation.vllm.engine import About, Engine, EngineError, Request, WeightSync
from trl.generation.vllm.pictures import with_placeholders
from trl.generation.vllm.verify import MismatchError, Verification
from trl.models.prepare import context_length, embedding_rows

logger = logging.getLogger(__name__)
TESTED = ("0.32.0", "0.33.0")
"""vLLM releases from the first on, below the second, are tested"""
OLDEST = "0.28.0"
"""the first release with tokens in, tokens out as it is asked here"""
_COPIES = 16
"""completions of one prompt that are asked for in one request"""


class VLLMSampler:
    """Completions by an engine of vLLM; `follow` gives it the policy's weights.

    Each completion has a seed of its own, made of its prompt, the prompt's seed and the number of its copy, so it does
    not depend on what else is asked, nor on the order in which answers arrive.

    sync: makes the engine's weights those of the policy; None: they stay as they are. model: the policy, whose end
    tokens, context and vocabulary count, beside the tokenizer's end token. stamp: distinguishes the weights of this run
    from those of other runs. further: more of vLLM's sampling parameters, such as structured_outputs. verify: every
    so many pushes of weights the model scores some completions itself (0: never); or what does so. otherwise: makes
    the sampler that goes on where that finds other weights than the policy's; None: the error is raised. keeps: weights
    may change while it samples (a `sync` of mode "keep"), so that tokens of all weights of this run are expected.
    """

    exact = False
    """whether it computes with the policy's own weights and code: once `otherwise` has been asked"""

    def __init__(
        self,
        engine: Engine,
        sync: WeightSync | None = None,
        tokenizer: Any = None,
        *,
        model: Any = None,
        stamp: str = "policy",
        further: dict[str, Any] | None = None,
        verify: Verification | int = 1,
        otherwise: Callable[[], Sampler] | None = None,
        keeps: bool = False,
    ) -> None:
        self.keeps = keeps
        self.engine, self.sync, self.tokenizer = engine, sync, read_by(tokenizer)
        self.verify: Verification | None = None
        self.otherwise = otherwise
        self._instead: Sampler | None = None
        self.ends = end_tokens(model, self.tokenizer)
        self.reader = reader_of(self.tokenizer)
        self.vocabulary, self.stamp, self.further = embedding_rows(model), stamp, dict(further or {})
        if isinstance(verify, Verification):
            self.verify = verify
        elif verify and sync is not None and model is not None:
            self.verify = Verification.of(
                model, self.vocabulary, every=verify, own_engines=getattr(sync, "own_engines", False)
            )
        self.about = engine.about()
        check_release(self.about)
        known = [None if model is None else context_length(model), self.about.max_model_len]
        self.context = min((length for length in known if length is not None), default=None)
        if self.verify is not None:
            self.verify.context, self.verify.reader = self.context, self.reader
        self.version: int | None = None
        """number of the weights that the engine has; None: its own first ones"""

    @property
    def beside(self) -> bool:
        """Whether it may sample while the policy is trained: not in the trainer's own process or model."""
        return bool(getattr(self.engine, "urls", ())) and self._instead is None

    @property
    def expected(self) -> str | None:
        """The stamp that completions must bear; None: any."""
        return None if self.sync is None or self.version is None else f"{self.stamp}-{self.version}"

    def follow(self, version: int) -> None:
        """Give the engine the policy's weights of now, which bear this number; nothing where it has them."""
        if self.sync is None or self.version == version or self._instead is not None:
            return
        self.sync.push(self.engine, f"{self.stamp}-{version}")
        self.version = version
        if self.verify is None:
            return
        try:
            self.verify(self.engine, f"{self.stamp}-{version}", self.sync.adapter)
        except MismatchError as error:
            if self.otherwise is None:
                self.version = None
                raise
            logger.warning("%s. The local sampler goes on.", error)
            if not getattr(self.engine, "urls", ()):  # in this process it would keep the device's memory
                self.engine.close()
            self._instead, self.exact = self.otherwise(), True

    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams, n: int = 1) -> list[list[Completion]]:
        """`n` completions of each prompt, in the order of the prompts."""
        if self._instead is not None:
            return self._instead.sample(prompts, params, n)
        if self.verify is not None:
            self.verify.saw(prompts)
        if self.reader is not None:
            check_shown(prompts, [self.reader.image_token_id])
        once = params.temperature == 0  # all copies are the same, and vLLM makes no more than one
        requests, places = self._requests(prompts, params, 1 if once else n)
        answers = self._asked(requests)
        groups: list[list[Completion]] = [[] for _ in prompts]
        for place, answer in zip(places, answers, strict=True):
            groups[place] += [_as_sampled(one, params) for one in answer]
        return [[copy.deepcopy(group[0]) for _ in range(n)] for group in groups] if once else groups

    def close(self) -> None:
        self.engine.close()

    def _requests(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, n: int
    ) -> tuple[list[Request], list[int]]:
        """What is asked, and of which prompt each request is."""
        shared = engine_params(params, self._ends(params), self.further)
        if self.reader is not None:  # what stands for a part of a picture means nothing in a completion
            shared["logit_bias"] = {self.reader.image_token_id: -100.0, **(shared.get("logit_bias") or {})}
        if params.stop_strings:
            StopStrings(params.stop_strings, self.tokenizer)  # says that it needs a tokenizer
        adapter = None if self.sync is None or self.version is None else self.sync.adapter
        requests, places = [], []
        for place, rows in enumerate(make_rows(prompts, params, n, self.context)):
            for start in range(0, n, _COPIES):
                part = rows[start : start + _COPIES]
                limits = {"max_tokens": part[0].limit, "min_tokens": min(params.min_new_tokens, part[0].limit)}
                # the engine gives copy i of a request the seed + i, as the rows have their keys
                own = {"n": len(part), "seed": part[0].key % 2**31, **limits}
                requests.append(with_placeholders(Request(part[0].prompt, {**shared, **own}, adapter), self.reader))
                places.append(place)
        return requests, places

    def _ends(self, params: SamplingParams) -> tuple[int, ...]:
        ends = self.ends if params.stop_token_ids is None else params.stop_token_ids
        most = math.inf if self.vocabulary is None else self.vocabulary
        return tuple(token for token in ends if token < most)  # old scripts name one that never comes

    def _asked(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """The answers, all of the weights that are expected; an engine that has lost these gets them once more."""
        try:
            answers = self.engine.generate(requests)
        except EngineError:
            if not self._has_lost_adapter():
                raise
            self._give_again("it has no adapter of the policy")
            answers = self.engine.generate(requests)
        for last in (False, True):
            strays = [at for at, answer in enumerate(answers) if self._strays(answer)]
            if not strays:
                break
            found = next(span.version for one in answers[strays[0]] for span in self._strays([one]))
            if last:
                raise EngineError(
                    f"the engine samples by the weights {found!r}, not by {self.expected!r}, though it got them twice: "
                    "another run may use it; give each run an engine of its own"
                )
            self._give_again(f"it sampled by the weights {found!r}, not by {self.expected!r}")
            once_more = self.engine.generate([requests[at] for at in strays])
            for at, answer in zip(strays, once_more, strict=True):
                answers[at] = answer
        self._check_tokens(requests, answers)
        return answers

    def _strays(self, completions: Sequence[Completion]) -> list[Any]:
        """Spans of tokens that other weights sampled."""
        if self.expected is None:
            return []
        spans = [span for one in completions for span in one.versions if span.version != self.expected]
        known = f"{self.stamp}-"
        return [s for s in spans if not (self.keeps and s.version.startswith(known) and s.version[-1:].isdecimal())]

    def _has_lost_adapter(self) -> bool:
        adapter = None if self.sync is None or self.version is None else self.sync.adapter
        return adapter is not None and adapter not in self.engine.about().adapters

    def _give_again(self, why: str) -> None:
        assert self.sync is not None
        assert self.expected is not None
        logger.warning("vLLM was started anew (%s): it gets the policy's weights once more", why)
        self.sync.again(self.engine, self.expected)

    def _check_tokens(self, requests: Sequence[Request], answers: Sequence[Sequence[Completion]]) -> None:
        for request, answer in zip(requests, answers, strict=True):
            for one in answer:
                if self.vocabulary is not None and max(one.ids) >= self.vocabulary:
                    raise EngineError(
                        f"the engine sampled the token {max(one.ids)}, and the policy knows 0 to "
                        f"{self.vocabulary - 1}: it serves another model ({self.about.model}); serve the policy's"
                    )
                if len(one.ids) > request.params["max_tokens"]:
                    raise EngineError(
                        f"the engine sampled {len(one.ids)} tokens where {request.params['max_tokens']} were the most"
                    )


def engine_params(params: SamplingParams, ends: Sequence[int], further: dict[str, Any]) -> dict[str, Any]:
    """vLLM's words for what is asked of each row; tokens and texts that end one are ours, not the engine's own."""
    asked: dict[str, Any] = {
        "temperature": params.temperature, "top_k": params.top_k or -1, "top_p": params.top_p, "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty, "logprobs": 0,
        "ignore_eos": True, "stop_token_ids": list(ends), "detokenize": bool(params.stop_strings),
    }  # fmt: skip
    if params.stop_strings:
        asked |= {"stop": list(params.stop_strings), "include_stop_str_in_output": True, "skip_special_tokens": False}
    return {**asked, **further}


def _as_sampled(completion: Completion, params: SamplingParams) -> Completion:
    """The completion with log-probabilities as `Completion` means them."""
    if not params.reshapes:
        return completion
    own = [0.0] * len(completion.ids) if params.temperature == 0 else completion.logprobs
    return replace(completion, logprobs=own, raw_logprobs=[math.nan] * len(completion.ids))


def check_release(about: About) -> None:
    """EngineError for a release that lacks what is asked; one line for one that is not tested."""
    from packaging.version import InvalidVersion, Version

    try:
        release = Version(about.release)
    except InvalidVersion:
        logger.warning("vLLM calls itself %r; releases >=%s,<%s are tested", about.release, *TESTED)
        return
    if release < Version(OLDEST):
        raise EngineError(f"vLLM {about.release} is too old: take {TESTED[0]}, which is tested")
    if not Version(TESTED[0]) <= release < Version(TESTED[1]):
        logger.warning("vLLM %s is not tested: releases >=%s,<%s are", about.release, *TESTED)
