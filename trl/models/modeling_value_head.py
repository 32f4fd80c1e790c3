"""Language models with a value head: the policy and its critic in one body."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.utils import WEIGHTS_NAME

from trl.models.modeling_base import PreTrainedModelWrapper
from trl.models.unwrap import accepts
from trl.models.weight_files import belongs


class ValueHead(nn.Module):
    """A scalar for every position: dropout, then a linear layer in its own (float32) precision."""

    def __init__(self, config: Any, **kwargs: Any):
        super().__init__()
        rate = getattr(config, "summary_dropout_prob", kwargs.get("summary_dropout_prob", 0.1))
        self.dropout = nn.Dropout(rate) if rate else nn.Identity()
        self.summary = nn.Linear(_head_width(config), 1)
        self.flatten = nn.Flatten()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, D] to [B, T, 1]."""
        return self.summary(self.dropout(hidden_states).to(self.summary.weight.dtype))


def _cache_name(model: Any) -> str:
    """The name of the forward's argument for cached keys and values, which transformers 5.24 changed."""
    return "cache" if accepts(model, "cache") else "past_key_values"


def _head_width(config: Any) -> int:
    """Width of the states that reach the language-model head."""
    if getattr(config, "word_embed_proj_dim", None):  # OPT projects its states back to the embedding's width
        return config.word_embed_proj_dim
    decoder: Any = getattr(config, "decoder", None)
    if getattr(config, "is_encoder_decoder", False) and hasattr(decoder, "hidden_size"):
        return decoder.hidden_size
    return config.hidden_size if hasattr(config, "hidden_size") else config.get_text_config(decoder=True).hidden_size


