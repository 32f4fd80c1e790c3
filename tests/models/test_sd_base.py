import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from tiny_diffusion import tiny_stable_diffusion

from trl.models.modeling_sd_base import (
    DDPOPipelineOutput,
    DDPOStableDiffusionPipeline,
    DefaultDDPOStableDiffusionPipeline,
    _get_variance,
    _left_broadcast,
    denoising_distribution,
    pipeline_step,
    predict_noise,
    scheduler_step,
)


def ddim(steps=50, **config):
    scheduler = DDIMScheduler(
        **{
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
            "set_alpha_to_one": False, "steps_offset": 1, **config,
        }
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    return scheduler


def waves():
    numbers = torch.arange(8.0)
    return (numbers / 5).sin().view(2, 1, 2, 2), (numbers / 3).cos().view(2, 1, 2, 2)


# --- one step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timesteps", "expected"), [([981, 501], [-0.197854, 0.256474]), ([1, 21], [2.693575, 0.877013])]
)
def test_step_scores_as_the_release(timesteps, expected):
    sample, noise = waves()
    step = scheduler_step(ddim(), noise, torch.tensor(timesteps), sample, eta=1.0, prev_sample=0.99 * sample)
    assert step.log_probs.tolist() == pytest.approx(expected, abs=2e-6)
    torch.testing.assert_close(step.latents, 0.99 * sample)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"clip_sample": True, "clip_sample_range": 0.7},
        {"thresholding": True, "sample_max_value": 0.9},
        {"prediction_type": "sample"},
        {"prediction_type": "v_prediction"},
    ],
    ids=str,
)
@pytest.mark.parametrize("clipped_output", [False, True])
@pytest.mark.parametrize(("timestep", "eta"), [(981, 1.0), (481, 0.3), (21, 1.0), (501, 0.0)])
def test_step_goes_where_diffusers_goes(config, clipped_output, timestep, eta):
    scheduler, (sample, output) = ddim(**config), waves()
    drawn = torch.randn(sample.shape, generator=torch.Generator().manual_seed(1))
    theirs = scheduler.step(output, timestep, sample, eta, clipped_output, variance_noise=drawn).prev_sample
    ours = scheduler_step(
        scheduler, output, torch.tensor(timestep), sample, eta, clipped_output, torch.Generator().manual_seed(1)
    )
    torch.testing.assert_close(ours.latents, theirs)


def test_density_is_the_mean_over_pixels_and_has_no_gradient_through_the_action():
    sample, output = waves()
    output.requires_grad_()
    action = (0.9 * sample).requires_grad_()
    gaussian = denoising_distribution(ddim(), output, torch.tensor([981, 501]), sample, eta=1.0)
    log_prob = gaussian.log_prob(action)
    by_torch = torch.distributions.Normal(gaussian.mean, gaussian.std).log_prob(action.detach())
    torch.testing.assert_close(log_prob, by_torch.mean((1, 2, 3)))
    log_prob.sum().backward()
    assert action.grad is None
    assert output.grad.abs().sum() > 0


@pytest.mark.parametrize(("eta", "steps_offset"), [(0.0, 1), (1.0, 0)])
def test_a_step_that_draws_nothing_has_no_likelihood(eta, steps_offset):
    sample, output = waves()
    output.requires_grad_()
    last = torch.tensor(0) if steps_offset == 0 else torch.tensor(501)
    step = scheduler_step(ddim(steps_offset=steps_offset), output, last, sample, eta=eta)
    assert step.log_probs.tolist() == [0, 0]
    step.log_probs.sum().backward()
    assert output.grad.tolist() == torch.zeros_like(output).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_stored_step_scores_as_it_was_drawn_in_half_precision(dtype):
    sample, output = (x.to(dtype) for x in waves())
    drawn = scheduler_step(ddim(), output, torch.tensor([1, 981]), sample, eta=1.0)
    scored = scheduler_step(ddim(), output, torch.tensor([1, 981]), sample, eta=1.0, prev_sample=drawn.latents)
    assert drawn.latents.dtype == dtype
    assert drawn.log_probs.dtype == torch.float32
    assert torch.equal(drawn.log_probs, scored.log_probs)


def test_a_list_of_generators_gives_every_row_its_own_noise():
    sample, output = waves()
    both = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    step = scheduler_step(ddim(), output, torch.tensor(501), sample, eta=1.0, generator=both)
    for row, seed in enumerate((1, 2)):
        own = torch.Generator().manual_seed(seed)
        alone = scheduler_step(ddim(), output[row, None], torch.tensor(501), sample[row, None], 1.0, generator=own)
        torch.testing.assert_close(step.latents[row], alone.latents[0])


