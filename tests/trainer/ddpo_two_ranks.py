"""Run by test_ddpo.py on two processes: trains, and writes what each of them ended with."""

import random
import sys
import warnings
from pathlib import Path

import torch
from tiny_diffusion import tiny_stable_diffusion

from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
from trl.rewards.images import brightness

torch.set_num_threads(1)
directory, resume_from = Path(sys.argv[1]), sys.argv[2]
warnings.filterwarnings("ignore", "If you are aware that the pretrained model has no lora weights")
config = DDPOConfig(
    num_epochs=3, mixed_precision="no", logdir=str(directory), sample_num_steps=2, sample_batch_size=2,
    train_batch_size=2, per_prompt_stat_tracking=True, train_learning_rate=1e-3, resume_from=resume_from,
)  # fmt: skip
drawn: list[str] = []


def prompt() -> tuple[str, dict]:
    drawn.append(random.choice(["a cat", "a dog", "a bird", "a fish"]))
    return drawn[-1], {}


pipeline = DefaultDDPOStableDiffusionPipeline(str(tiny_stable_diffusion(directory / f"sd-{random.random()}")))
trainer = DDPOTrainer(config, brightness, prompt, pipeline, lambda *_: None)
pipeline.set_progress_bar_config(disable=True)
trainer.train()
weights = {name: value for name, value in pipeline.unet.state_dict().items() if "lora_" in name}
ended = {"weights": weights, "progress": trainer.progress.state_dict(), "drawn": drawn[-4:]}
torch.save(ended, directory / f"rank{trainer.accelerator.process_index}of{trainer.accelerator.num_processes}.pt")
