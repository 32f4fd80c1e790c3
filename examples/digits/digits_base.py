"""The base model of digits that reinforcement learning starts from: trained once, then kept in the cache."""

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .modeling_digits import NOTHING, DDPODigitsPipeline, DigitsTextEncoder, digits_unet


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 real digits: images [N, 1, 8, 8] in 0..1, and labels [N]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install scikit-learn pillow") from error
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def digits_pipeline(
    *, wrong_labels: float = 0.0, steps: int = 900, width: int = 16, seed: int = 0, cache: Path | None = None
) -> DDPODigitsPipeline:
    """`pretrain_digits`, from the cache (`~/.cache/trl`; `TRL_CACHE` moves it) where it was asked for before.

    40 CPU seconds at the default size the first time.
    """
    settings = f"v2 {wrong_labels} {steps} {width} {seed}"
    root = cache or Path(os.environ.get("TRL_CACHE", "~/.cache/trl")).expanduser()
    directory = root / f"digits-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    if not directory.exists():
        pipeline = pretrain_digits(wrong_labels=wrong_labels, steps=steps, width=width, seed=seed)
        # Written beside and renamed: an interrupted run leaves nothing that looks finished.
        beside = root / f".{directory.name}-{os.getpid()}"
        pipeline.save_pretrained(str(beside))
        os.replace(beside, directory)
    return DDPODigitsPipeline.from_pretrained(directory)


def pretrain_digits(
    *, wrong_labels: float = 0.0, steps: int = 900, width: int = 16, seed: int = 0
) -> DDPODigitsPipeline:
    """Train a class-conditioned denoiser on the real digits (arXiv:2006.11239), ready for classifier-free guidance.

    15 % of the labels are dropped (arXiv:2207.12598). `wrong_labels` is the part of the others that is replaced by a
    random digit: a model that follows its prompt only loosely, as one trained on captions from the web does.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet, text_encoder = digits_unet(width), DigitsTextEncoder(4 * width)
        pipeline = DDPODigitsPipeline(unet, text_encoder)
        text_encoder.requires_grad_(True)
        images, labels = digits()
        signal = pipeline.scheduler.alphas_cumprod
        optimizer = torch.optim.AdamW([*unet.parameters(), *text_encoder.parameters()], lr=2e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(steps):
            rows = torch.randint(len(images), (64,))
            label = torch.where(torch.rand(64) < wrong_labels, torch.randint(10, (64,)), labels[rows])
            label = torch.where(torch.rand(64) < 0.15, NOTHING, label)
            clean, time = 2 * images[rows] - 1, torch.randint(1, len(signal), (64,))
            noise, alpha = torch.randn_like(clean), signal[time].view(-1, 1, 1, 1)
            noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
            loss = F.mse_loss(unet(noisy, time, text_encoder(label[:, None])[0]).sample, noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        text_encoder.requires_grad_(False)
        unet.eval()
    return pipeline