def test_step_refuses_what_it_cannot_do():
    sample, output = waves()
    with pytest.raises(ValueError, match="Cannot pass both generator and prev_sample"):
        scheduler_step(ddim(), output, torch.tensor(1), sample, generator=torch.Generator(), prev_sample=sample)
    with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
        scheduler_step(DDIMScheduler(), output, torch.tensor(1), sample)
    scheduler = ddim()
    scheduler.register_to_config(prediction_type="guess")
    with pytest.raises(ValueError, match="prediction_type='guess'"):
        scheduler_step(scheduler, output, torch.tensor(1), sample)


def test_left_broadcast():
    assert _left_broadcast(torch.tensor([1, 2]), (2, 1, 3)).tolist() == [[[1, 1, 1]], [[2, 2, 2]]]
    with pytest.raises(ValueError, match="2 dimensions"):
        _left_broadcast(torch.zeros(1, 1), (3,))


def test_variance_by_hand():
    scheduler = SimpleNamespace(alphas_cumprod=torch.tensor([0.8, 0.5]), final_alpha_cumprod=torch.tensor(0.9))
    # (1 - .8)/(1 - .5) * (1 - .5/.8) = .15; before the first timestep: (1 - .9)/(1 - .8) * (1 - .8/.9) = .0556
    variance = _get_variance(scheduler, torch.tensor([1, 0]), torch.tensor([0, -1]))
    assert variance.tolist() == pytest.approx([0.15, 0.05555556])


# --- guidance -----------------------------------------------------------------------------------------------------


def echo(sample, timestep, embeds):
    """A denoiser that predicts its embedding, whatever the sample."""
    return SimpleNamespace(sample=embeds.view(-1, 1, 1, 1) + 0 * sample)


def test_guidance_by_hand():
    latents, negative, positive = torch.zeros(2, 1, 2, 2), torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    embeds = torch.cat([negative, positive])
    for timestep in (torch.tensor(7), torch.tensor([7, 8])):
        guided = predict_noise(echo, latents, timestep, embeds, 5.0)
        assert guided[:, 0, 0, 0].tolist() == [1 + 5 * 2, 2 + 5 * 3]
    assert predict_noise(echo, latents, torch.tensor(7), positive, 5.0)[:, 0, 0, 0].tolist() == [3, 5]
    with pytest.raises(ValueError, match="3 embeddings for 2 latents"):
        predict_noise(echo, latents, torch.tensor(7), torch.zeros(3), 5.0)


def test_guidance_rescale_is_that_of_diffusers():
    outputs = torch.randn(4, 1, 4, 4)
    negative, positive = outputs.chunk(2)
    plain = negative + 3.0 * (positive - negative)
    ours = predict_noise(
        lambda *_: SimpleNamespace(sample=outputs), negative, torch.tensor(1), torch.zeros(4), 3.0, guidance_rescale=0.7
    )
    torch.testing.assert_close(ours, rescale_noise_cfg(plain, positive, guidance_rescale=0.7))


# --- Stable Diffusion ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_stable_diffusion(tmp_path_factory.mktemp("sd"))


def load(directory, use_lora=False):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "If you are aware that the pretrained model has no lora weights")
        pipeline = DefaultDDPOStableDiffusionPipeline(str(directory), use_lora=use_lora)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, **keywords):
    settings = {
        "num_inference_steps": 3,
        "eta": 1.0,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(0),
    }
    return pipeline("a cat", **{**settings, **keywords})


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("guidance_rescale", [0.0, 0.5])
def test_pipeline_draws_what_diffusers_draws(directory, guidance_scale, guidance_rescale):
    pipeline = load(directory)
    keywords = {"guidance_scale": guidance_scale, "guidance_rescale": guidance_rescale, "negative_prompt": "dog"}
    ours = sample(pipeline, num_images_per_prompt=2, **keywords)
    theirs = sample(pipeline.sd_pipeline, num_images_per_prompt=2, **keywords)
    torch.testing.assert_close(ours.images, theirs.images)
    assert ours.images.shape == (2, 3, 16, 16)
    assert [x.shape for x in ours.latents] == [(2, 4, 8, 8)] * 4
    assert [x.shape for x in ours.log_probs] == [(2,)] * 3


def test_pipeline_forms_of_output(directory):
    pipeline, seen = load(directory), []
    images, latents, log_probs = sample(pipeline, return_dict=False, output_type="latent")
    assert torch.equal(images, latents[-1])
    assert len(log_probs) == 3
    calls = {"callback": lambda *now: seen.append(now[0]), "callback_steps": 2}
    output = pipeline_step(pipeline.sd_pipeline, ["a", "b"], num_inference_steps=4, **calls)
    assert isinstance(output, DDPOPipelineOutput)
    assert [image.size for image in output.images] == [(16, 16)] * 2
    assert seen == [0, 2]
    embeds = torch.randn(1, 16, 16)
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": -embeds, "latents": torch.ones(1, 4, 8, 8)}
    first = pipeline(num_inference_steps=2, output_type="pt", **given)
    assert torch.equal(first.images, pipeline(num_inference_steps=2, output_type="pt", **given).images)
    assert torch.equal(first.latents[0], given["latents"])


