"""One denoising step as an action of a policy: DDIM with the log-probability of where the step went.

A diffusion sampler is a Markov chain of Gaussians, `p(x_prev | x_t) = N(mean(x_t, t), std(t)^2)`. DDPO
(arXiv:2305.13301) is policy gradient on that chain: the state is `x_t`, the action is `x_prev`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trl.core import randn_tensor

Generators = torch.Generator | list[torch.Generator]


@dataclass
class DDPOSchedulerOutput:
    """Where one denoising step went, and how likely that was."""

    latents: Tensor
    """[B, ...] in the sample's dtype"""
    log_probs: Tensor
    """[B] float32, the mean over all other dimensions"""


class DenoisingDistribution(NamedTuple):
    """The Gaussian that a denoising step draws from; float32, both of the sample's shape."""

    mean: Tensor
    std: Tensor

    def log_prob(self, latents: Tensor) -> Tensor:
        """Log density of `latents`, averaged over all dimensions but the first; 0 where nothing is drawn. [B]

        A step with std 0 (`eta=0`, or the last step of a schedule that ends in timestep 0) is not a draw: it has no
        density, and counts for nothing in the likelihood of the trajectory.
        """
        drawn = self.std > 0
        std = torch.where(drawn, self.std, torch.ones_like(self.std))
        density = -((latents.detach().float() - self.mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
        return torch.where(drawn, density, torch.zeros_like(density)).flatten(1).mean(1)


def _left_broadcast(input_tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Append singleton dimensions to the right until the tensor broadcasts to `shape`, then broadcast it."""
    missing = len(shape) - input_tensor.ndim
    if missing < 0:
        raise ValueError(
            f"a tensor of {input_tensor.ndim} dimensions cannot be broadcast from the left to the {len(shape)} of "
            f"{tuple(shape)}: pass one with at most that many"
        )
    return input_tensor.reshape(input_tensor.shape + (1,) * missing).broadcast_to(tuple(shape))


def _signal(scheduler: Any, timestep: Tensor, prev_timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Cumulative products of alpha at both timesteps, on their device."""
    alphas = scheduler.alphas_cumprod.to(timestep.device)
    final = torch.as_tensor(scheduler.final_alpha_cumprod, dtype=alphas.dtype, device=alphas.device)
    return alphas[timestep], torch.where(prev_timestep >= 0, alphas[prev_timestep.clamp(min=0)], final)


def _get_variance(scheduler: Any, timestep: Tensor, prev_timestep: Tensor) -> Tensor:
    """Variance of the DDIM step at eta = 1, eq. 16 of arXiv:2010.02502."""
    alpha, alpha_prev = _signal(scheduler, timestep, prev_timestep)
    return (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)


def _original_sample(scheduler: Any, output: Tensor, sample: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """What the model says of the noiseless sample, and of the noise."""
    kind, signal, noise = scheduler.config.prediction_type, alpha.sqrt(), (1 - alpha).sqrt()
    if kind == "epsilon":
        return (sample - noise * output) / signal, output
    if kind == "sample":
        return output, (sample - signal * output) / noise
    if kind == "v_prediction":
        return signal * sample - noise * output, signal * output + noise * sample
    raise ValueError(f"prediction_type={kind!r}: choose 'epsilon', 'sample' or 'v_prediction'")


def denoising_distribution(
    scheduler: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
) -> DenoisingDistribution:
    """Mean and standard deviation of one DDIM step, eq. 12 and 16 of arXiv:2010.02502.

    `timestep` is a [] or [B] tensor. float16 and bfloat16 are computed in float32: the density of a small step
    does not survive half precision.
    """
    if scheduler.num_inference_steps is None:
        raise ValueError("Number of inference steps is 'None': run `scheduler.set_timesteps(n)` before the first step")
    timestep = torch.as_tensor(timestep, device=sample.device)
    trained = scheduler.config.num_train_timesteps
    prev_timestep = (timestep - trained // scheduler.num_inference_steps).clamp(0, trained - 1)
    output, latents = model_output.float(), sample.float()
    alpha, alpha_prev = (_left_broadcast(a, sample.shape) for a in _signal(scheduler, timestep, prev_timestep))

    original, noise = _original_sample(scheduler, output, latents, alpha)
    if scheduler.config.thresholding:
        original = scheduler._threshold_sample(original)
    elif scheduler.config.clip_sample:
        original = original.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)
    if use_clipped_model_output:
        noise = (latents - alpha.sqrt() * original) / (1 - alpha).sqrt()

    variance = _left_broadcast(_get_variance(scheduler, timestep, prev_timestep), sample.shape)
    std = eta * variance.sqrt()
    mean = alpha_prev.sqrt() * original + (1 - alpha_prev - std**2).clamp(min=0).sqrt() * noise
    return DenoisingDistribution(mean, std)


def scheduler_step(
    scheduler: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    generator: Generators | None = None,
    prev_sample: Tensor | None = None,
) -> DDPOSchedulerOutput:
    """Draw the next latents, or take `prev_sample` as drawn, and give their log-probability.

    The density is taken of the latents as they are kept (after the cast to the sample's dtype), so scoring a stored
    trajectory gives what sampling it gave.
    """
    if prev_sample is not None and generator is not None:
        raise ValueError("Cannot pass both generator and prev_sample: a step is either drawn or given")
    gaussian = denoising_distribution(scheduler, model_output, timestep, sample, eta, use_clipped_model_output)
    if prev_sample is None:
        noise = randn_tensor(
            model_output.shape, generator=generator, device=model_output.device, dtype=gaussian.mean.dtype
        )
        prev_sample = gaussian.mean + gaussian.std * noise
    latents = prev_sample.to(sample.dtype)
    return DDPOSchedulerOutput(latents, gaussian.log_prob(latents))


def predict_noise(
    unet: nn.Module,
    latents: Tensor,
    timestep: Tensor,
    embeds: Tensor,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
    **unet_kwargs: Any,
) -> Tensor:
    """The UNet's output, with classifier-free guidance where `embeds` has two rows for each latent (negatives first).

    Sampling and training call this same function: guidance is part of the policy. `guidance_rescale` is section 3.4
    of arXiv:2305.08891.
    """
    if len(embeds) == len(latents):
        return unet(latents, timestep, embeds, **unet_kwargs).sample
    if len(embeds) != 2 * len(latents):
        raise ValueError(f"{len(embeds)} embeddings for {len(latents)} latents: pass as many, or twice as many")
    both = timestep if timestep.ndim == 0 else torch.cat([timestep, timestep])
    negative, positive = unet(torch.cat([latents, latents]), both, embeds, **unet_kwargs).sample.chunk(2)
    guided = negative + guidance_scale * (positive - negative)
    if guidance_rescale > 0:
        dims = list(range(1, positive.ndim))
        rescaled = guided * positive.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
        guided = guidance_rescale * rescaled + (1 - guidance_rescale) * guided
    return guided


@torch.no_grad()
def denoise(
    scheduler: Any,
    predict: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    *,
    eta: float,
    generator: Generators | None = None,
    after_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Walk `scheduler.timesteps`; `predict(latents, timestep)` is the model.

    Returns the N + 1 latents and the N log-probabilities ([B] each) of the trajectory.
    """
    trajectory, log_probs = [latents], []
    for index, timestep in enumerate(scheduler.timesteps):
        output = predict(latents, timestep)
        step = scheduler_step(scheduler, output, timestep, latents, eta, generator=generator)
        latents = step.latents
        trajectory.append(latents)
        log_probs.append(step.log_probs)
        if after_step is not None:
            after_step(index, timestep, latents)
    return trajectory, log_probs
