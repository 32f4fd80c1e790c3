import io
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from trl.rewards.images import (
    AestheticHead,
    AestheticScorer,
    ClassifierProbability,
    as_images,
    brightness,
    clip_embedding,
    colour,
    colourfulness,
    jpeg_compressibility,
    jpeg_incompressibility,
)


def plain(red, green, blue, size=4):
    return torch.tensor([red, green, blue]).view(1, 3, 1, 1).expand(1, 3, size, size)


def score(reward, images, prompts=None):
    prompts = prompts or [""] * len(images)
    rewards, extra = reward(images, prompts, [{}] * len(prompts))
    assert isinstance(extra, dict)
    return rewards.tolist()


def test_every_form_of_image_is_the_same_image():
    pixels = (torch.rand(2, 3, 4, 5) * 255).round().byte()
    expected = pixels / 255
    channels_last = pixels.movedim(1, -1)
    forms = (
        expected, pixels, expected.movedim(1, -1), channels_last.numpy(), list(expected.movedim(1, -1)),
        [Image.fromarray(image) for image in channels_last.numpy()],
    )  # fmt: skip
    for form in forms:
        torch.testing.assert_close(as_images(form), expected)
    grey = (torch.rand(2, 1, 4, 5) * 255).round().byte()
    torch.testing.assert_close(as_images([Image.fromarray(image[0].numpy()) for image in grey]), grey / 255)
    assert as_images(expected.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"images of shape \(2, 4, 4\)"):
        as_images(torch.zeros(2, 4, 4))


def test_brightness_by_hand():
    images = torch.cat([plain(1.0, 0.0, 0.0), plain(1.0, 1.0, 1.0), plain(0.0, 0.5, 0.0)])
    assert score(brightness, images) == pytest.approx([0.299, 1.0, 0.2935])
    assert score(brightness, torch.full((1, 1, 2, 2), 0.25)) == pytest.approx([0.25])


def test_colour_by_hand():
    images = torch.cat([plain(1.0, 0.0, 0.0), plain(0.0, 1.0, 1.0), plain(1.0, 1.0, 0.0)])
    assert score(colour, images) == pytest.approx([1.0, 0.0, 1 - 1 / 3**0.5])
    assert score(partial(colour, rgb=(1.0, 1.0, 0.0)), images)[2] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="rgb="):
        colour(images, [], [], rgb=(255, 0, 0))


def test_colourfulness_by_hand():
    # one half red, the other green: red - green is +1 or -1 (std 1, mean 0), yellow - blue is 1/2 (std 0, mean 1/2)
    halves = torch.cat([plain(1.0, 0.0, 0.0), plain(0.0, 1.0, 0.0)], dim=-1)
    assert score(colourfulness, halves) == pytest.approx([1 + 0.3 * 0.5])
    assert score(colourfulness, plain(0.4, 0.4, 0.4)) == pytest.approx([0.0], abs=1e-6)


def test_jpeg_size_is_that_of_the_file():
    images = torch.rand(2, 3, 16, 16)
    buffer = io.BytesIO()
    array = (images[1] * 255).round().byte().movedim(0, -1).numpy()
    Image.fromarray(array).save(buffer, format="JPEG", quality=95)
    sizes = score(jpeg_incompressibility, images)
    assert sizes[1] == pytest.approx(len(buffer.getvalue()) / 1000)
    assert score(jpeg_compressibility, images) == [-size for size in sizes]


def test_jpeg_prefers_flat_images_and_low_quality_is_smaller():
    noise, flat = torch.rand(1, 1, 32, 32), torch.full((1, 1, 32, 32), 0.5)
    assert score(jpeg_incompressibility, noise) > score(jpeg_incompressibility, flat)
    assert score(partial(jpeg_incompressibility, quality=10), noise) < score(jpeg_incompressibility, noise)
    assert score(partial(jpeg_incompressibility, side=64), noise) > score(jpeg_incompressibility, noise)
    with pytest.raises(ValueError, match="quality=0"):
        jpeg_incompressibility(noise, [""], [{}], quality=0)


def test_classifier_from_scikit_learn():
    features, labels = np.array([[0.0] * 4, [1.0] * 4] * 5), [0, 1] * 5
    classifier = LogisticRegression().fit(features, labels)
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    expected = classifier.predict_proba(images.flatten(1).numpy())
    assert score(ClassifierProbability(classifier, 1), images) == pytest.approx(expected[:, 1].tolist())
    by_prompt = ClassifierProbability(classifier, lambda prompt, metadata: int(prompt))
    assert score(by_prompt, images, ["1", "0"]) == pytest.approx([expected[0, 1], expected[1, 0]])


def test_classifier_that_gives_logits():
    reward = ClassifierProbability(lambda images: torch.tensor([[0.0, np.log(3.0)]]).expand(len(images), 2), 1)
    assert score(reward, torch.zeros(2, 3, 4, 4)) == pytest.approx([0.75, 0.75])
    with pytest.raises(ValueError, match=r"label=\[2\]: the classifier has the classes 0..1"):
        ClassifierProbability(reward.classifier, 2)(torch.zeros(1, 3, 4, 4), [""], [{}])


def test_aesthetic_scorer_normalises_the_embedding():
    scorer = AestheticScorer(
        embed=lambda images: torch.tensor([[3.0, 4.0]]).expand(len(images), 2), head=lambda embedded: embedded[:, :1]
    )
    assert score(scorer, torch.zeros(2, 3, 4, 4)) == pytest.approx([0.6, 0.6])


def test_aesthetic_head_reads_the_published_layout(tmp_path):
    shapes = {0: (1024, 8), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    state = {f"layers.{at}.weight": torch.full(shape, 0.01) for at, shape in shapes.items()}
    state |= {f"layers.{at}.bias": torch.zeros(shape[0]) for at, shape in shapes.items()}
    torch.save(state, tmp_path / "head.pth")
    head = AestheticHead.from_file(str(tmp_path / "head.pth"))
    # no activations: every layer multiplies the sum by .01 and the width
    assert head(torch.ones(1, 8)).item() == pytest.approx(0.08 * 10.24 * 1.28 * 0.64 * 0.16, rel=1e-5)
    assert not head.training


def test_clip_embedding_of_a_random_clip():
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=6,
    )  # fmt: skip
    model = CLIPVisionModelWithProjection(config).eval()
    scorer = AestheticScorer(clip_embedding(model), AestheticHead(6).eval())
    assert len(score(scorer, torch.rand(3, 3, 20, 12))) == 3


def test_clip_embedding_crops_the_middle_and_normalises():
    seen = []

    def model(pixel_values):
        seen.append(pixel_values)
        return SimpleNamespace(image_embeds=pixel_values.flatten(1))

    model.config, model.device, model.dtype = SimpleNamespace(image_size=2), torch.device("cpu"), torch.float32
    wide = torch.zeros(1, 3, 2, 4)
    wide[..., 1:3] = 1.0
    clip_embedding(model)(wide)
    assert seen[0][0, :, 0, 0].tolist() == pytest.approx([1.930336, 2.074891, 2.145897], abs=1e-5)  # (1 - mean) / std
    assert seen[0].shape == (1, 3, 2, 2)
