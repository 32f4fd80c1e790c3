"""The tiny vision-language models and their processors run, and pictures matter to them."""

import json

import pytest
import torch
from families import ANSWERS, COUNTS, FAMILIES, ROWS, SIZED, answered, asked, model_of, picture, processor_of, rows


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_runs(name):
    """A row alone, two pictures in it, rows of which one has none, and other pixels: other logits."""
    processor, model = processor_of(name), model_of(name)
    texts = [processor.apply_chat_template(asked(row) + answered(ANSWERS[row])) for row in (0, 1, 3)]
    assert all(ANSWERS[row] in text for row, text in zip((0, 1, 3), texts, strict=True))

    def run(texts, images):
        inputs = processor(text=texts, images=images, return_tensors="pt", padding=True)
        with torch.no_grad():
            return inputs, model(**inputs).logits

    inputs, logits = run([texts[0]], [[picture(0)]])
    image_tokens = (inputs["input_ids"] == model.config.image_token_id).sum().item()
    assert image_tokens == {"llava": 16, "smolvlm": 20, "idefics3": 20}.get(name, 4)
    assert logits.shape == (*inputs["input_ids"].shape, model.config.get_text_config().vocab_size)
    _, others = run([texts[0]], [[picture(1)]])
    assert (others - logits)[:, -1].abs().max() > 1e-3
    wide, _ = run([texts[0]], [[picture(0, (32, 16))]])
    assert (wide["input_ids"].shape[1] != inputs["input_ids"].shape[1]) == (name in SIZED)
    run([texts[1]], [[picture(0), picture(1, (32, 16))]])
    both, _ = run(
        [texts[0], texts[2]], [[picture(0)], []] if name in ("gemma3", "smolvlm", "idefics3") else [picture(0)]
    )
    assert (both["input_ids"][1] != model.config.image_token_id).all()
    run([texts[2]], None)


@pytest.mark.parametrize("kind", ROWS)
def test_rows(kind):
    """Eight rows with the pictures that COUNTS says; what comes out is made of PIL's pictures."""
    made = rows(kind)
    assert len(made) == len(COUNTS)
    if "images" in made.column_names:
        assert tuple(len(images) for images in made["images"]) == COUNTS
        assert made[1]["images"][0].tobytes() == picture(10, (32, 16)).tobytes()
    else:
        assert json.dumps(made[5]["messages"]).count("data:image/png;base64,") == 3
