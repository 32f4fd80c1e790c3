"""Distillation on the student's samples: at every token it learns the teacher's distribution."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any
from zlib import crc32

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from trl.data.chat import ChatTemplate, read_tools
from trl.data.columns import at_row, shown
from trl.data.encode import TextEncoder
from trl.data.formats import column_names, mapped_rows, maybe_convert_to_chatml
from trl.data.messages import messages_of
from trl.data.picture_rows import messages_with_pictures
from trl.data.records import Rollout
from trl.data.tokenize import unprepared
from trl.generation import make_sampler
from trl.generation.vllm.sync import as_one
from trl.generation.vllm.teacher import ServedTeacher
from trl.losses.distillation import generalized_jsd, partial_jsd, sampled_reverse_kl
from trl.losses.loss_sum import LossSum
from trl.models.forward import introduce
from trl.models.precision import frozen_dtype
from trl.models.prepare import context_length, embedding_rows, load_model, read_tokenizer
from trl.models.scoring import head_of, in_head, map_logits, score, scored_states
from trl.models.sharded import prepare_frozen
from trl.models.unwrap import below_peft
from trl.models.zero import whole_shape
from trl.rollout.experience import Experience, PolicyBatch
from trl.rollout.rewards import Rewards
from trl.rollout.source import Rows, Source
from trl.trainer.configuration import Setting, as_config, choose, require
from trl.trainer.rollout_trainer import RolloutConfig, RolloutTrainer, limit_whole, without_unread
from trl.trainer.settings import accepted, rename

logger = logging.getLogger(__name__)


@dataclass
class DistillationConfig(RolloutConfig):
    """`TrainingArguments` and the settings of distillation."""

    num_generations: int = field(default=1)
    """completions of each prompt"""
    beta: float = field(default=1.0)
    """generalised Jensen-Shannon divergence: 0 is the forward KL(teacher || student), 1 the reverse KL"""
    lmbda: float = field(default=1.0)
    """share of the prompts that the student completes; the others take the data set's `completion`, or the teacher's"""
    seq_kd: bool = field(default=False)
    """sequence-level distillation (arXiv:1606.07947): the teacher completes the prompts that the student does not, by
    the same sampling settings; the data set needs no completions"""
    teacher_model_name_or_path: str | None = field(default=None)
    """name or folder of the teacher, if it is not given as an object"""
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(default=None)
    """keywords of `from_pretrained` for a teacher given by name"""
    teacher_model_revision: str | None = field(default=None)
    """branch, tag or commit of a teacher given by name"""
    teacher_model_server_url: str | None = field(default=None)
    """address of a vLLM server that has the teacher; `teacher_model_name_or_path` may then name one of its adapters"""
    teacher_top_logprobs: int = field(default=20)
    """of how many of its likeliest tokens a served teacher gives log-probabilities; all others are one class, so the
    loss is a lower bound of the divergence. -1: of all tokens, exact, for small vocabularies (the server needs
    `--max-logprobs -1`); 0: of the sampled token, an unbiased estimate of the reverse KL"""

    def json_fields(self) -> tuple[str, ...]:
        return (*super().json_fields(), "teacher_model_init_kwargs")

    def translate(self) -> None:
        super().translate()
        if self.seq_kd and self.lmbda == 1:
            logger.warning("seq_kd=True: has no effect with lmbda=1, where the student completes every prompt")

    def validate(self) -> None:
        super().validate()
        require(self, "beta", 0 <= self.beta <= 1, "give a number in [0, 1]")
        require(self, "lmbda", 0 <= self.lmbda <= 1, "give a share in [0, 1]")
        require(
            self, "teacher_top_logprobs", self.teacher_top_logprobs >= -1, "give -1 (all), 0 (the sampled one), or more"
        )
        if self.teacher_model_server_url is not None:
            for name in ("teacher_model_init_kwargs", "teacher_model_revision"):
                require(self, name, not getattr(self, name), "the server has loaded its teacher; leave it out")
            if self.teacher_top_logprobs == 0:
                self._require_own_samples()
        else:
            way_out = "a teacher in this process gives all; give it with teacher_model_server_url, or leave it out"
            require(self, "teacher_top_logprobs", self.teacher_top_logprobs == 20, way_out)

    def _require_own_samples(self) -> None:
        """ValueError unless sampled tokens say what the divergence is."""
        for name, value in (("beta", self.beta), ("lmbda", self.lmbda)):
            way_out = (
                "with teacher_top_logprobs=0 give 1: sampled tokens estimate the reverse KL of the student's own text"
            )
            require(self, name, value == 1, way_out)
        off = {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
        for name, value in off.items():
            way_out = (
                "with teacher_top_logprobs=0 leave it out: it samples from another distribution than the student's"
            )
            require(self, name, (getattr(self, name) or 0) == value, way_out)
        require(self, "generation_kwargs", not self.reshapes, "with teacher_top_logprobs=0 leave min_new_tokens out")

    def unused(self) -> dict[str, str]:
        found = super().unused()
        if self.teacher_model_server_url is not None:
            found.pop("vllm_server_timeout", None)  # the teacher's server is waited for as long
        return found

    @property
    def needs_completions(self) -> bool:
        """Whether some of the completions are the data set's."""
        return self.lmbda < 1 and not self.seq_kd

    def teacher_keywords(self, source: nn.Module | str) -> dict[str, Any]:
        """Keywords of `from_pretrained` for the teacher; ValueError where it is an object that they cannot change."""
        keywords: dict[str, Any] = dict(self.teacher_model_init_kwargs or {})  # type: ignore[arg-type]
        if not isinstance(source, str):
            for name in ("teacher_model_init_kwargs", "teacher_model_revision"):
                require(self, name, not getattr(self, name), "the teacher is loaded already; leave it out")
            return {}
        revision = self.teacher_model_revision
        if revision is not None:
            way_out = f"teacher_model_init_kwargs has revision={keywords.get('revision')!r}; say it once"
            require(self, "teacher_model_revision", keywords.get("revision", revision) == revision, way_out)
            keywords["revision"] = revision
        return {**({"trust_remote_code": True} if self.trust_remote_code else {}), **keywords}