def test_protocol_leaves_everything_to_the_pipeline():
    protocol = DDPOStableDiffusionPipeline()
    for name in ("unet", "vae", "tokenizer", "scheduler", "text_encoder", "autocast"):
        with pytest.raises(NotImplementedError):
            getattr(protocol, name)
    methods = ("__call__", "scheduler_step", "set_progress_bar_config", "save_pretrained", "get_trainable_layers")
    for name in (*methods, "save_checkpoint", "load_checkpoint"):
        with pytest.raises(NotImplementedError):
            getattr(protocol, name)()


def test_what_is_trained(directory):
    whole = load(directory)
    assert whole.get_trainable_layers() is whole.unet
    assert all(parameter.requires_grad for parameter in whole.unet.parameters())
    assert whole.autocast is None
    lora = load(directory, use_lora=True)
    trained = [name for name, p in lora.get_trainable_layers().named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert lora.unet.peft_config["default"].r == 4
    with lora.autocast():
        pass
    for frozen in (whole.vae, whole.text_encoder, lora.vae, lora.text_encoder):
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert isinstance(whole.scheduler, DDIMScheduler)
    assert whole.sd_pipeline.safety_checker is None


def test_missing_lora_weights_are_said(directory):
    with pytest.warns(UserWarning, match="If you are aware that the pretrained model has no lora weights"):
        assert DefaultDDPOStableDiffusionPipeline(str(directory)).use_lora
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not DefaultDDPOStableDiffusionPipeline(str(directory), use_lora=False).use_lora


def perturb(pipeline):
    with torch.no_grad():
        for parameter in pipeline.get_trainable_layers().parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 3)


@pytest.mark.parametrize("use_lora", [False, True])
def test_checkpoint_comes_back(directory, tmp_path, use_lora):
    pipeline = load(directory, use_lora)
    perturb(pipeline)
    before, weights = sample(pipeline).images, {k: v.clone() for k, v in pipeline.unet.state_dict().items()}
    pipeline.save_checkpoint([pipeline.unet], [], str(tmp_path))
    written = "pytorch_lora_weights.safetensors" if use_lora else "unet"
    assert [path.name for path in tmp_path.iterdir()] == [written]
    fresh = load(directory, use_lora)
    perturb(fresh)
    fresh.load_checkpoint([fresh.unet], str(tmp_path))
    assert torch.equal(sample(fresh).images, before)
    for name, value in fresh.unet.state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("use_lora", [False, True])
def test_saved_pipeline_loads_here_and_in_diffusers(directory, tmp_path, use_lora):
    pipeline = load(directory, use_lora)
    perturb(pipeline)
    images = sample(pipeline).images
    pipeline.save_pretrained(str(tmp_path))
    again = load(tmp_path)  # finds the adapter without being asked for one
    assert again.use_lora == use_lora
    torch.testing.assert_close(sample(again).images, images)
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    if use_lora:
        theirs.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(sample(theirs).images, images)
    perturb(again)
    assert not torch.allclose(sample(again).images, images)


@pytest.mark.parametrize("use_lora", [False, True])
def test_checkpoint_errors(directory, tmp_path, use_lora):
    pipeline = load(directory, use_lora)
    pipeline.get_trainable_layers()
    for models in ([], [pipeline.unet, pipeline.unet]):
        with pytest.raises(ValueError, match="this should be of length 1"):
            pipeline.save_checkpoint(models, [], str(tmp_path))
        with pytest.raises(ValueError, match="this should be of length 1"):
            pipeline.load_checkpoint(models, str(tmp_path))
    with pytest.raises(ValueError, match="Unknown model type"):
        pipeline.save_checkpoint([torch.nn.Linear(1, 1)], [], str(tmp_path))
    with pytest.raises(ValueError, match="Unknown model type"):
        pipeline.load_checkpoint([torch.nn.Linear(1, 1)], str(tmp_path))


def test_the_adapter_can_be_scaled_away(directory):
    pipeline = load(directory, use_lora=True)
    perturb(pipeline)
    base = sample(load(directory)).images
    assert not torch.allclose(sample(pipeline).images, base)
    torch.testing.assert_close(sample(pipeline, cross_attention_kwargs={"scale": 0.0}).images, base)
