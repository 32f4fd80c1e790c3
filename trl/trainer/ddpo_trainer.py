"""DDPO: policy gradient on the denoising steps of a diffusion model (arXiv:2305.13301)."""

import inspect
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import DistributedType, gather_object, set_seed
from numpy.typing import NDArray
from torch import Tensor

from trl.data.user_functions import Awaited
from trl.losses.policy import clipped_surrogate
from trl.models.ddim import predict_noise
from trl.models.modeling_sd_base import DDPOStableDiffusionPipeline
from trl.models.prepare import equalise
from trl.models.sharded import own_layers
from trl.models.weight_files import loaded_whole, on_host, saved_whole
from trl.trainer import checkpoints
from trl.trainer.base import BaseTrainer
from trl.trainer.ddpo_config import DDPOConfig
from trl.trainer.ddpo_setup import (
    PREFIX,
    STATE,
    Progress,
    checkpoint_folder,
    checkpoint_to_resume,
    create_accelerator,
    create_optimizer,
    is_pickled,
    model_card,
    place,
    refuse_to_overwrite,
    start_trackers,
)
from trl.trainer.guard import NonFiniteSteps, check_weights
from trl.trainer.ranks import check_agreement, watched
from trl.trainer.run_folder import RunFolder
from trl.trainer.signals import TERMINATED, StopSignal
from trl.trainer.statistics import PerPromptStatTracker
from trl.trainer.tally import StepWatch, write_metrics

Metadata = Any
RewardFunction = Callable[[Any, Sequence[str], Sequence[Metadata]], tuple[Any, Metadata]]
Samples = dict[str, Tensor]