_COMPLETIONS = "has no effect: rows have `prompt` and `completion`, or `messages`"
_PACKED = "has no effect: a forward pass packs its rows anyway, each apart from the others"
SUPERVISED = {
    "packing": _PACKED,
    "packing_strategy": _PACKED,
    "eval_packing": _PACKED,
    "loss_type": "has no effect: the loss is the divergence from the teacher (`beta`)",
    "dataset_text_field": _COMPLETIONS,
    "dataset_kwargs": _COMPLETIONS,
    "assistant_only_loss": "has no effect: the completion alone is learned",
    "dataset_batch_size": "has no effect: prompts are tokenised as they are drawn",
}
"""fields of supervised fine-tuning that scripts give GKD -> what they do here"""


@dataclass
class GKDConfig(DistillationConfig):
    """Distillation with the defaults of GKD."""

    temperature: float = field(default=0.9)
    """sampling temperature"""
    beta: float = field(default=0.5)
    """generalised Jensen-Shannon divergence: 0 is the forward KL(teacher || student), 1 the reverse KL"""
    lmbda: float = field(default=0.5)
    """share of the prompts that the student completes; the others take the data set's `completion`, or the teacher's"""
    max_completion_length: int = field(default=128)
    """longest completion in tokens"""
    max_new_tokens: int | None = accepted("max_new_tokens")
    learning_rate: float = field(default=2e-5)
    """initial learning rate"""
    max_length: int | None = field(default=None)
    """longest prompt + completion in tokens: the prompt loses its start; None: prompts are as long as they are"""
    max_seq_length: int | None = accepted("max_seq_length")
    truncation_mode: str = field(default="keep_end")
    """which end of a long prompt stays: keep_end; keep_start only where prompts have no limit"""
    completion_only_loss: bool | None = field(default=None)
    """learn the completion alone; False raises"""
    eos_token: str | None = field(default=None)
    """end token, where it is not the tokenizer's own"""
    chat_template_path: str | None = field(default=None)
    """file of a Jinja template, or folder or Hub name of a tokenizer whose template is taken"""
    packing: bool = field(default=False, metadata={"help": SUPERVISED["packing"]})
    packing_strategy: str = field(default="bfd", metadata={"help": SUPERVISED["packing_strategy"]})
    eval_packing: bool | None = field(default=None, metadata={"help": SUPERVISED["eval_packing"]})
    loss_type: str | None = field(default=None, metadata={"help": SUPERVISED["loss_type"]})
    dataset_text_field: str = field(default="text", metadata={"help": SUPERVISED["dataset_text_field"]})
    dataset_kwargs: dict[str, Any] | None = field(default=None, metadata={"help": SUPERVISED["dataset_kwargs"]})
    assistant_only_loss: bool = field(default=False, metadata={"help": SUPERVISED["assistant_only_loss"]})
    dataset_batch_size: int | None = field(default=None, metadata={"help": SUPERVISED["dataset_batch_size"]})

    @classmethod
    def exceptions(cls) -> dict[str, str]:
        return {**super().exceptions(), **SUPERVISED}

    def translate(self) -> None:
        super().translate()
        rename(self, "max_new_tokens", "max_completion_length")
        self.max_new_tokens = self.max_completion_length
        rename(self, "max_seq_length", "max_length")
        self.max_seq_length = None
        limit_whole(self)

    def token_settings(self) -> dict[str, str | None]:
        return {
            **super().token_settings(), "eos_token": self.eos_token, "chat_template_path": self.chat_template_path,
        }  # fmt: skip

    def validate(self) -> None:
        super().validate()
        choose(self, "truncation_mode", ("keep_start", "keep_end"))
        uncut = self.truncation_mode == "keep_end" or self.max_prompt_length is None
        require(self, "truncation_mode", uncut, "a prompt that is too long loses its start; give 'keep_end'")
        way_out = "the divergence is over completions alone; leave it out"
        require(self, "completion_only_loss", self.completion_only_loss is not False, way_out)


