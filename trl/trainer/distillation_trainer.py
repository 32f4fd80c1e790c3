"""Distillation on the student's samples: at every token it learns the teacher's distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from trl.data.chat import ChatTemplate
from trl.data.encode import TextEncoder
from trl.data.formats import column_names, mapped_rows
from trl.data.records import Rollout
from trl.losses.distillation import generalized_jsd
from trl.losses.loss_sum import LossSum
from trl.models.precision import frozen_dtype
from trl.models.prepare import load_model
from trl.models.scoring import in_head, map_logits, scored_states
from trl.rollout.experience import Experience, PolicyBatch
from trl.rollout.rewards import Rewards
from trl.rollout.source import Rows, Source
from trl.trainer.configuration import Setting, choose, require
from trl.trainer.rollout_trainer import RolloutConfig, RolloutTrainer, limit_whole
from trl.trainer.settings import accepted, rename


@dataclass
class DistillationConfig(RolloutConfig):
    """`TrainingArguments` and the settings of distillation."""

    num_generations: int = field(default=1)
    """completions of each prompt"""
    beta: float = field(default=1.0)
    """generalised Jensen-Shannon divergence: 0 is the forward KL(teacher || student), 1 the reverse KL"""
    lmbda: float = field(default=1.0)
    """share of the prompts that the student completes; the others take the data set's `completion`"""
    teacher_model_name_or_path: str | None = field(default=None)
    """name or folder of the teacher, if it is not given as an object"""
    teacher_model_init_kwargs: dict[str, Any] | None = field(default=None)
    """keywords of `from_pretrained` for a teacher given by name"""
    teacher_model_revision: str | None = field(default=None)
    """branch, tag or commit of a teacher given by name"""

    def validate(self) -> None:
        super().validate()
        require(self, "beta", 0 <= self.beta <= 1, "give a number in [0, 1]")
        require(self, "lmbda", 0 <= self.lmbda <= 1, "give a share in [0, 1]")


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
    """share of the prompts that the student completes; the others take the data set's `completion`"""
    max_completion_length: int = field(default=128)
    """longest completion in tokens"""
    max_new_tokens: int | None = accepted("max_new_tokens")
    learning_rate: float = field(default=2e-5)
    """initial learning rate"""
    seq_kd: bool = field(default=False)
    """learn the teacher's own completions: not supported, raises"""
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
    activation_offloading: bool = accepted("activation_offloading", False)

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
        way_out = "sample the teacher's completions first, give them as column `completion`, and set lmbda=0"
        require(self, "seq_kd", not self.seq_kd, way_out)