class DDPOTrainer(BaseTrainer):
    """Trains a diffusion pipeline to draw images that a reward function likes.

    Args:
        reward_function: `(images, prompts, metadata) -> (one reward an image, reward metadata)`; may be `async`. Images
            are what the pipeline gives for `output_type="pt"`: [B, C, H, W] in 0..1.
        prompt_function: `() -> (prompt, metadata)`, called once for every sample.
        sd_pipeline: the model, behind the protocol of `DDPOStableDiffusionPipeline`.
        image_samples_hook: `(samples, global_step, tracker)`, called once an epoch with a list of `[images, prompts,
            prompt metadata, rewards, reward metadata]`. `tracker` is None without `config.log_with`.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "ddpo"]

    def __init__(
        self,
        config: DDPOConfig,
        reward_function: RewardFunction,
        prompt_function: Callable[[], tuple[str, Metadata]],
        sd_pipeline: DDPOStableDiffusionPipeline,
        image_samples_hook: Callable[[list[list[Any]], int, Any], Any] | None = None,
    ) -> None:
        if image_samples_hook is None:
            warnings.warn("No image_samples_hook provided; no images will be logged")
        super().__init__(config)
        self.reward_fn = reward_function
        self.prompt_fn = prompt_function
        self.sd_pipeline = sd_pipeline
        self.image_samples_callback = image_samples_hook
        self.num_train_timesteps = config.trained_timesteps
        self.accelerator = create_accelerator(config, own_autocast=sd_pipeline.autocast is not None)
        self._config_check()
        start_trackers(self.accelerator, config)
        set_seed(config.seed, device_specific=True)
        if config.allow_tf32 and self.accelerator.device.type == "cuda":  # a switch of the whole process
            torch.backends.cuda.matmul.allow_tf32 = True

        self.autocast: Callable[..., AbstractContextManager] = sd_pipeline.autocast or self.accelerator.autocast
        self._prepare_models()
        self.neg_prompt_embed = self._encode([config.negative_prompts or ""])[1]
        self.stat_tracker = PerPromptStatTracker(
            config.per_prompt_stat_tracking_buffer_size, config.per_prompt_stat_tracking_min_count
        )
        self.progress = Progress(self.stat_tracker)
        self._folder, self._signal = (
            RunFolder(PREFIX, is_pickled, f"resume_from={str(checkpoint_folder(self.accelerator))!r}"),
            StopSignal(),
        )
        self._non_finite = NonFiniteSteps(config.on_non_finite, config.max_non_finite_skips)
        self.first_epoch = self._resume() if config.resume_from else 0

    # --- setting up -------------------------------------------------------------------------------------------

    def _config_check(self) -> None:
        """Sizes that have to fit: an optimizer step takes whole batches, an epoch whole optimizer steps."""
        config, processes = self.config, self.accelerator.num_processes
        sampled = config.sample_batch_size * processes * config.sample_num_batches_per_epoch
        trained = config.train_batch_size * processes * config.train_gradient_accumulation_steps
        if config.sample_batch_size < config.train_batch_size:
            raise ValueError(
                f"Sample batch size ({config.sample_batch_size}) must be greater than or equal to the train batch size "
                f"({config.train_batch_size})"
            )
        if config.sample_batch_size % config.train_batch_size != 0:
            raise ValueError(
                f"Sample batch size ({config.sample_batch_size}) must be divisible by the train batch size "
                f"({config.train_batch_size})"
            )
        if sampled % trained != 0:
            raise ValueError(
                f"Number of samples per epoch ({sampled}) must be divisible by the total train batch size ({trained}): "
                "processes x train_batch_size x train_gradient_accumulation_steps"
            )

    def _prepare_models(self) -> None:
        """Frozen weights to the device in the inference dtype; what is trained to accelerate, in float32."""
        pipeline, accelerator = self.sd_pipeline, self.accelerator
        if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
            raise ValueError("fsdp_version=1: sampling calls the unet below it; take fsdp_version=2")
        pipeline.set_progress_bar_config(
            position=1, disable=not accelerator.is_local_main_process, leave=False, desc="Timestep", dynamic_ncols=True
        )
        trainable = pipeline.get_trainable_layers()
        if trainable is not pipeline.unet and accelerator.num_processes > 1:
            raise ValueError(
                f"get_trainable_layers() gave {type(trainable).__name__}, a part of the unet: on several processes its "
                "gradients would not be shared. Return the unet with `requires_grad` set on what is trained"
            )
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
        for module in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
            if module is not None:
                place(module, accelerator.device, dtype)
        self.trainable_layers = [parameter for parameter in trainable.parameters() if parameter.requires_grad]
        optimizer = create_optimizer(self.config, self.trainable_layers)
        if accelerator.is_fsdp2:
            equalise(trainable)
        with own_layers(accelerator, trainable) if accelerator.is_fsdp2 else nullcontext():
            prepared, self.optimizer = accelerator.prepare(trainable, optimizer)
        if accelerator.is_fsdp2:  # other tensors now
            self.trainable_layers = [parameter for parameter in prepared.parameters() if parameter.requires_grad]
        self._trained_unet = prepared if trainable is pipeline.unet else pipeline.unet
        self._prepared = prepared
        # No dropout in training either: the policy that is trained is the one that sampled.
        pipeline.unet.eval()

    # --- one epoch --------------------------------------------------------------------------------------------

    def train(self, epochs: int | None = None) -> None:
        """Run until `epochs` (default: `config.num_epochs`), counted from the very first, also after a resume."""
        epochs = self.config.num_epochs if epochs is None else epochs
        remaining = range(self.first_epoch, epochs)
        folder, config = checkpoint_folder(self.accelerator), self.config
        resumes, root = self._folder.goes_on(config.resume_from, folder), folder.parent
        overwrite, asked = config.overwrite_output_dir, bool(config.resume_from)
        held = self._folder.held(folder, resumes=resumes, overwrite=overwrite, asked=asked, root=root)
        watch = watched(lambda: self.progress.global_step)
        with watch, held, self._signal.listening(config.enable_jit_checkpoint):
            check_agreement(self.describe_run(), config, self._prepared)
            checkpoints.clean_up(folder, PREFIX)
            refuse_to_overwrite(self.accelerator, remaining, config.save_freq)
            if self.accelerator.is_main_process:
                self._folder.begin_metrics(
                    root, self.progress.global_step - 1 if self.first_epoch and resumes else None
                )
            for epoch in remaining:
                self.step(epoch, self.progress.global_step)
                if config.enable_jit_checkpoint and self._signal.on_any(self.accelerator):
                    if not self._saves(epoch):
                        self._save_checkpoint(epoch)
                    raise SystemExit(TERMINATED)
            check_weights(self.accelerator, f"after step {self.progress.global_step}", self._prepared)

    def _saves(self, epoch: int) -> bool:
        """Whether there is a checkpoint after an epoch."""
        return epoch != 0 and epoch % self.config.save_freq == 0

    def _log(self, values: dict[str, Any], step: int) -> None:
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process and self._folder.own_metrics is not None:
            write_metrics(checkpoint_folder(self.accelerator).parent, {"step": step, **values})

    def step(self, epoch: int, global_step: int) -> int:
        """Sample, score, and train on what was sampled; returns the number of optimizer steps so far."""
        config = self.config
        collected, prompt_image_data = self._generate_samples(
            config.sample_num_batches_per_epoch, config.sample_batch_size
        )
        samples = {key: torch.cat([batch[key] for batch in collected]) for key in collected[0]}
        del samples["prompt_ids"]
        rewards = self._score_and_show(prompt_image_data, epoch, global_step)
        prompts = [prompt for _, batch, *_ in prompt_image_data for prompt in batch]
        samples["advantages"] = self._advantages(rewards, gather_object(prompts))
        for inner_epoch in range(config.train_num_inner_epochs):
            batches = self._shuffled_batches(samples)
            global_step = self._train_batched_samples(inner_epoch, epoch, global_step, batches)
            if not self.accelerator.sync_gradients:
                raise ValueError(
                    "Optimization step should have been performed by this point. Please check calculated gradient "
                    "accumulation settings."
                )
        self.progress.global_step = global_step
        if self._saves(epoch):
            self._save_checkpoint(epoch)
        return global_step

    def _score_and_show(self, prompt_image_data: list[list[Any]], epoch: int, global_step: int) -> NDArray[Any]:
        """The rewards of all processes' samples; log them, and call the image hook with this process's."""
        rewards, metadata = self.compute_rewards(prompt_image_data, is_async=self.config.async_reward_computation)
        for data, reward, extra in zip(prompt_image_data, rewards, metadata, strict=True):
            data.extend([reward, extra])
        if self.image_samples_callback is not None:
            tracker = self.accelerator.trackers[0] if self.accelerator.trackers else None
            self.image_samples_callback(prompt_image_data, global_step, tracker)
        gathered = self.accelerator.gather(torch.cat(list(rewards))).cpu().numpy()
        mean, std = float(gathered.mean()), float(gathered.std())
        self._log({"reward": gathered, "epoch": epoch, "reward_mean": mean, "reward_std": std}, step=global_step)
        return gathered

    def _generate_samples(self, iterations: int, batch_size: int) -> tuple[list[Samples], list[list[Any]]]:
        """`iterations` batches of trajectories [B, N, ...], and their `[images, prompts, prompt metadata]`."""
        config, pipeline = self.config, self.sd_pipeline
        samples, prompt_image_pairs = [], []
        negative = self.neg_prompt_embed.repeat(batch_size, *[1] * (self.neg_prompt_embed.ndim - 1))
        for _ in range(iterations):
            prompts, prompt_metadata = zip(*(as_prompt(self.prompt_fn()) for _ in range(batch_size)), strict=True)
            prompt_ids, prompt_embeds = self._encode(prompts)
            with self.autocast():
                output = pipeline(
                    prompt_embeds=prompt_embeds,
                    negative_prompt_embeds=negative,
                    num_inference_steps=config.sample_num_steps,
                    guidance_scale=config.sample_guidance_scale,
                    eta=config.sample_eta,
                    output_type="pt",
                )
            latents = torch.stack(output.latents, dim=1)
            samples.append(
                {
                    "prompt_ids": prompt_ids,
                    "prompt_embeds": prompt_embeds,
                    "timesteps": pipeline.scheduler.timesteps.to(latents.device).repeat(batch_size, 1),
                    "latents": latents[:, :-1],
                    "next_latents": latents[:, 1:],
                    "log_probs": torch.stack(output.log_probs, dim=1),
                    "negative_prompt_embeds": negative,
                }
            )
            prompt_image_pairs.append([output.images, prompts, prompt_metadata])
        return samples, prompt_image_pairs

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids [B, L] and what the text encoder makes of them."""
        tokenizer = self.sd_pipeline.tokenizer
        ids = tokenizer(
            list(prompts),
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
        ).input_ids.to(self.accelerator.device)
        return ids, self.sd_pipeline.text_encoder(ids)[0]

    def compute_rewards(
        self, prompt_image_pairs: Sequence[Sequence[Any]], is_async: bool = False
    ) -> tuple[tuple[Tensor, ...], tuple[Metadata, ...]]:
        """Rewards ([B] for each batch) and reward metadata; `is_async` scores batches in threads, order kept."""
        if not is_async:
            scored: Iterable[tuple[Tensor, Metadata]] = map(self._score, prompt_image_pairs)
        else:
            with ThreadPoolExecutor(max_workers=self.config.max_workers) as pool:
                scored = list(pool.map(self._score, prompt_image_pairs))
        rewards, metadata = zip(*scored, strict=True)
        return rewards, metadata

    def _score(self, pair: Sequence[Any]) -> tuple[Tensor, Metadata]:
        images, prompts, prompt_metadata = pair
        try:
            answer = self.reward_fn(images, prompts, prompt_metadata)
            rewards, metadata = Awaited.of(answer).result() if inspect.isawaitable(answer) else answer
        except SystemExit as error:
            raise RuntimeError(f"reward_function asked the program to end: {error!r}; return rewards") from error
        rewards_B = torch.as_tensor(rewards, dtype=torch.float32, device=self.accelerator.device)
        if rewards_B.shape != (len(prompts),):
            raise ValueError(
                f"reward_function gave rewards of shape {tuple(rewards_B.shape)} for {len(prompts)} images: return one "
                "number for each, and metadata"
            )
        if not rewards_B.isfinite().all():
            raise ValueError(f"reward_function gave {rewards_B.tolist()}: every reward has to be finite")
        return rewards_B, metadata

    def _advantages(self, rewards: NDArray[Any], prompts: Sequence[str]) -> Tensor:
        """This process's part of the normalised rewards of all. [B]"""
        if self.config.per_prompt_stat_tracking:
            advantages = self.stat_tracker.update(prompts, rewards)
        else:
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
        own = advantages.reshape(self.accelerator.num_processes, -1)[self.accelerator.process_index]
        return torch.as_tensor(own, dtype=torch.float32, device=self.accelerator.device)

    def _shuffled_batches(self, samples: Samples) -> list[Samples]:
        """Samples in random order, each with its timesteps in a random order of its own, cut into train batches."""
        rows, steps = samples["timesteps"].shape
        device = samples["timesteps"].device
        order = torch.randperm(rows).to(device)
        shuffled = {key: value[order] for key, value in samples.items()}
        times = torch.stack([torch.randperm(steps) for _ in range(rows)]).to(device)
        for key in ("timesteps", "latents", "next_latents", "log_probs"):
            shuffled[key] = shuffled[key][torch.arange(rows, device=device)[:, None], times]
        size = self.config.train_batch_size
        return [{key: value[at : at + size] for key, value in shuffled.items()} for at in range(0, rows, size)]

    def _train_batched_samples(
        self, inner_epoch: int, epoch: int, global_step: int, batched_samples: Sequence[Samples]
    ) -> int:
        """Go over the batches, one denoising step of each at a time; log at every optimizer step."""
        guided = self.config.train_cfg and self.config.sample_guidance_scale > 1
        info: dict[str, list[Tensor]] = defaultdict(list)
        watch = StepWatch()
        for sample in batched_samples:
            embeds = sample["prompt_embeds"]
            if guided:
                embeds = torch.cat([sample["negative_prompt_embeds"], embeds])
            for at in range(self.num_train_timesteps):
                with self.accelerator.accumulate(self._prepared):
                    loss, approx_kl, clipfrac = self.calculate_loss(
                        sample["latents"][:, at],
                        sample["timesteps"][:, at],
                        sample["next_latents"][:, at],
                        sample["log_probs"][:, at],
                        sample["advantages"],
                        embeds,
                    )
                    watch.losses.append(loss.detach())
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients:
                        norm = self.accelerator.clip_grad_norm_(self.trainable_layers, self.config.train_max_grad_norm)
                        self._check_step(watch, norm, global_step + 1)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                for key, value in (("approx_kl", approx_kl), ("clipfrac", clipfrac), ("loss", loss)):
                    info[key].append(value.detach())
                if self.accelerator.sync_gradients:
                    means = {key: torch.stack(values).mean() for key, values in info.items()}
                    reduced = self.accelerator.reduce(means, reduction="mean")
                    stats = {key: value.item() for key, value in reduced.items()}
                    self._log({**stats, "epoch": epoch, "inner_epoch": inner_epoch}, step=global_step)
                    global_step += 1
                    info.clear()
        return global_step

    def _check_step(self, watch: StepWatch, norm: Any, step: int) -> None:
        """Stop, or leave the step out, unless all losses and the gradient are finite; every process calls it.

        A loss is that of one denoising step of a batch, in the order in which they were computed.
        """
        watch.norm = norm
        if not watch.read(self.accelerator)[0]:
            self._non_finite.met(step, self.accelerator, watch, [self._prepared], [])
            self.optimizer.zero_grad()
        watch.clear()

    # --- the objective ----------------------------------------------------------------------------------------

    def calculate_loss(
        self,
        latents: Tensor,
        timesteps: Tensor,
        next_latents: Tensor,
        log_probs: Tensor,
        advantages: Tensor,
        embeds: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(loss, approx_kl, clipfrac)` of one denoising step of each row.

        `embeds` has one row for each latent, or two (negatives first) for classifier-free guidance.
        """
        config = self.config
        with self.autocast():
            noise = predict_noise(self._trained_unet, latents, timesteps, embeds, config.sample_guidance_scale)
        new_log_probs = self.sd_pipeline.scheduler_step(
            noise, timesteps, latents, eta=config.sample_eta, prev_sample=next_latents
        ).log_probs
        advantages = advantages.clamp(-config.train_adv_clip_max, config.train_adv_clip_max)
        change = new_log_probs - log_probs
        # The last steps have a tiny deviation: one bold update can move a density by more than exp can hold.
        ratio = change.clamp(-20, 20).exp()
        loss = self.loss(advantages, config.train_clip_range, ratio)
        clipped = (ratio.detach() - 1).abs() > config.train_clip_range
        return loss, 0.5 * change.detach().square().mean(), clipped.float().mean()

    def loss(self, advantages: Tensor, clip_range: float, ratio: Tensor) -> Tensor:
        """PPO's clipped surrogate with a denoising step for a token; eq. 5 and section 4.2 of arXiv:2305.13301. []"""
        column = ratio.log().unsqueeze(-1)
        return clipped_surrogate(
            column,
            torch.zeros_like(column),
            advantages.unsqueeze(-1),
            torch.ones_like(column),
            clip_low=clip_range,
            clip_high=clip_range,
        ).mean

    # --- saving -----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, epoch: int) -> None:
        """Save `checkpoint_N`, named after the epoch, and remove the oldest ones."""
        check_weights(self.accelerator, f"epoch {epoch}", self._prepared)
        root = checkpoint_folder(self.accelerator)
        folder = root / f"{PREFIX}{epoch}"
        checkpoints.save_checkpoint(folder, self._write_state, self.describe_run(), step=epoch)
        if self.accelerator.is_main_process:
            limit = self.accelerator.project_configuration.total_limit
            checkpoints.keep_newest(root, limit, prefix=PREFIX, keep=[folder])

    def _write_state(self, folder: Path) -> None:
        main, scaler = self.accelerator.is_main_process, self.accelerator.scaler
        model = self.accelerator.unwrap_model(self._prepared)
        optimizer = on_host(self.optimizer.state_dict(), keep=main)
        with saved_whole(model, keep=main):
            if main:
                self.sd_pipeline.save_checkpoint([model], [model.state_dict()], str(folder))
        if not main:
            return
        state = {
            "optimizer": optimizer,
            "scaler": None if scaler is None else scaler.state_dict(),
            "progress": self.progress.state_dict(),
            "left out": self._non_finite.skipped,
        }
        checkpoints.write_state(folder / STATE, state)

    def describe_run(self) -> checkpoints.Run:
        """What a checkpoint of this run is compared with when a later run resumes from it."""
        config = self.config
        samples = config.sample_batch_size * config.sample_num_batches_per_epoch * self.accelerator.num_processes
        fixed = {"samples in an epoch": samples}
        return checkpoints.describe_run(type(self).__name__, self._prepared, config.to_dict(), fixed=fixed)

    def _resume(self) -> int:
        """Load the checkpoint that `resume_from` names; the epoch to go on with, 0 if there is no checkpoint yet."""
        checkpoints.clean_up(checkpoint_folder(self.accelerator), PREFIX)
        found = checkpoint_to_resume(self.config.resume_from)
        if found is None:
            return 0
        run = self.describe_run()
        checkpoints.check_identity(found, run)
        state = checkpoints.read_state(found.folder / STATE)
        random_state = checkpoints.random_state_of(found, self.accelerator.process_index, self.config.seed)
        checkpoints.check_optimizer(self.optimizer, state["optimizer"])
        checkpoints.check_settings(found, run)
        self.accelerator.print(f"Resuming from {found.folder}")
        model, optimizer = self.accelerator.unwrap_model(self._prepared), state["optimizer"]
        with loaded_whole(model):
            self.sd_pipeline.load_checkpoint([model], str(found.folder))
        spreads = self.accelerator.is_fsdp2
        self.optimizer.load_state_dict(checkpoints.spread_state(self.optimizer, optimizer) if spreads else optimizer)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress.load_state_dict(state["progress"])
        self._non_finite.skipped = state.get("left out", 0)
        checkpoints.set_random_state(random_state)
        return checkpoints.number_of(found.folder, PREFIX) + 1

    def _save_pretrained(self, save_directory: Any) -> None:
        check_weights(self.accelerator, f"step {self.progress.global_step}", self._prepared)
        main = self.accelerator.is_main_process
        with saved_whole(self.accelerator.unwrap_model(self._prepared), keep=main):
            if main:
                self.sd_pipeline.save_pretrained(str(save_directory))
        self.create_model_card(str(save_directory))

    def create_model_card(self, path: str, model_name: str | None = "TRL DDPO Model") -> None:
        """Write a `README.md` that says what was trained and how."""
        if not self.accelerator.is_main_process:
            return
        tags = [*self._tag_names, "diffusers", "reinforcement-learning"]
        function = getattr(self.reward_fn, "func", self.reward_fn)  # of a functools.partial
        reward = getattr(function, "__name__", type(function).__name__)
        text = model_card(model_name or "TRL DDPO Model", tags, self.config, reward, self.progress.global_step)
        os.makedirs(path, exist_ok=True)
        with open(os.path.join(path, "README.md"), "w", encoding="utf-8") as file:
            file.write(text)


def as_prompt(given: Any) -> tuple[str, Metadata]:
    """What the prompt function gave as prompt and metadata; a text alone has none."""
    if isinstance(given, str):
        return given, {}
    if isinstance(given, tuple | list) and len(given) == 2 and isinstance(given[0], str):
        return given[0], given[1]
    raise ValueError(f"prompt_function gave {given!r}: return a prompt, a text, and its metadata")
