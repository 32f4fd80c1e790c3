"""A diffusion model of handwritten digits that needs no download: 8x8 pixels, class-conditioned, trained in a minute.

It is trained on the 1,797 real digits that scikit-learn carries and stands behind the same protocol as Stable
Diffusion, so everything that `DDPOTrainer` does can be tried on a laptop CPU.
"""

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from trl.core import randn_tensor
from trl.models.ddim import DDPOSchedulerOutput, Generators, denoise, predict_noise, scheduler_step
from trl.models.modeling_sd_base import DDPOPipelineOutput, DDPOStableDiffusionPipeline, only_model

try:
    from diffusers import ConfigMixin, DDIMScheduler, ModelMixin, UNet2DModel
    from diffusers.configuration_utils import register_to_config
    from diffusers.image_processor import VaeImageProcessor
    from tqdm.auto import tqdm
except ImportError as error:
    raise ImportError("diffusion pipelines need diffusers: pip install diffusers peft") from error

NOTHING = 10
"""the class of the empty prompt"""


class DigitsTokenizer:
    """Prompts that name one digit ("7", "a 7", "seven"), or none at all, to one token each."""

    model_max_length = 1
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

    def __call__(self, prompts: str | Sequence[str], **_: Any) -> SimpleNamespace:
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return SimpleNamespace(input_ids=torch.tensor([[self.digit(prompt)] for prompt in prompts]))

    def digit(self, prompt: str) -> int:
        """The digit that a prompt asks for; `NOTHING` for an empty one."""
        named = re.findall(rf"\b(?:\d|{'|'.join(self.words)})\b", prompt.lower())
        if len(named) > 1 or (prompt.strip() and not named):
            raise ValueError(f"prompt={prompt!r}: name one digit, as 7 or seven, or nothing")
        if not named:
            return NOTHING
        return int(named[0]) if named[0].isdigit() else self.words.index(named[0])

    def batch_decode(self, ids: Tensor, **_: Any) -> list[str]:
        return ["" if row == NOTHING else str(row) for row in ids[:, 0].tolist()]


class DigitsTextEncoder(ModelMixin, ConfigMixin):
    """Ids [B, 1] to a tuple of embeddings [B, 1, D]."""

    @register_to_config
    def __init__(self, dimension: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NOTHING + 1, dimension)

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        return (self.embedding(ids),)


class DigitsUNet(UNet2DModel):
    """`UNet2DModel` that is called as Stable Diffusion's is: the embedding [B, 1, D] joins the timestep's."""

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        return super().forward(sample, timestep, class_labels=encoder_hidden_states[:, 0], **kwargs)


def digits_unet(width: int = 32) -> DigitsUNet:
    """8x8 and 4x4; 0.7 million weights at width 32. Embeddings are 4 x `width`."""
    return DigitsUNet(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(width, 2 * width),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
        class_embed_type="identity",
    )


class DDPODigitsPipeline(DDPOStableDiffusionPipeline):
    """The digits model behind the protocol that `DDPOTrainer` trains."""

    def __init__(self, unet: DigitsUNet, text_encoder: DigitsTextEncoder) -> None:
        self._unet, self._text_encoder = unet, text_encoder.requires_grad_(False)
        self._tokenizer = DigitsTokenizer()
        # A policy needs draws of comparable width. With the usual 1,000 timesteps 20 steps of sampling end in one that
        # is a hundred times narrower than it moves the image, and whose likelihood drowns the others; 100 do not. The
        # offset makes timestep 1 the last one, which is a draw too.
        self._scheduler = DDIMScheduler(
            num_train_timesteps=100,
            beta_start=0.005,
            beta_end=0.15,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        self._bar: dict[str, Any] = {}

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 2.0,
        negative_prompt: str = "",
        eta: float = 1.0,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
    ) -> DDPOPipelineOutput:
        """Sample; images are [B, 1, 8, 8] in 0..1 for `output_type="pt"`."""
        if prompt is not None and prompt_embeds is None:
            prompt_embeds = self._embed(prompt)
        elif prompt is not None or prompt_embeds is None:
            raise ValueError("give either prompt or prompt_embeds")
        if guidance_scale > 1:
            if negative_prompt_embeds is None:
                negative_prompt_embeds = self._embed([negative_prompt] * len(prompt_embeds))
            embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        else:
            embeds = prompt_embeds
        device, size = prompt_embeds.device, self.unet.config.sample_size
        if latents is None:
            shape = (len(prompt_embeds), 1, size, size)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=prompt_embeds.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        with tqdm(total=num_inference_steps, **self._bar) as bar:
            trajectory, log_probs = denoise(
                self.scheduler,
                lambda x, t: predict_noise(self.unet, x, t, embeds, guidance_scale),
                latents,
                eta=eta,
                generator=generator,
                after_step=lambda *_: bar.update(),
            )
        images = VaeImageProcessor(vae_scale_factor=1).postprocess(trajectory[-1], output_type=output_type)
        return DDPOPipelineOutput(images, trajectory, log_probs)

    def _embed(self, prompts: str | Sequence[str]) -> Tensor:
        return self.text_encoder(self.tokenizer(prompts).input_ids.to(self.unet.device))[0]

    def scheduler_step(self, *args: Any, **kwargs: Any) -> DDPOSchedulerOutput:
        return scheduler_step(self.scheduler, *args, **kwargs)

    @property
    def unet(self) -> DigitsUNet:
        return self._unet

    @property
    def vae(self) -> None:
        """None: the latents are the pixels."""

    @property
    def tokenizer(self) -> DigitsTokenizer:
        return self._tokenizer

    @property
    def scheduler(self) -> DDIMScheduler:
        return self._scheduler

    @property
    def text_encoder(self) -> DigitsTextEncoder:
        return self._text_encoder

    @property
    def autocast(self) -> Callable[..., contextlib.AbstractContextManager] | None:
        return None

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        self._bar = kwargs

    def get_trainable_layers(self) -> DigitsUNet:
        return self.unet

    def save_pretrained(self, output_dir: str) -> None:
        self.unet.save_pretrained(os.path.join(output_dir, "unet"))
        self.text_encoder.save_pretrained(os.path.join(output_dir, "text_encoder"))

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> "DDPODigitsPipeline":
        """Load what `save_pretrained` wrote."""
        return cls(
            DigitsUNet.from_pretrained(directory, subfolder="unet"),
            DigitsTextEncoder.from_pretrained(directory, subfolder="text_encoder"),
        )

    def save_checkpoint(self, models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        self._known(only_model(models)).save_pretrained(os.path.join(output_dir, "unet"))

    def load_checkpoint(self, models: list[nn.Module], input_dir: str) -> None:
        model = self._known(only_model(models))
        model.load_state_dict(DigitsUNet.from_pretrained(input_dir, subfolder="unet").state_dict())

    def _known(self, model: nn.Module) -> DigitsUNet:
        if not isinstance(model, DigitsUNet):
            raise ValueError(f"Unknown model type {type(model)}: this pipeline trains a DigitsUNet")
        return model