class DistillationTrainer(RolloutTrainer):
    """Teach a student by a teacher with the same vocabulary (generalised knowledge distillation, arXiv:2306.13649).

    `train_dataset` has a column `prompt`, and `completion` if `lmbda < 1` (or `messages`, whose last one it is). The
    divergence is between the distributions at temperature 1, whatever the sampling temperature.
    """

    _tag_names = ("trl", "distillation")
    config_class = DistillationConfig
    needs_rewards = False
    beta = Setting()
    lmbda = Setting(fixed="the source of the rollouts is made for it")

    @property
    def teacher_model(self) -> nn.Module:
        """The teacher, by the name of the constructor's argument."""
        return self.teacher

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
        super().__init__(
            model,
            None,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            **kwargs,
        )
        self.teacher = self._teacher(teacher_model)

    def with_prompt(self, dataset: Any, name: str) -> Any:
        """Rows of whole conversations as prompt and completion: their last message."""
        names = column_names(dataset, name)
        if "messages" in names:
            return mapped_rows(dataset, _in_two, f"Splitting the {name} data", remove_columns=["messages"])
        if self.args.lmbda < 1 and "completion" not in names:
            raise ValueError(f"lmbda={self.args.lmbda}: needs a column `completion`; found {', '.join(names)}")
        return dataset

    def _teacher(self, given: nn.Module | str | None) -> nn.Module:
        config = self.args
        named = config.teacher_model_name_or_path
        if (given is None) == (named is None) and given != named:
            raise ValueError("teacher_model: give the teacher, or its name as teacher_model_name_or_path; not both")
        source = named if given is None else given
        if source is None:
            raise ValueError("teacher_model: give the teacher, or its name as teacher_model_name_or_path")
        if source is self.model:
            raise ValueError("teacher_model: it is the student itself; load it a second time, or give a copy")
        like = frozen_dtype(self.model, self.accelerator.mixed_precision)
        keywords = self._teacher_keywords(source)
        teacher: Any = load_model(source, AutoModelForCausalLM, keywords, frozen=True, like=like)
        sizes = [m.get_output_embeddings().weight.shape[0] for m in (teacher, self.model)]  # type: ignore[operator]
        if min(sizes) < len(self.processing_class):
            raise ValueError(
                f"teacher_model: vocabularies of {sizes[0]} (teacher) and {sizes[1]} (student) for a tokenizer of "
                f"{len(self.processing_class)}: both must read the same tokens"
            )
        teacher.requires_grad_(False).eval()
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def frozen_models(self) -> list[nn.Module]:
        return [*super().frozen_models(), self.teacher]

    def _teacher_keywords(self, source: nn.Module | str) -> dict[str, Any]:
        config = self.args
        keywords = dict(config.teacher_model_init_kwargs or {})
        if isinstance(source, str):
            keywords |= {"revision": config.teacher_model_revision} if config.teacher_model_revision else {}
            keywords |= {"trust_remote_code": True} if config.trust_remote_code else {}
        return keywords

    # -- samples, the student's own or the data set's --------------------------------------------

    def make_source(self) -> Source:
        config = self.args
        template = config.chat_template_kwargs
        return MixedSource(
            super().make_source(), config.lmbda, self.processing_class, config.max_completion_length, template
        )

    def experience(
        self, rollout: Rollout, rewards: Rewards, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[Experience, dict[str, list[float]]]:
        return Experience.of(rollout, advantages=torch.zeros(len(rollout))), {}

    # -- objective -------------------------------------------------------------------------------

    def policy_objective(self, model: nn.Module, batch: PolicyBatch) -> LossSum:
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

    def evaluated(
        self, model: nn.Module, rollout: Rollout, rewards: Rewards, rows: Sequence[Mapping[str, Any]]
    ) -> LossSum:
        batch = self._collate(self.experience(rollout, rewards, rows)[0])["policy"].to(self.args.device)
        return self.objective(model, {"policy": batch})


@dataclass
class MixedSource:
    """The student's own completions for a random share of the prompts, the data set's for the others."""

    own: Source
    share: float
    tokenizer: Any
    longest: int
    """most tokens of a completion"""
    template_kwargs: dict[str, Any] | None

    @cached_property
    def _encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer)

    def draw(self, rows: Rows, group: int = 1, seed: int | None = None, places: Sequence[int] | None = None) -> Rollout:
        generator, at = torch.Generator().manual_seed((seed or 0) % 2**63), places or range(len(rows))
        draws = torch.rand(max(at) + 1, generator=generator).tolist()
        own = [draws[place] < self.share for place in at]
        asked = [row for row, is_own in zip(rows, own, strict=True) if is_own]
        theirs = None if places is None else [place for place, is_own in zip(at, own, strict=True) if is_own]
        sampled = self.own.draw(asked, group, seed, theirs) if asked else Rollout([], [], [], [])
        cut = sampled.metadata.get("truncated", [False] * len(sampled))
        samples = iter(zip(sampled.completions, cut, strict=True))
        rollout = Rollout([], [], [], [], metadata={"truncated": []})
        for row, is_own in zip(rows, own, strict=True):
            given = None if is_own else self._completion(row)
            for _ in range(group):
                ids, truncated = next(samples) if given is None else given
                rollout.prompts.append(list(row["prompt_ids"]))
                rollout.completions.append(ids)
                rollout.metadata["truncated"].append(truncated)
        rollout.masks = [[1] * len(ids) for ids in rollout.completions]
        rollout.logprobs = [[0.0] * len(ids) for ids in rollout.completions]  # distillation does not read them
        return rollout

    def _completion(self, row: Mapping[str, Any]) -> tuple[list[int], bool]:
        """The data set's completion, and whether it was cut to the limit."""
        if isinstance(row["completion"], str):
            ids = self._encoder.encode([row["completion"]])[0] + self._encoder.tail
        else:
            template = ChatTemplate(self.tokenizer, self.template_kwargs)
            ids = self._encoder.encode(template.split(row["prompt"], [row["completion"]]).answers)[0]
        return ids[: self.longest], len(ids) > self.longest


class GKDTrainer(DistillationTrainer):
    """`DistillationTrainer` with the defaults of GKD: half of the completions from the data set, beta 0.5."""

    config_class = GKDConfig


def _in_two(row: Mapping[str, Any]) -> dict[str, Any]:
    others = {name: value for name, value in row.items() if name != "messages"}
    return {**others, "prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