class _WithValueHead(PreTrainedModelWrapper):
    """What the causal and the encoder-decoder model share."""

    lm_head_namings: ClassVar[list[str]] = ["lm_head", "embed_out"]
    supported_args = ("summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy")

    def __init__(self, pretrained_model: Any, **kwargs: Any):
        head_kwargs, wrapper_kwargs, _ = self._split_kwargs(kwargs)
        super().__init__(pretrained_model, **wrapper_kwargs)
        if not self._has_lm_head(pretrained_model):
            raise ValueError("The model does not have a language model head, please use a model that has one.")
        self.v_head = ValueHead(self.config, **head_kwargs)
        self._init_weights(**head_kwargs)

    def _has_lm_head(self, model: nn.Module) -> bool:
        raise NotImplementedError

    def _init_weights(
        self, v_head_init_strategy: str | None = None, v_head_initializer_range: float = 0.2, **_: Any
    ) -> None:
        if v_head_init_strategy == "normal":
            nn.init.normal_(self.v_head.summary.weight, mean=0.0, std=v_head_initializer_range)
            nn.init.zeros_(self.v_head.summary.bias)
        elif v_head_init_strategy is not None:
            raise ValueError(f'v_head_init_strategy={v_head_init_strategy!r} is not known: use None or "normal"')

    def _run(self, **inputs: Any) -> Any:
        """The inner model's output, hidden states included."""
        past = inputs.pop("past_key_values")
        prefix = self.is_peft_model and self.pretrained_model.active_peft_config.peft_type == "PREFIX_TUNING"
        if past is not None and not prefix:
            inputs[_cache_name(self.pretrained_model)] = past
        return self.pretrained_model(**(inputs | {"output_hidden_states": True, "return_dict": True}))

    def _outputs(self, logits: Tensor, loss: Tensor | None, hidden: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        hidden = hidden.to(self.v_head.summary.weight.device)
        return logits.float(), loss, self.v_head(hidden).squeeze(-1)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The inner model's `generate`."""
        return self.pretrained_model.generate(*args, **kwargs)

    def state_dict(  # type: ignore[override]
        self, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The inner model's tensors under their own names, and `v_head.*`; of a PEFT model `v_head.*` alone."""
        if not self.is_peft_model:
            destination = self.pretrained_model.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        return self.v_head.state_dict(destination=destination, prefix=f"{prefix}v_head.", keep_vars=keep_vars)  # type: ignore[arg-type]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load what `state_dict` gives, also below DDP; the names of `named_parameters` are accepted too."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name = key.removeprefix(prefix)
            if name.split(".")[0] not in self._modules:
                state_dict[f"{prefix}pretrained_model.{name}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Upload the model with its value head; arguments are those of the inner model's `push_to_hub`."""
        self.pretrained_model.v_head = self.v_head
        try:
            done = self.pretrained_model.push_to_hub(*args, **kwargs)
        finally:
            del self.pretrained_model.v_head
        if self.is_peft_model:  # its `push_to_hub` takes the adapter alone
            self._upload_head(*args, **kwargs)
        return done

    def _upload_head(self, repo_id: str, **kwargs: Any) -> None:
        buffer = io.BytesIO()
        torch.save(self.state_dict(), buffer)
        where = {name: kwargs[name] for name in ("revision", "create_pr", "token") if name in kwargs}
        HfApi().upload_file(path_or_fileobj=buffer.getvalue(), path_in_repo=WEIGHTS_NAME, repo_id=repo_id, **where)

    def post_init(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load the value head's tensors, and put the head where the last layers of a dispatched model are."""
        head = {key.removeprefix("v_head."): value for key, value in state_dict.items() if belongs(key, ("v_head",))}
        self.v_head.load_state_dict(head, strict=False)
        device_map = getattr(self.pretrained_model, "hf_device_map", None)
        if device_map:
            self._follow_device_map(device_map)

    def _follow_device_map(self, device_map: Mapping[str, Any]) -> None:
        devices = list(device_map.values())
        kinds = {str(device) for device in devices}
        if "disk" in kinds or ("cpu" in kinds and len(kinds) > 1):  # all on the CPU is not offloading
            raise ValueError(
                "The model is offloaded on CPU or disk - CPU & disk offloading is not supported for ValueHead models."
            )
        first = devices[0]
        of_head = next(
            (where for name, where in device_map.items() if name.split(".")[-1] in self.lm_head_namings), first
        )
        self.v_head = self.v_head.to(of_head)

        def to_first(module: nn.Module, inputs: Any, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(each.to(first) if isinstance(each, Tensor) else each for each in outputs)

        self.register_forward_hook(to_first)
        self.is_sequential_parallel = True


class AutoModelForCausalLMWithValueHead(_WithValueHead):
    """A causal language model that also gives a value to each position."""

    transformers_parent_class = AutoModelForCausalLM

    def _has_lm_head(self, model: nn.Module) -> bool:
        named = any(hasattr(model, name) for name in self.lm_head_namings)
        return named or getattr(model, "get_output_embeddings", lambda: None)() is not None  # RWKV's is `head`

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(logits [B, T, V] in float32, loss or None, values [B, T]); keywords go to the inner model."""
        output = self._run(
            input_ids=input_ids, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
        )
        return self._outputs(output.logits, output.loss, output.hidden_states[-1])


class AutoModelForSeq2SeqLMWithValueHead(_WithValueHead):
    """An encoder-decoder language model that also gives a value to each position of the decoder."""

    transformers_parent_class = AutoModelForSeq2SeqLM
    lm_head_namings: ClassVar[list[str]] = ["lm_head", "embed_out", "output_projection"]

    def __init__(self, pretrained_model: Any, **kwargs: Any):
        super().__init__(pretrained_model, **kwargs)
        self.is_encoder_decoder = True

    def _has_lm_head(self, model: nn.Module) -> bool:
        return any(part in name for name, _ in model.named_modules() for part in self.lm_head_namings)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(the decoder's logits [B, T, V] in float32, loss or None, values [B, T])."""
        output = self._run(
            input_ids=input_ids, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
        )
        return self._outputs(output.logits, output.loss, output.decoder_hidden_states[-1])


SUPPORTED_ARCHITECTURES = (AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead)
