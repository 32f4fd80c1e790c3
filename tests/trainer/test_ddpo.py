"""DDPO: its objective, rewards, training, resuming, on every kind of pipeline."""

import asyncio
import os
import random
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from ddpo_cases import build, digit_prompt, letters_prompt, recorded, trainer
from ddpo_sharded_runs import train_all
from digits.modeling_digits import DDPODigitsPipeline, DigitsTextEncoder, digits_unet
from process_group import on_ranks
from tiny_diffusion import tiny_stable_diffusion

from trl.models.ddim import denoise
from trl.models.modeling_sd_base import DefaultDDPOStableDiffusionPipeline
from trl.rewards.images import brightness
from trl.trainer.checkpoints import Run, seal
from trl.trainer.ddpo_config import DDPOConfig
from trl.trainer.ddpo_setup import checkpoint_to_resume
from trl.trainer.ddpo_trainer import DDPOTrainer, as_prompt


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """accelerate keeps one precision for a process; every test here chooses its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    return tiny_stable_diffusion(tmp_path_factory.mktemp("sd"))


# --- the objective ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advantage", "clip", "ratio", "expected"),
    [
        (-1.0, 1e-4, 1.0, 1.0),
        (1.0, 0.1, 2.0, -1.1),  # max(-1 * 2, -1 * 1.1)
        (1.0, 0.1, 0.5, -0.5),  # max(-1 * .5, -1 * .9)
        (-1.0, 0.1, 0.5, 0.9),  # max(1 * .5, 1 * .9)
        (-2.0, 0.1, 1.05, 2.1),
    ],
)
def test_loss_by_hand(tmp_path, advantage, clip, ratio, expected):
    loss = trainer(tmp_path).loss(torch.tensor([advantage]), clip, torch.tensor([ratio]))
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["digits", "whole", "lora"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_ratio_starts_at_one(tmp_path, stable_diffusion, kind, precision, guidance):
    prompt = digit_prompt if kind == "digits" else letters_prompt
    built = trainer(
        tmp_path, build(kind, stable_diffusion), prompt=prompt, mixed_precision=precision,
        sample_guidance_scale=guidance, train_batch_size=2,
    )  # fmt: skip
    (sample,), _ = built._generate_samples(1, 2)
    embeds = sample["prompt_embeds"]
    if guidance > 1:
        embeds = torch.cat([sample["negative_prompt_embeds"], embeds])
    for at in range(3):
        moment = [sample[key][:, at] for key in ("latents", "timesteps", "next_latents", "log_probs")]
        loss, approx_kl, clipfrac = built.calculate_loss(*moment, torch.tensor([1.0, -3.0]), embeds)
        assert approx_kl == 0
        assert clipfrac == 0
        assert loss.item() == 1.0
        assert loss.requires_grad


def test_samples_are_trajectories(tmp_path, stable_diffusion):
    built = trainer(tmp_path, build("whole", stable_diffusion), prompt=letters_prompt)
    samples, pairs = built._generate_samples(2, 3)
    assert len(samples) == len(pairs) == 2
    assert {key: tuple(value.shape) for key, value in samples[0].items()} == {
        "prompt_ids": (3, 16), "prompt_embeds": (3, 16, 16), "timesteps": (3, 3), "latents": (3, 3, 4, 8, 8),
        "next_latents": (3, 3, 4, 8, 8), "log_probs": (3, 3), "negative_prompt_embeds": (3, 16, 16),
    }  # fmt: skip
    assert torch.equal(samples[0]["latents"][:, 1:], samples[0]["next_latents"][:, :-1])
    images, prompts, metadata = pairs[0]
    assert images.shape == (3, 3, 16, 16)
    assert set(prompts) <= {"cat", "dog"}
    assert metadata == ({}, {}, {})


def test_advantages_are_clamped(tmp_path):
    built = trainer(tmp_path, train_adv_clip_max=0.5, train_batch_size=2, sample_guidance_scale=1.0)
    (sample,), _ = built._generate_samples(1, 2)
    moment = [sample[key][:, 0] for key in ("latents", "timesteps", "next_latents", "log_probs")]
    loss, *_ = built.calculate_loss(*moment, torch.tensor([-4.0, 0.25]), sample["prompt_embeds"])
    assert loss.item() == pytest.approx((0.5 - 0.25) / 2)


def test_the_negative_prompt_guides(tmp_path):
    embeddings = build("digits").text_encoder(torch.tensor([[3], [10]]))[0]
    assert torch.equal(trainer(tmp_path, negative_prompts="3").neg_prompt_embed, embeddings[:1])
    assert torch.equal(trainer(tmp_path).neg_prompt_embed, embeddings[1:])


# --- rewards ------------------------------------------------------------------------------------------------------


PAIRS = [[torch.full((2, 1, 8, 8), value), ("1", "2"), ({}, {})] for value in (0.25, 0.5, 0.75)]


@pytest.mark.parametrize("is_async", [False, True])
def test_rewards_keep_their_order(tmp_path, is_async):
    first_may_go = threading.Event()

    def reward(images, prompts, metadata):
        """With threads, the first batch is scored last."""
        value = images.mean().item()
        if is_async and value == 0.25:
            assert first_may_go.wait(10)
        if value == 0.75:
            first_may_go.set()
        return np.array([value, -value]), {"value": value}

    rewards, metadata = trainer(tmp_path, reward=reward).compute_rewards(PAIRS, is_async=is_async)
    assert [batch.tolist() for batch in rewards] == [[0.25, -0.25], [0.5, -0.5], [0.75, -0.75]]
    assert [extra["value"] for extra in metadata] == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_reward_function_may_be_a_coroutine(tmp_path, is_async):
    async def reward(images, prompts, metadata):
        await asyncio.sleep(0)
        return [images.mean().item()] * 2, {}

    rewards, _ = trainer(tmp_path, reward=reward).compute_rewards(PAIRS, is_async=is_async)
    assert [batch.tolist() for batch in rewards] == [[0.25] * 2, [0.5] * 2, [0.75] * 2]


@pytest.mark.parametrize(
    ("rewards", "message"), [([1.0], r"shape \(1,\) for 2 images"), ([1.0, float("nan")], "has to be finite")]
)
def test_rewards_that_are_wrong(tmp_path, rewards, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, reward=lambda *_: (rewards, {})).compute_rewards(PAIRS)


def test_advantages_by_hand(tmp_path):
    rewards = np.array([1.0, 2.0, 6.0, 3.0])
    # mean 3, population deviation sqrt(14 / 4)
    assert trainer(tmp_path)._advantages(rewards, ["x"] * 4).tolist() == pytest.approx(
        [-1.069, -0.5345, 1.6036, 0], abs=1e-4
    )
    tracking = trainer(
        tmp_path, per_prompt_stat_tracking=True, per_prompt_stat_tracking_buffer_size=4,
        per_prompt_stat_tracking_min_count=3,
    )  # fmt: skip
    tracking._advantages(np.array([1.0, 2.0, 4.0]), ["x", "y", "x"])
    second = tracking._advantages(np.array([2.0, 6.0, 3.0]), ["x", "x", "y"])
    assert second.tolist() == pytest.approx([-0.650944, 1.432077, -0.392232], abs=1e-5)


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "lora"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_stable_diffusion_trains(tmp_path, stable_diffusion, kind, precision):
    calls = []
    built = trainer(
        tmp_path, build(kind, stable_diffusion), prompt=letters_prompt, mixed_precision=precision,
        hook=lambda *call: calls.append(call), async_reward_computation=True,
    )  # fmt: skip
    before = {name: value.clone() for name, value in built.sd_pipeline.unet.named_parameters()}
    logs = recorded(built)
    built.train()
    trained = {name for name, value in built.sd_pipeline.unet.named_parameters() if value.requires_grad}
    changed = {
        name for name, value in built.sd_pipeline.unet.named_parameters() if not torch.equal(value, before[name])
    }
    assert changed == trained
    assert all(("lora_" in name) == (kind == "lora") for name in trained)

    sampled = [entry for entry in logs if "reward_mean" in entry]
    steps = [entry for entry in logs if "loss" in entry]
    assert [entry["epoch"] for entry in sampled] == [0, 1]
    assert [entry["step"] for entry in steps] == list(range(2 * 4))
    assert {key for entry in steps for key in entry} == {
        "approx_kl", "clipfrac", "loss", "epoch", "inner_epoch", "step",
    }  # fmt: skip
    assert np.isfinite([entry["loss"] for entry in steps]).all()
    for data, step, tracker in calls:
        assert tracker is None
        assert step in (0, 4)
        for images, prompts, metadata, rewards, extra in data:
            assert len(images) == len(prompts) == len(metadata) == len(rewards) == 2
            assert extra == {}
    assert len(calls) == 2


def test_accumulated_small_batches_are_the_large_batch(tmp_path):
    """The same gradient reaches the optimizer."""
    gradients = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        AcceleratorState._reset_state(reset_partial_state=True)
        built = trainer(
            tmp_path / str(size), num_epochs=1, sample_batch_size=4, sample_num_batches_per_epoch=1,
            train_batch_size=size, train_gradient_accumulation_steps=accumulation,
        )  # fmt: skip

        def keep(parameters, max_norm):
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))

        built.accelerator.clip_grad_norm_ = keep
        built.train()
        assert built.progress.global_step == 1
    scale = gradients[0].abs().max().item()
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-3 * scale, rtol=0)
    torch.testing.assert_close(gradients[0], gradients[2], atol=1e-3 * scale, rtol=0)


def test_a_fraction_of_the_timesteps(tmp_path):
    built, seen = trainer(tmp_path, num_epochs=1, sample_num_steps=5, train_timestep_fraction=0.4), []
    calculate = built.calculate_loss

    def keep(latents, timesteps, *rest):
        seen.append(timesteps.tolist())
        return calculate(latents, timesteps, *rest)

    built.calculate_loss = keep
    built.train()
    assert len(seen) == 4 * 2
    assert {moment for (moment,) in seen} <= {81, 61, 41, 21, 1}


def test_inner_epochs_move_the_policy_and_are_clipped(tmp_path):
    built = trainer(tmp_path, num_epochs=1, train_num_inner_epochs=3)
    logs = recorded(built)
    built.train()
    steps = [entry for entry in logs if "loss" in entry]
    assert steps[0]["approx_kl"] < 1e-10
    assert steps[0]["clipfrac"] == 0
    assert steps[-1]["approx_kl"] > 1e-8
    assert steps[-1]["clipfrac"] > 0


def noisy_brightness(images, prompts, metadata):
    return brightness(images, prompts, metadata)[0] + torch.randn(len(prompts)) + random.random() + np.random.rand(), {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["digits", "whole", "lora"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, stable_diffusion, kind):
    """Bit for bit: weights, optimizer, trackers, logs and the random states of Python, numpy and torch."""

    def start(name, **keywords):
        AcceleratorState._reset_state(reset_partial_state=True)
        return trainer(
            tmp_path / name, build(kind, stable_diffusion), noisy_brightness,
            digit_prompt if kind == "digits" else letters_prompt, per_prompt_stat_tracking=True,
            per_prompt_stat_tracking_min_count=2, train_num_inner_epochs=2, sample_num_steps=2, **keywords,
        )  # fmt: skip

    whole = start("whole", num_epochs=3)
    expected = recorded(whole)
    whole.train()
    drawn = (random.random(), np.random.rand(), torch.rand(1).item())

    start("parts", num_epochs=2).train()
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    resumed = start("parts", num_epochs=3, resume_from=str(tmp_path / "parts" / "logs" / "checkpoints"))
    assert resumed.first_epoch == 2
    found = recorded(resumed)
    resumed.train()
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())
    for name, value in whole.sd_pipeline.unet.state_dict().items():
        assert torch.equal(value, resumed.sd_pipeline.unet.state_dict()[name]), name
    assert resumed.progress.state_dict() == whole.progress.state_dict()
    assert whole.progress.global_step == 3 * 2 * 4
    ours, theirs = (built.optimizer.state_dict()["state"] for built in (resumed, whole))
    for index, state in theirs.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(ours[index][key]), torch.as_tensor(value)), (index, key)
    last = [{k: np.asarray(v).tolist() for k, v in entry.items()} for entry in expected if entry["epoch"] == 2]
    assert [{k: np.asarray(v).tolist() for k, v in entry.items()} for entry in found] == last


def test_checkpoints_are_named_after_epochs_and_limited(tmp_path):
    built = trainer(tmp_path, num_epochs=6, save_freq=2, num_checkpoint_limit=1, run_name="mine")
    built.train()
    checkpoints = tmp_path / "logs" / "mine" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint_4"]
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="holds checkpoint_4 of another run: go on with it by resume_from="):
        trainer(tmp_path, num_epochs=6, save_freq=4, run_name="mine").train()


def test_where_to_resume_from(tmp_path, caplog):
    for number in (2, 10):
        folder = tmp_path / f"checkpoint_{number}"
        folder.mkdir()
        seal(folder, Run({}, {}, {}), step=number, world_size=1)
    (tmp_path / "trl").mkdir()
    assert checkpoint_to_resume(str(tmp_path)).folder == tmp_path / "checkpoint_10"
    assert checkpoint_to_resume(f"{tmp_path}/checkpoint_2/").folder == tmp_path / "checkpoint_2"
    with pytest.raises(ValueError, match=r"there is no checkpoint .*checkpoint_3"):
        checkpoint_to_resume(str(tmp_path / "checkpoint_3"))
    for nothing in (tmp_path / "trl", tmp_path / "absent"):
        assert checkpoint_to_resume(str(nothing)) is None
        assert f"no whole checkpoint in {nothing}: training starts anew" in caplog.text


def test_images_reach_the_tracker(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def hook(data, global_step, tracker):
        tracker.log_images({"samples": data[0][0].movedim(1, -1).numpy()}, step=global_step, dataformats="NHWC")

    built = trainer(tmp_path, num_epochs=1, log_with="tensorboard", run_name="mine", hook=hook)
    built.train()
    built.accelerator.trackers[0].finish()
    events = EventAccumulator(str(tmp_path / "logs" / "mine" / "trl"), size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"]
    assert {"reward_mean", "reward_std", "approx_kl", "clipfrac", "loss"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("kind", ["digits", "lora"])
def test_what_save_pretrained_leaves(tmp_path, stable_diffusion, kind):
    built = trainer(tmp_path, build(kind, stable_diffusion))
    built.save_pretrained(tmp_path / "final")
    card = (tmp_path / "final" / "README.md").read_text()
    assert card.startswith("---\ntags:\n- trl\n- ddpo\n")
    assert "# TRL DDPO Model" in card
    assert "`brightness`" in card
    assert "| sample_num_steps | 3 |" in card
    if kind == "digits":
        assert DDPODigitsPipeline.from_pretrained(tmp_path / "final").unet.config.sample_size == 8
    else:
        assert DefaultDDPOStableDiffusionPipeline(str(tmp_path / "final")).use_lora
    built.create_model_card(str(tmp_path / "named"), model_name="Bright digits")
    assert "# Bright digits" in (tmp_path / "named" / "README.md").read_text()


def test_only_part_of_a_unet_can_be_trained(tmp_path):
    """A pipeline may train a piece of its unet, as the adapters of older diffusers were."""

    class Piece(DDPODigitsPipeline):
        def get_trainable_layers(self):
            self.unet.requires_grad_(False)
            return self.unet.conv_out.requires_grad_(True)

        def save_checkpoint(self, models, weights, output_dir):
            torch.save(models[0].state_dict(), f"{output_dir}/piece.pt")

    pipeline = Piece(digits_unet(8), DigitsTextEncoder(32))
    before = {name: value.clone() for name, value in pipeline.unet.named_parameters()}
    built = trainer(tmp_path, pipeline)
    built.train()
    changed = {name for name, value in pipeline.unet.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"conv_out.weight", "conv_out.bias"}
    assert (tmp_path / "logs" / "checkpoints" / "checkpoint_1" / "piece.pt").exists()


def test_every_field_is_read():
    """A setting that nothing reads would be accepted and ignored."""
    import inspect

    from trl.trainer import ddpo_config, ddpo_setup, ddpo_trainer

    code = "".join(inspect.getsource(module) for module in (ddpo_setup, ddpo_trainer))
    code += inspect.getsource(ddpo_config.DDPOConfig.trained_timesteps.fget)
    for field in fields(DDPOConfig):
        assert f"config.{field.name}" in code or f"self.{field.name}" in code, field.name


def test_denoise_reports_every_step():
    pipeline, seen = build("digits"), []
    pipeline.scheduler.set_timesteps(4)
    denoise(
        pipeline.scheduler, lambda x, t: x, torch.randn(1, 1, 8, 8), eta=1.0,
        after_step=lambda index, timestep, latents: seen.append((index, int(timestep))),
    )  # fmt: skip
    assert seen == [(0, 76), (1, 51), (2, 26), (3, 1)]


@pytest.mark.slow
def test_two_processes_train_one_model_and_resume(tmp_path):
    """Different samples, the same weights and statistics; and a resumed run is the uninterrupted one here too."""

    def launch(directory, resume_from=""):
        directory.mkdir()
        here = Path(__file__).parent
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        arguments = [str(here / "ddpo_two_ranks.py"), str(directory), str(resume_from)]
        paths = os.pathsep.join([str(here.parent.parent), str(here.parent)])
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths}
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(directory / f"rank{rank}of2.pt") for rank in (0, 1)]

    first, second = launch(tmp_path / "whole")
    assert first["drawn"] != second["drawn"]
    assert first["progress"] == second["progress"]
    assert first["progress"]["global_step"] == 3 * 2
    resumed = launch(tmp_path / "rest", tmp_path / "whole" / "checkpoints" / "checkpoint_1")
    for ended in (second, *resumed):
        for name, value in first["weights"].items():
            assert torch.equal(value, ended["weights"][name]), name
    assert [ended["drawn"] for ended in resumed] == [first["drawn"], second["drawn"]]
    assert resumed[0]["progress"] == first["progress"]


@pytest.fixture(scope="module")
def on_engines(tmp_path_factory):
    """The folder of all runs of `ddpo_sharded_runs`, and what came of them on each rank."""
    folder = tmp_path_factory.mktemp("engines")
    tiny_stable_diffusion(folder / "sd")
    on_ranks(train_all, 2, folder)
    return folder, [torch.load(folder / f"rank{rank}") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("run", ["lora-fsdp2", "lora-fsdp2-resumed", "whole-fsdp2-resumed"])
def test_sharded_unets_train_save_and_resume_as_whole_ones(on_engines, run):
    """As DDP does; a run that goes on from a checkpoint (LoRA: its own, else DDP's) ends as one that did not stop."""
    folder, ranks = on_engines
    kind, begin = run.split("-")[0], 2 if run.endswith("resumed") else 0
    expected = ranks[0][f"{kind}-ddp"]
    moved = max(float((value - expected["start"][key]).abs().max()) for key, value in expected["weights"].items())
    assert moved > 1e-3
    exactly, close = {"rtol": 0, "atol": 0}, {"rtol": 0, "atol": 1e-5}
    for found in (rank[run] for rank in ranks):
        assert (found["begin"], set(found["approx_kl"])) == (begin, {0.0})  # it trains what it has sampled from
        assert found["reward"] == pytest.approx(expected["reward"][begin:], abs=1e-5)
        for key in ("weights", "moments"):
            torch.testing.assert_close(found[key], expected[key], **close)
        if kind == "lora":
            torch.testing.assert_close(found["weights"], ranks[0]["lora-fsdp2"]["weights"], **exactly)
    saved, weights = folder / run / "saved", ranks[0][run]["weights"]
    torch.testing.assert_close(dict(build(kind, saved).unet.state_dict()), weights, **exactly)
    assert ranks[0][run]["as a part"] == {f"unet.{key}": value.shape for key, value in weights.items()}
    assert '"_class_name": "UNet2DConditionModel"' in (saved / "unet" / "config.json").read_text()


def test_the_first_fsdp_is_refused():
    state = SimpleNamespace(is_fsdp2=False, distributed_type=DistributedType.FSDP)
    with pytest.raises(ValueError, match=r"fsdp_version=1: .*; take fsdp_version=2"):
        DDPOTrainer._prepare_models(SimpleNamespace(accelerator=state, sd_pipeline=None))


@pytest.mark.parametrize(
    ("given", "asked"),
    [("37", ("37", {})), (("37", {"number": 3}), ("37", {"number": 3})), (["37", None], ("37", None))],
)
def test_a_prompt_function_may_give_a_text_alone(given, asked):
    """L15"""
    assert as_prompt(given) == asked


@pytest.mark.parametrize("given", [None, ("a", {}, 1), (1, {}), {"prompt": "a"}])
def test_what_is_no_prompt_is_refused(tmp_path, given):
    """L15"""
    with pytest.raises(ValueError, match=r"prompt_function gave .*: return a prompt, a text, and its metadata"):
        trainer(tmp_path, prompt=lambda: given)._generate_samples(1, 2)


def test_async_rewards_share_a_loop(tmp_path):
    """R1"""
    gate, built = asyncio.Semaphore(1), trainer(tmp_path)

    async def bright(images, prompts, metadata):
        async with gate:
            await asyncio.sleep(0)
        return torch.ones(len(prompts)), {}

    built.reward_fn = bright
    for in_threads in (True, False, True):
        rewards, _ = built.compute_rewards([(None, ["a"], [{}])] * 3, in_threads)
        assert [batch.tolist() for batch in rewards] == [[1.0]] * 3
