"""DDPO: teach a diffusion model to draw what a reward likes.

Without arguments a small model of handwritten digits, which is trained first (a minute, once), learns to draw bright
ones on a laptop CPU. With Stable Diffusion (a GPU of 16 GB), and LAION's aesthetic predictor if its weights are given:

    python examples/ddpo.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --aesthetic sac+logos+ava1-l14-linearMSE.pth
"""  # noqa: E501

import argparse
import random

from digits.digits_base import digits_pipeline
from transformers import CLIPVisionModelWithProjection

from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
from trl.rewards.images import AestheticHead, AestheticScorer, brightness, clip_embedding, jpeg_compressibility

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="folder or Hub name of a Stable Diffusion model")
parser.add_argument("--revision", default="main")
parser.add_argument("--whole", action="store_true", help="train the whole UNet instead of LoRA adapters")
parser.add_argument("--aesthetic", help="weights of the aesthetic predictor; without: compressibility as JPEG")
parser.add_argument("--epochs", type=int)
parser.add_argument("--log_with", choices=["tensorboard", "wandb"])
parser.add_argument("--resume_from", default="")
parser.add_argument("--out", default="ddpo-model")
arguments = parser.parse_args()
shared = {"log_with": arguments.log_with, "resume_from": arguments.resume_from}

if arguments.model:
    subjects = ["cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer", "lion", "frog"]
    pipeline = DefaultDDPOStableDiffusionPipeline(
        arguments.model, pretrained_model_revision=arguments.revision, use_lora=not arguments.whole
    )
    reward = jpeg_compressibility
    if arguments.aesthetic:
        clip = CLIPVisionModelWithProjection.from_pretrained("openai/clip-vit-large-patch14")
        reward = AestheticScorer(clip_embedding(clip), AestheticHead.from_file(arguments.aesthetic))
    config = DDPOConfig(num_epochs=arguments.epochs or 200, sample_batch_size=6, sample_num_batches_per_epoch=4,
                        train_batch_size=3, per_prompt_stat_tracking=True, per_prompt_stat_tracking_buffer_size=32,
                        **shared)  # fmt: skip
else:
    subjects = [str(digit) for digit in range(10)]
    pipeline, reward = digits_pipeline(), brightness
    config = DDPOConfig(num_epochs=arguments.epochs or 8, mixed_precision="no", sample_num_steps=10, save_freq=5,
                        sample_guidance_scale=2.0, sample_batch_size=128, sample_num_batches_per_epoch=1,
                        train_batch_size=16, train_learning_rate=2e-4, train_clip_range=1e-2, **shared)  # fmt: skip


def show(samples, global_step, tracker):
    print(f"step {global_step:4d}  reward {sum(batch[3].mean().item() for batch in samples) / len(samples):.3f}")
    if tracker is not None and tracker.name == "tensorboard":
        images = samples[-1][0][:16].float().movedim(1, -1).cpu().numpy()
        tracker.log_images({"samples": images}, global_step, dataformats="NHWC")


trainer = DDPOTrainer(config, reward, lambda: (random.choice(subjects), {}), pipeline, show)
trainer.train()
trainer.save_pretrained(arguments.out)