class DistillationTrainer(RolloutTrainer):
    """Teach a student by a teacher with the same tokens (generalised knowledge distillation, arXiv:2306.13649).

    The student completes a share `lmbda` of the prompts. The others take the data set's `completion`, or with `seq_kd`
    one that the teacher samples. The student learns the teacher's distribution at every token of them; a tool's tokens
    are left out. The divergence is between the distributions at temperature 1, whatever the sampling temperature.

    `train_dataset` has a column `prompt`, and `completion` where the data's are taken; or whole conversations
    (`messages`, or ShareGPT's `conversations`), whose last message is the completion: earlier turns are its prompt.

    teacher_model: a model, a folder or a Hub name. It stays in its own precision if it is an object; one that is given
    by name follows the student's, unless `teacher_model_init_kwargs` has a `dtype`. Its output may have more or fewer
    rows than the student's, as long as there is one for each token of the tokenizer; the rows that both have are
    compared, and a completion ends before a token that one of them lacks.

    Or the teacher is behind a vLLM server (`teacher_model_server_url`): it scores each completion once, and gives what
    `teacher_top_logprobs` says.
    """

    _tag_names = ("trl", "distillation")
    config_class = DistillationConfig
    needs_rewards = False
    beta = Setting()
    lmbda = Setting(fixed="the source of the rollouts is made for it")
    _evaluated: Experience
    """what a served teacher has said of the evaluation batch at hand"""

    @property
    def teacher_model(self) -> nn.Module | None:
        """The teacher, by the name of the constructor's argument; None where a server has it."""
        return None if self.args.teacher_model_server_url else self.teacher

    def __init__(
        self,
        model: nn.Module | str,
        teacher_model: nn.Module | str | None = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        config = as_config(args, self.config_class)
        url = config.teacher_model_server_url
        self._teacher_source = one_teacher(teacher_model, config.teacher_model_name_or_path, url)
        self._teacher_keywords = {} if url else config.teacher_keywords(self._teacher_source)
        super().__init__(
            model,
            None,
            config,
            train_dataset,
            eval_dataset,
            processing_class,
            **without_unread(kwargs),
        )
        if self.served is None:
            self.teacher.eval()  # it is loaded now, unless it makes rollouts

    def with_prompt(self, dataset: Any, name: str) -> Any:
        """Rows of whole conversations as prompt and completion: their last message."""
        names, needed = column_names(dataset, name), self.args.needs_completions
        columns = ("messages",) if "prompt" in names else ("messages", "conversations")
        whole = [column for column in columns if column in names]
        if whole:
            rows = unprepared(list(dataset) if isinstance(dataset, tuple) else dataset, ())
            split = partial(in_two, name=name, needed=needed)
            split.__name__ = f"in_two_{needed}"  # type: ignore[attr-defined]
            text = f"Splitting the {name} data"
            return mapped_rows(rows, split, text, with_indices=True, remove_columns=whole)
        if needed and "completion" not in names:
            way_out = "give one, or lmbda=1, or seq_kd=True, by which the teacher completes them"
            found = f"the {name} data set has {', '.join(names)}"
            raise ValueError(f"lmbda={self.args.lmbda}: needs a column `completion`, and {found}; {way_out}")
        if needed:
            check_completions(dataset, name)
        return dataset

    @cached_property
    def teacher(self) -> nn.Module:
        """The model that is learned from, frozen."""
        source, like = self._teacher_source, frozen_dtype(self.model, self.accelerator.mixed_precision)
        teacher: Any = load_model(source, AutoModelForCausalLM, self._teacher_keywords, frozen=True, like=like)
        check_teacher(teacher, self.model, self.tokenizer)
        check_same_tokens(self.tokenizer, tokenizer_beside(teacher, source, self._teacher_keywords))
        teacher.requires_grad_(False).eval()
        introduce(teacher, self.tokenizer)
        return prepare_frozen(self.accelerator, teacher)  # type: ignore[no-any-return]

    @cached_property
    def served(self) -> ServedTeacher | None:
        """The teacher behind a server, if it is there."""
        config = self.args
        if config.teacher_model_server_url is None:
            return None
        name = None if self._teacher_source == config.teacher_model_server_url else str(self._teacher_source)
        top, wait = config.teacher_top_logprobs, config.vllm_server_timeout
        return ServedTeacher.at(config.teacher_model_server_url, self.tokenizer, top, name, wait)

    def frozen_models(self) -> list[nn.Module]:
        return [*super().frozen_models(), *([self.teacher] if self.served is None else [])]

    # -- samples: the student's own, the teacher's or the data set's -------------------------------

    def sampled_models(self) -> list[nn.Module]:
        teaches = self.args.seq_kd and self.args.lmbda < 1 and self.served is None
        return [*super().sampled_models(), *([self.teacher] if teaches else [])]

    def make_source(self) -> Source:
        source = self._mixed(super().make_source())
        theirs = embedding_rows(self.teacher) if self.served is None else len(self.tokenizer)
        held = [theirs, embedding_rows(self.model)]
        return source if held[0] == held[1] else ReadableSource(source, min(number for number in held if number))

    def is_asked_alone(self, source: Source) -> bool:
        if isinstance(source, ReadableSource):
            return self.is_asked_alone(source.source)
        if isinstance(source, MixedSource):  # a teacher in this process and the data set's texts are the trainer's own
            return self.args.seq_kd and self.served is not None and self.is_asked_alone(source.own)
        return super().is_asked_alone(source)

    def _mixed(self, own: Source) -> Source:
        config = self.args
        if config.lmbda == 1:
            return own
        if config.seq_kd:
            served = self.served
            sampler = make_sampler(self.teacher, self.tokenizer) if served is None else served.sampler()
            return MixedSource(own, self.sampled_by(sampler), config.lmbda)
        theirs = DataSource(self.tokenizer, config.max_completion_length, config.chat_template_kwargs)
        return MixedSource(own, theirs, config.lmbda)

    def experience(
        self, rollout: Rollout, rewards: Rewards, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[Experience, dict[str, list[float]]]:
        return self._learned_together(rollout), {}

    def _learned_together(self, rollout: Rollout) -> Experience:
        """What is learned of a rollout; an error of a served teacher on one rank is one of all."""
        with as_one("ask the teacher") if self.served is not None else nullcontext():
            return self._learned(rollout)

    def ask_of_evaluation(self, rollout: Rollout) -> None:
        if self.served is not None:
            self._evaluated = self._learned_together(rollout)

    def _learned(self, rollout: Rollout) -> Experience:
        """What is learned of a rollout, whatever other ranks do meanwhile."""
        limit = context_length(self.teacher) if self.served is None else self.served.context
        longest = max((len(p) + len(c) for p, c in zip(rollout.prompts, rollout.completions, strict=True)), default=0)
        if limit is not None and longest > limit:
            raise ValueError(
                f"teacher_model: its context holds {limit:,} tokens, and a prompt with its completion has {longest:,}; "
                "set max_prompt_length and max_completion_length, so that both fit"
            )
        made = Experience.of(rollout, advantages=torch.zeros(len(rollout)))
        return self._with_teacher(made, rollout)

    def _with_teacher(self, made: Experience, rollout: Rollout) -> Experience:
        """The experience with what a served teacher says of its tokens."""
        if self.served is None or not len(rollout):
            return made
        vocabulary = embedding_rows(self.model)
        assert vocabulary is not None
        tokens, logprobs = self.served.logprobs(rollout.prompts, rollout.completions, vocabulary)
        if tokens is None:
            return replace(made, reference_BT=logprobs)
        if self.args.teacher_top_logprobs > 0:
            known_BT = logprobs.exp().sum(-1) * made.mask_BT
            self.record("teacher_known", known_BT.sum(), made.mask_BT.sum())
        return replace(made, teacher_tokens_BTK=tokens, teacher_BTK=logprobs)

    # -- objective -------------------------------------------------------------------------------

    def policy_objective(self, model: nn.Module, batch: PolicyBatch) -> LossSum:
        if batch.teacher_BTK is not None:
            return self._partial(model, batch, batch.teacher_tokens_BTK, batch.teacher_BTK)
        if batch.reference_BT is not None:
            logprobs_BT = score(model, batch.packed).logprobs_BT
            old_BT = self.old_logprobs(batch, logprobs_BT)
            losses_BT = sampled_reverse_kl(logprobs_BT, batch.reference_BT, old_BT)
            return LossSum((losses_BT * batch.mask_BT).sum(), batch.counted)
        with torch.no_grad():
            teacher_head, teacher_SD = scored_states(self.teacher, batch.packed)

        def divergence(student_SV: Tensor, teacher_SD: Tensor) -> tuple[Tensor]:
            with torch.no_grad():
                teacher_SV = teacher_head.logits(teacher_SD)
            shared = min(student_SV.shape[-1], teacher_SV.shape[-1])  # embeddings may be padded to a round number
            return (generalized_jsd(student_SV[:, :shared], teacher_SV[:, :shared], beta=self.args.beta),)

        (losses_S,) = in_head(
            model, batch.packed, lambda head, student_SD: map_logits(head, student_SD, divergence, teacher_SD)
        )
        return LossSum(losses_S.sum(), batch.counted)

    def _partial(self, model: nn.Module, batch: PolicyBatch, tokens_BTK: Tensor | None, teacher_BTK: Tensor) -> LossSum:
        """From the teacher's likeliest tokens."""
        assert tokens_BTK is not None
        place = batch.packed.row_S, batch.packed.slot_S
        known = partial(partial_jsd, beta=self.args.beta, whole=self.args.teacher_top_logprobs < 0)

        def divergence(student_SV: Tensor, tokens_SK: Tensor, teacher_SK: Tensor) -> tuple[Tensor]:
            return (known(student_SV, tokens_SK, teacher_SK),)

        (losses_S,) = in_head(
            model,
            batch.packed,
            lambda head, states_SD: map_logits(head, states_SD, divergence, tokens_BTK[place], teacher_BTK[place]),
        )
        return LossSum(losses_S.sum(), batch.counted)

    def evaluated(
        self, model: nn.Module, rollout: Rollout, rewards: Rewards, rows: Sequence[Mapping[str, Any]]
    ) -> LossSum:
        # ranks without rows are not here, so a served teacher was asked before
        made = self._learned(rollout) if self.served is None else self._evaluated
        batch = self._collate(made)["policy"].to(self.args.device)
        return self.objective(model, {"policy": batch})


def one_teacher(given: nn.Module | str | None, named: str | None, url: str | None = None) -> nn.Module | str:
    """The teacher that was given, as an object, by name or by a server's address; ValueError for none, and for two."""
    if url is not None and given is not None and not isinstance(given, str):
        raise ValueError("teacher_model: a server has the teacher (teacher_model_server_url); give one of the two")
    if given is not None and named is not None and given != named:
        raise ValueError("teacher_model: give the teacher, or its name as teacher_model_name_or_path; not both")
    source = next((each for each in (given, named, url) if each is not None), None)
    if source is None:
        raise ValueError(
            "teacher_model: give the teacher, its name as teacher_model_name_or_path, or its server as "
            "teacher_model_server_url"
        )
    return source


def check_teacher(teacher: nn.Module, student: nn.Module, tokenizer: Any) -> None:
    """ValueError for a teacher that cannot be learned from: the student itself, without a head, of too few tokens."""
    ours = {id(weight) for weight in student.parameters()}
    if any(id(weight) in ours for weight in teacher.parameters()):
        raise ValueError("teacher_model: it is the student itself; load it a second time, or give a copy")
    try:
        heads: list[Any] = [head_of(model).module for model in (teacher, student)]
    except ValueError as error:
        raise ValueError(f"teacher_model: {error}; give a causal language model") from None
    kinds = [bool(getattr(below_peft(model).config, "is_encoder_decoder", False)) for model in (teacher, student)]
    if kinds[0] != kinds[1]:
        names = [type(below_peft(model)).__name__ for model in (teacher, student)]
        raise ValueError(
            f"teacher_model: {names[0]} (teacher) and {names[1]} (student): one is an encoder-decoder; give models of "
            "one kind"
        )
    sizes = [whole_shape(head.weight)[0] for head in heads]
    if min(sizes) < len(tokenizer):
        raise ValueError(
            f"teacher_model: vocabularies of {sizes[0]} (teacher) and {sizes[1]} (student) for a tokenizer of "
            f"{len(tokenizer)}: both must read the same tokens"
        )


TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")
"""how the names of a tokenizer's files begin"""


def tokenizer_beside(teacher: nn.Module, source: nn.Module | str, keywords: Mapping[str, Any]) -> Any:
    """The tokenizer in the teacher's folder or Hub repository; None where there is none, or it is not known where."""
    own = getattr(below_peft(teacher).config, "_name_or_path", "")
    name = source if isinstance(source, str) else own
    if os.path.isdir(name):
        if not any(file.startswith(TOKENIZER_FILES) for file in os.listdir(name)):
            return None
    elif not isinstance(source, str):
        return None
    where = {key: keywords[key] for key in ("revision", "trust_remote_code") if key in keywords}
    try:
        return read_tokenizer(name, **where)
    except OSError:
        return None


def check_same_tokens(ours: Any, theirs: Any) -> None:
    """ValueError where a token is another one to the teacher's tokenizer; added tokens may differ. None: not known."""
    if theirs is None:
        return
    added = {*ours.added_tokens_decoder, *theirs.added_tokens_decoder}
    tokens = [{place: text for text, place in each.get_vocab().items()} for each in (ours, theirs)]
    for place in sorted(tokens[0].keys() & tokens[1].keys() - added):
        if tokens[0][place] != tokens[1][place]:
            raise ValueError(
                f"teacher_model: token {place} is {tokens[1][place]!r} to its tokenizer and {tokens[0][place]!r} to "
                "the student's: both must read the same tokens; give a teacher with the student's tokenizer"
            )


@dataclass
class MixedSource:
    """The student's own completions for a random share of the prompts, another source's for the others."""

    own: Source
    others: Source
    share: float

    def draw(self, rows: Rows, group: int = 1, seed: int | None = None, places: Sequence[int] | None = None) -> Rollout:
        at = places or range(len(rows))
        if places is None:  # an evaluation, whose batches depend on the number of processes
            is_own = [_draw_of(row, seed or 0) < self.share for row in rows]
        else:
            generator = torch.Generator().manual_seed((seed or 0) % 2**63)
            draws = torch.rand(max(at) + 1, generator=generator).tolist()
            is_own = [draws[place] < self.share for place in at]
        parts = []
        for source, wanted in ((self.own, True), (self.others, False)):
            which = [number for number, own in enumerate(is_own) if own == wanted]
            theirs = None if places is None else [at[number] for number in which]
            if which:
                parts.append((which, source.draw([rows[number] for number in which], group, seed, theirs)))
        return parts[0][1] if len(parts) == 1 else merged(parts, group)


@dataclass
class ReadableSource:
    """Completions up to the first token that one of two models has no embedding for: heads may be padded."""

    source: Source
    tokens: int
    """how many both have"""

    def draw(self, rows: Rows, group: int = 1, seed: int | None = None, places: Sequence[int] | None = None) -> Rollout:
        rollout = self.source.draw(rows, group, seed, places)
        cut = list(rollout.metadata.get("truncated", [False] * len(rollout)))
        for number, ids in enumerate(rollout.completions):
            if max(ids, default=0) < self.tokens:
                continue
            end = next(place for place, token in enumerate(ids) if token >= self.tokens)
            for column in filter(None, (rollout.completions, rollout.logprobs, rollout.masks)):
                column[number] = column[number][:end]  # type: ignore[index, assignment]
            cut[number] = True
        rollout.metadata["truncated"] = cut
        return rollout


def _draw_of(row: Mapping[str, Any], seed: int) -> float:
    """A number in [0, 1) that depends on the seed and on the row's prompt alone."""
    text = repr(row.get("prompt_ids", row.get("prompt")))
    generator = torch.Generator().manual_seed((seed * 1_000_003 + crc32(text.encode())) % 2**63)
    return float(torch.rand((), generator=generator))


def merged(parts: Sequence[tuple[Sequence[int], Rollout]], group: int) -> Rollout:
    """The rollout of parts of its prompts, each with their numbers; it has the columns that all of them have."""
    places = [number * group + i for which, _ in parts for number in which for i in range(group)]
    order = sorted(range(len(places)), key=places.__getitem__)
    rollouts = [rollout for _, rollout in parts]

    def joined(columns: Sequence[Sequence[Any]]) -> list[Any]:
        values = [value for column in columns for value in column]
        return [values[place] for place in order] if all(columns) else []

    names = ("prompts", "completions", "logprobs", "masks", "rewards", "texts")
    shared = [name for name in rollouts[0].metadata if all(name in each.metadata for each in rollouts)]
    return Rollout(
        **{name: joined([getattr(each, name) for each in rollouts]) for name in names},
        metadata={name: joined([each.metadata[name] for each in rollouts]) for name in shared},
    )


@dataclass
class DataSource:
    """The completions of the data set, cut to the limit."""

    tokenizer: Any
    longest: int
    """most tokens of a completion"""
    template_kwargs: dict[str, Any] | None

    @cached_property
    def _encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer)

    def draw(self, rows: Rows, group: int = 1, seed: int | None = None, places: Sequence[int] | None = None) -> Rollout:
        whole = [ids for ids in map(self._completion, rows) for _ in range(group)]
        completions = [ids[: self.longest] for ids in whole]
        return Rollout(
            prompts=[list(row["prompt_ids"]) for row in rows for _ in range(group)],
            completions=completions,
            logprobs=[[0.0] * len(ids) for ids in completions],  # distillation does not read them
            masks=[[1] * len(ids) for ids in completions],
            metadata={"truncated": [len(ids) > self.longest for ids in whole]},
        )

    def _completion(self, row: Mapping[str, Any]) -> list[int]:
        given = row.get("completion")
        if isinstance(given, str):
            return self._encoder.encode([given])[0] + self._encoder.tail
        if isinstance(row.get("prompt"), str) or not given:
            raise ValueError(
                f"column 'completion' of the prompt {shown(row.get('prompt'))}: it should be a text, or messages where "
                f"the prompt is a conversation; got {shown(given)}"
            )
        row = maybe_convert_to_chatml(row)
        said = messages_of({"completion": [given] if isinstance(given, Mapping) else row["completion"]}, "completion")
        template = ChatTemplate(self.tokenizer, self.template_kwargs).of_row(row)
        split = template.split(
            messages_with_pictures(row, "prompt", self.tokenizer), [said], read_tools(row.get("tools"))
        )
        return self._encoder.encode(split.answers)[0]


class GKDTrainer(DistillationTrainer):
    """`DistillationTrainer` with the defaults of GKD: half of the completions from the data set, beta 0.5."""

    config_class = GKDConfig


def check_completions(dataset: Any, name: str) -> None:
    """ValueError where a row has no completion; those of a stream are looked at when they come."""
    missing: list[int] = []
    if isinstance(dataset, list):
        missing = [index for index, row in enumerate(dataset) if row.get("completion") is None]
    elif isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
        missing = dataset.with_format("arrow")["completion"][:].is_null().to_numpy().nonzero()[0].tolist()
    if missing:
        raise ValueError(
            f"row {missing[0]} of the {name} data set: column 'completion' is None; give a text, or messages where the "
            "prompt is a conversation"
        )


def in_two(row: Mapping[str, Any], index: int, *, name: str, needed: bool) -> dict[str, Any]:
    """A whole conversation as prompt and completion, which is the assistant's last message.

    needed: whether completions are learned; else the row has none, and a conversation may end with a question.
    """
    with at_row(index, name):
        row = maybe_convert_to_chatml(row)
        others = {key: value for key, value in row.items() if key != "messages"}
        messages = messages_of(row, "messages")
        role = messages[-1].get("role") if messages else None
        if role != "assistant" and needed:
            raise ValueError(
                f"column 'messages' ends with {f'the role {role!r}' if messages else 'nothing'}: end it with the "
                "assistant's answer, or give lmbda=1 or seq_kd=True, by which models answer"
            )
        ends = len(messages) - int(role == "assistant")
        if not ends:
            raise ValueError("column 'messages' has no message before the assistant's answer: give it a question")
        return {**others, "prompt": messages[:ends], **({"completion": messages[ends:]} if needed else {})}
