"""The protocol of a pipeline that DDPO trains, and Stable Diffusion (full or LoRA) as the default one."""

import contextlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trl.import_utils import pip_install
from trl.models.ddim import (
    DDPOSchedulerOutput,
    DenoisingDistribution,
    Generators,
    _get_variance,
    _left_broadcast,
    denoise,
    denoising_distribution,
    predict_noise,
    scheduler_step,
)

try:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
except ImportError as error:
    raise ImportError(f"diffusion pipelines need diffusers: {pip_install('diffusers', 'peft')}") from error

__all__ = [
    "DDPOPipelineOutput",
    "DDPOSchedulerOutput",
    "DDPOStableDiffusionPipeline",
    "DefaultDDPOStableDiffusionPipeline",
    "DenoisingDistribution",
    "_get_variance",
    "_left_broadcast",
    "denoise",
    "denoising_distribution",
    "only_model",
    "pipeline_step",
    "predict_noise",
    "scheduler_step",
]


@dataclass
class DDPOPipelineOutput:
    """Images, and the trajectories that led to them."""

    images: Any
    """what `output_type` asks for: a list of PIL images, [B, C, H, W] or [B, H, W, C] in 0..1, or latents"""
    latents: list[Tensor]
    """N + 1 tensors [B, ...], noise first"""
    log_probs: list[Tensor]
    """N tensors [B]"""


class DDPOStableDiffusionPipeline:
    """What `DDPOTrainer` asks of a pipeline. The trainer knows no model: this is all it sees.

    `unet(latents, timesteps, embeds).sample` predicts, `text_encoder(tokenizer(prompts, ...).input_ids)[0]` embeds,
    calling the pipeline samples. `vae` may be None, and `autocast` too: then accelerate's is used.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> DDPOPipelineOutput:
        """Sample; keywords as `pipeline_step` has them."""
        raise NotImplementedError

    def scheduler_step(self, *args: Any, **kwargs: Any) -> DDPOSchedulerOutput:
        """One denoising step with its log-probability; `scheduler_step` without its first argument."""
        raise NotImplementedError

    @property
    def unet(self) -> Any:
        """The denoiser."""
        raise NotImplementedError

    @property
    def vae(self) -> Any:
        """The latents' decoder, or None."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> Any:
        raise NotImplementedError

    @property
    def scheduler(self) -> Any:
        raise NotImplementedError

    @property
    def text_encoder(self) -> Any:
        raise NotImplementedError

    @property
    def autocast(self) -> Callable[..., contextlib.AbstractContextManager] | None:
        """The context that forward passes run in; None leaves it to accelerate."""
        raise NotImplementedError

    def set_progress_bar_config(self, *args: Any, **kwargs: Any) -> None:
        """tqdm's keywords for the bar over the denoising steps."""
        raise NotImplementedError

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Write what can be loaded and used."""
        raise NotImplementedError

    def get_trainable_layers(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The module whose parameters with `requires_grad` are trained."""
        raise NotImplementedError

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """`(models, weights, output_dir)`: write the trained weights of a checkpoint."""
        raise NotImplementedError

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """`(models, input_dir)`: read them back, in place."""
        raise NotImplementedError


def only_model(models: list[nn.Module]) -> nn.Module:
    """The one model that a pipeline trains."""
    if len(models) != 1:
        raise ValueError(
            f"Given how the trainable params were set, this should be of length 1: got {len(models)} models"
        )
    return models[0]


