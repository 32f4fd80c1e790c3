"""Rewards of images, as `DDPOTrainer` calls them: `(images, prompts, metadata) -> (rewards [B], {})`.

Images are [B, C, H, W] or [B, H, W, C] in 0..1 with one or three channels, or a list of PIL images. Settings are bound
with `functools.partial(jpeg_compressibility, quality=80)`.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Scored = tuple[Tensor, dict[str, Any]]
LUMA = (0.299, 0.587, 0.114)
"""weights of red, green and blue by Rec. 601; Pillow converts to grey with the same"""


def as_images(images: Any) -> Tensor:
    """Images in any accepted form as float32 [B, C, H, W] in 0..1."""
    if isinstance(images, Sequence):
        images = torch.stack(
            [image if isinstance(image, Tensor) else torch.tensor(np.array(image)) for image in images]
        )
        images = images.unsqueeze(1) if images.ndim == 3 else images
    images = torch.as_tensor(images)
    if images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[-1] in (1, 3):
        images = images.movedim(-1, 1)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images of shape {tuple(images.shape)}: pass [B, C, H, W] with 1 or 3 channels")
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _as_rgb(images: Any) -> Tensor:
    tensor = as_images(images)
    return tensor.expand(-1, 3, -1, -1)


def luminance(images: Any) -> Tensor:
    """How bright each pixel is, 0..1. [B, H, W]"""
    return (_as_rgb(images) * torch.tensor(LUMA, device=_device(images)).view(3, 1, 1)).sum(1)


def _device(images: Any) -> torch.device:
    return images.device if isinstance(images, Tensor) else torch.device("cpu")


# --- brightness and colour ----------------------------------------------------------------------------------------


def brightness(images: Any, prompts: Sequence[str], metadata: Sequence[Any]) -> Scored:
    """Mean luminance: 0 is black, 1 is white."""
    return luminance(images).flatten(1).mean(1), {}


def colour(
    images: Any, prompts: Sequence[str], metadata: Sequence[Any], *, rgb: tuple[float, float, float] = (1.0, 0.0, 0.0)
) -> Scored:
    """1 minus the mean over pixels of the distance to a colour (components 0..1), scaled so that 0 is the farthest."""
    if not all(0 <= part <= 1 for part in rgb):
        raise ValueError(f"rgb={rgb}: give components in 0..1")
    target = torch.tensor(rgb, device=_device(images)).view(3, 1, 1)
    farthest = torch.maximum(target, 1 - target).square().sum().sqrt()
    distance = (_as_rgb(images) - target).square().sum(1).sqrt()
    return 1 - distance.flatten(1).mean(1) / farthest, {}


def colourfulness(images: Any, prompts: Sequence[str], metadata: Sequence[Any]) -> Scored:
    """The measure of Hasler and Süsstrunk (2003), for values in 0..1: 0 is grey, above 0.4 is highly colourful."""
    red, green, blue = _as_rgb(images).flatten(2).unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue])
    spread = opponents.std(-1, correction=0).square().sum(0).sqrt()
    return spread + 0.3 * opponents.mean(-1).square().sum(0).sqrt(), {}


# --- JPEG ---------------------------------------------------------------------------------------------------------


def jpeg_incompressibility(
    images: Any, prompts: Sequence[str], metadata: Sequence[Any], *, quality: int = 95, side: int | None = None
) -> Scored:
    """Size of the image as JPEG, in thousands of bytes (section 5.1 of arXiv:2305.13301).

    `side` first enlarges images to that many pixels: the JPEG of a very small image is mostly header.
    """
    tensor = as_images(images)
    if side is not None:
        tensor = F.interpolate(tensor, size=(side, side), mode="nearest")
    sizes = [_jpeg_bytes(image, quality) / 1000 for image in tensor.mul(255).round().clamp(0, 255).byte().cpu()]
    return torch.tensor(sizes, device=tensor.device), {}


def jpeg_compressibility(
    images: Any, prompts: Sequence[str], metadata: Sequence[Any], *, quality: int = 95, side: int | None = None
) -> Scored:
    """Minus `jpeg_incompressibility`."""
    sizes, extra = jpeg_incompressibility(images, prompts, metadata, quality=quality, side=side)
    return -sizes, extra


def _jpeg_bytes(image: Tensor, quality: int) -> int:
    from PIL import Image

    if not 1 <= quality <= 100:
        raise ValueError(f"quality={quality}: JPEG takes 1 to 100")
    array, buffer = image.movedim(0, -1).numpy(), io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, format="JPEG", quality=quality)
    return buffer.tell()


# --- models that judge --------------------------------------------------------------------------------------------


class ClassifierProbability:
    """The probability that a classifier gives to the wanted class.

    Args:
        classifier: something with `predict_proba` (scikit-learn; it sees flattened images), or a callable from images
            [B, C, H, W] to logits [B, K].
        label: the class, or `(prompt, metadata) -> class`.
    """

    def __init__(self, classifier: Any, label: int | Callable[[str, Any], int]) -> None:
        self.classifier = classifier
        self.label = label

    @torch.no_grad()
    def probabilities(self, images: Any) -> Tensor:
        """[B, K]"""
        tensor = as_images(images)
        if hasattr(self.classifier, "predict_proba"):
            found = self.classifier.predict_proba(tensor.flatten(1).cpu().numpy())
            return torch.as_tensor(found, dtype=torch.float32, device=tensor.device)
        return self.classifier(tensor).float().softmax(-1)

    def __call__(self, images: Any, prompts: Sequence[str], metadata: Sequence[Any]) -> Scored:
        probability_BK = self.probabilities(images)
        if callable(self.label):
            asked = [self.label(prompt, extra) for prompt, extra in zip(prompts, metadata, strict=True)]
        else:
            asked = [self.label] * len(probability_BK)
        classes = torch.tensor(asked, device=probability_BK.device)
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < probability_BK.shape[1]:
            raise ValueError(
                f"label={sorted(set(asked))}: the classifier has the classes 0..{probability_BK.shape[1] - 1}"
            )
        return probability_BK.gather(1, classes[:, None])[:, 0], {}


class AestheticScorer:
    """Scores the embedding of an image, for example by LAION's aesthetic predictor.

    The predictor of section 5.1 of arXiv:2305.13301 is
    `AestheticScorer(clip_embedding(CLIPVisionModelWithProjection.from_pretrained("openai/clip-vit-large-patch14")),
    AestheticHead.from_file("sac+logos+ava1-l14-linearMSE.pth"))`.

    Args:
        embed: images [B, C, H, W] in 0..1 to embeddings [B, D]; they are normalised to length 1.
        head: embeddings to scores [B] or [B, 1].
    """

    def __init__(self, embed: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor]) -> None:
        self.embed = embed
        self.head = head

    @torch.no_grad()
    def __call__(self, images: Any, prompts: Sequence[str], metadata: Sequence[Any]) -> Scored:
        embedded_BD = F.normalize(self.embed(as_images(images)), dim=-1)
        return self.head(embedded_BD).reshape(len(embedded_BD)), {}


class AestheticHead(nn.Module):
    """The layers of LAION's improved aesthetic predictor, on embeddings of CLIP ViT-L/14."""

    def __init__(self, dimension: int = 768) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dimension, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
            nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, embedded_BD: Tensor) -> Tensor:
        return self.layers(embedded_BD)[:, 0]

    @classmethod
    def from_file(cls, path: str) -> "AestheticHead":
        """Load the published weights, ready to score."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        head = cls(state["layers.0.weight"].shape[1])
        head.load_state_dict(state)
        return head.eval().requires_grad_(False)


def clip_embedding(model: Any) -> Callable[[Tensor], Tensor]:
    """`embed` of an `AestheticScorer` from a `transformers.CLIPVisionModelWithProjection`."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    size = model.config.image_size

    def embed(images: Tensor) -> Tensor:
        scale = size / min(images.shape[-2:])
        height, width = (max(size, round(length * scale)) for length in images.shape[-2:])
        large = F.interpolate(_as_rgb(images), size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (height - size) // 2, (width - size) // 2
        pixels = (large[..., top : top + size, left : left + size].cpu() - mean) / std
        return model(pixel_values=pixels.to(model.device, model.dtype)).image_embeds.float()

    return embed