@torch.no_grad()
def pipeline_step(
    pipe: StableDiffusionPipeline,
    prompt: str | list[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: str | list[str] | None = None,
    num_images_per_prompt: int = 1,
    eta: float = 0.0,
    generator: Generators | None = None,
    latents: Tensor | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    output_type: str = "pil",
    return_dict: bool = True,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    callback_steps: int = 1,
    cross_attention_kwargs: dict[str, Any] | None = None,
    guidance_rescale: float = 0.0,
) -> DDPOPipelineOutput | tuple[Any, list[Tensor], list[Tensor]]:
    """Sample from a `StableDiffusionPipeline` and keep the trajectory; classifier-free guidance above scale 1.

    `return_dict=False` gives `(images, latents, log_probs)`. `callback(step, timestep, latents)` is called every
    `callback_steps` steps.
    """
    size = pipe.unet.config.sample_size
    unet_height, unet_width = (size, size) if isinstance(size, int) else size
    height, width = height or unet_height * pipe.vae_scale_factor, width or unet_width * pipe.vae_scale_factor
    pipe.check_inputs(
        prompt, height, width, callback_steps, negative_prompt, prompt_embeds, negative_prompt_embeds
    )  # fmt: skip
    guided, device = guidance_scale > 1.0, pipe._execution_device
    prompt_embeds, negative_prompt_embeds = pipe.encode_prompt(
        prompt,
        device,
        num_images_per_prompt,
        guided,
        negative_prompt,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        lora_scale=(cross_attention_kwargs or {}).get("scale"),
    )
    embeds = torch.cat([negative_prompt_embeds, prompt_embeds]) if guided else prompt_embeds
    pipe.scheduler.set_timesteps(num_inference_steps, device=device)
    latents = pipe.prepare_latents(
        len(prompt_embeds), pipe.unet.config.in_channels, height, width, prompt_embeds.dtype, device, generator, latents
    )

    with pipe.progress_bar(total=len(pipe.scheduler.timesteps)) as bar:

        def after_step(index: int, timestep: Tensor, latents: Tensor) -> None:
            bar.update()
            if callback is not None and index % callback_steps == 0:
                callback(index, timestep, latents)

        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            keywords = {"cross_attention_kwargs": cross_attention_kwargs}
            return predict_noise(pipe.unet, latents, timestep, embeds, guidance_scale, guidance_rescale, **keywords)

        trajectory, log_probs = denoise(
            pipe.scheduler, predict, latents, eta=eta, generator=generator, after_step=after_step
        )

    images = _decode(pipe, trajectory[-1], prompt_embeds.dtype, output_type, generator)
    pipe.maybe_free_model_hooks()
    return DDPOPipelineOutput(images, trajectory, log_probs) if return_dict else (images, trajectory, log_probs)


def _decode(
    pipe: StableDiffusionPipeline, latents: Tensor, dtype: torch.dtype, output_type: str, generator: Generators | None
) -> Any:
    """Latents to images, through the safety checker where the pipeline has one."""
    if output_type == "latent":
        return latents
    scaled = (latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)
    images = pipe.vae.decode(scaled, return_dict=False, generator=generator)[0]
    images, unsafe = pipe.run_safety_checker(images, latents.device, dtype)
    denormalize = [True] * len(images) if unsafe is None else [not flag for flag in unsafe]
    return pipe.image_processor.postprocess(images, output_type=output_type, do_denormalize=denormalize)


class DefaultDDPOStableDiffusionPipeline(DDPOStableDiffusionPipeline):
    """Stable Diffusion, sampled by DDIM; trained whole, or as LoRA adapters of rank 4 on the UNet's attention.

    LoRA weights that lie with the pretrained model are picked up and trained further.
    """

    adapter_name = "default"

    def __init__(
        self, pretrained_model_name: str, *, pretrained_model_revision: str = "main", use_lora: bool = True
    ) -> None:
        self.sd_pipeline = StableDiffusionPipeline.from_pretrained(
            pretrained_model_name, revision=pretrained_model_revision
        )
        self.pretrained_model = pretrained_model_name
        self.pretrained_revision = pretrained_model_revision
        self.use_lora = self._load_lora(pretrained_model_name, pretrained_model_revision, use_lora)
        self.sd_pipeline.scheduler = DDIMScheduler.from_config(self.sd_pipeline.scheduler.config)
        self.sd_pipeline.safety_checker = None
        self.sd_pipeline.register_to_config(requires_safety_checker=False)
        self.sd_pipeline.vae.requires_grad_(False)
        self.sd_pipeline.text_encoder.requires_grad_(False)
        self.sd_pipeline.unet.requires_grad_(not self.use_lora)

    def _load_lora(self, name: str, revision: str, wanted: bool) -> bool:
        """Load LoRA weights that lie with the pretrained model; whether LoRA is trained."""
        try:
            self.sd_pipeline.load_lora_weights(
                name, revision=revision, weight_name=LORA_WEIGHT_NAME_SAFE, adapter_name=self.adapter_name
            )
            return True
        except OSError:
            if wanted:
                warnings.warn(
                    "If you are aware that the pretrained model has no lora weights to it, ignore this message. "
                    f"Otherwise please check that {LORA_WEIGHT_NAME_SAFE} lies in {name!r}."
                )
            return wanted

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`pipeline_step` on this pipeline."""
        return pipeline_step(self.sd_pipeline, *args, **kwargs)

    def scheduler_step(self, *args: Any, **kwargs: Any) -> DDPOSchedulerOutput:
        return scheduler_step(self.sd_pipeline.scheduler, *args, **kwargs)

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.sd_pipeline.unet

    @property
    def vae(self) -> Any:
        return self.sd_pipeline.vae

    @property
    def tokenizer(self) -> Any:
        return self.sd_pipeline.tokenizer

    @property
    def scheduler(self) -> DDIMScheduler:
        return self.sd_pipeline.scheduler

    @property
    def text_encoder(self) -> Any:
        return self.sd_pipeline.text_encoder

    @property
    def autocast(self) -> Callable[..., contextlib.AbstractContextManager] | None:
        """With LoRA none: adapters cast by themselves, and autocast costs memory. Else accelerate's."""
        return contextlib.nullcontext if self.use_lora else None

    def set_progress_bar_config(self, *args: Any, **kwargs: Any) -> None:
        self.sd_pipeline.set_progress_bar_config(*args, **kwargs)

    def get_trainable_layers(self) -> UNet2DConditionModel:
        """The UNet; with LoRA only its adapter has gradients, in float32."""
        if self.use_lora:
            from diffusers.training_utils import cast_training_params
            from peft import LoraConfig

            if self.adapter_name not in getattr(self.unet, "peft_config", {}):
                targets = ["to_k", "to_q", "to_v", "to_out.0"]
                config = LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets)
                self.unet.add_adapter(config, adapter_name=self.adapter_name)
            for name, parameter in self.unet.named_parameters():
                parameter.requires_grad_("lora_" in name)
            cast_training_params(self.unet, dtype=torch.float32)
        return self.unet

    def save_checkpoint(self, models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        """LoRA: `pytorch_lora_weights.safetensors`; the whole UNet: a folder `unet`."""
        model = self._known(only_model(models))
        if self.use_lora:
            self._save_lora(model, output_dir)
        else:
            model.save_pretrained(os.path.join(output_dir, "unet"))

    def load_checkpoint(self, models: list[nn.Module], input_dir: str) -> None:
        model = self._known(only_model(models))
        if self.use_lora:
            self._load_adapter(model, input_dir)
        else:
            loaded = UNet2DConditionModel.from_pretrained(input_dir, subfolder="unet")
            model.load_state_dict(loaded.state_dict())

    def save_pretrained(self, output_dir: str) -> None:
        """A pipeline that this class, and diffusers, load; with LoRA the base model, and the adapter beside it."""
        unet = self.unet
        if self.use_lora:
            self._save_lora(unet, output_dir)
            unet = _without_adapter(unet)
        StableDiffusionPipeline(
            **{**self.sd_pipeline.components, "unet": unet}, requires_safety_checker=False
        ).save_pretrained(output_dir)

    def _known(self, model: nn.Module) -> UNet2DConditionModel:
        if not isinstance(model, UNet2DConditionModel):
            raise ValueError(f"Unknown model type {type(model)}: this pipeline trains a UNet2DConditionModel")
        return model

    def _save_lora(self, unet: UNet2DConditionModel, output_dir: str) -> None:
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict

        state = get_peft_model_state_dict(unet, adapter_name=self.adapter_name)
        StableDiffusionPipeline.save_lora_weights(
            output_dir,
            unet_lora_layers=convert_state_dict_to_diffusers(state),
            unet_lora_adapter_metadata=unet.peft_config[self.adapter_name].to_dict(),
        )

    def _load_adapter(self, unet: UNet2DConditionModel, input_dir: str) -> None:
        from diffusers.utils import convert_unet_state_dict_to_peft
        from peft.utils import set_peft_model_state_dict

        saved, _ = StableDiffusionPipeline.lora_state_dict(input_dir, weight_name=LORA_WEIGHT_NAME_SAFE)
        state = {key.removeprefix("unet."): value for key, value in saved.items() if key.startswith("unet.")}
        outcome = set_peft_model_state_dict(
            unet, convert_unet_state_dict_to_peft(state), adapter_name=self.adapter_name
        )
        if outcome.unexpected_keys:
            raise ValueError(f"{input_dir}: LoRA weights of another model: {outcome.unexpected_keys[:3]} ...")


def _without_adapter(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same base weights (shared, not copied) in a UNet that has no adapter."""
    with torch.device("meta"):
        base = UNet2DConditionModel.from_config(unet.config)
    state = {
        name.replace(".base_layer.", "."): value for name, value in unet.state_dict().items() if "lora_" not in name
    }
    base.load_state_dict(state, assign=True)
    return base
