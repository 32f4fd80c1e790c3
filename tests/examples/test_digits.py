import pytest
import torch
from digits import digits_base
from digits.digits_base import digits, digits_pipeline, pretrain_digits
from digits.modeling_digits import NOTHING, DDPODigitsPipeline, DigitsTextEncoder, DigitsTokenizer, digits_unet
from PIL import Image


@pytest.fixture
def pipeline():
    return quiet(DDPODigitsPipeline(digits_unet(16), DigitsTextEncoder(64)))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("prompt", "digit"), [("7", 7), ("a 0", 0), ("Seven", 7), ("", NOTHING), (" ", NOTHING)])
def test_prompts_name_a_digit(prompt, digit):
    assert DigitsTokenizer()(prompt).input_ids.tolist() == [[digit]]


@pytest.mark.parametrize("prompt", ["a cat", "3 or 4", "12"])
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="name one digit"):
        DigitsTokenizer()([prompt])


def test_tokenizer_decodes():
    tokenizer = DigitsTokenizer()
    assert tokenizer.batch_decode(tokenizer(["3", ""]).input_ids, skip_special_tokens=True) == ["3", ""]


def test_pipeline_samples_with_and_without_guidance(pipeline):
    output = pipeline(["3", "4"], num_inference_steps=5, output_type="pt")
    assert output.images.shape == (2, 1, 8, 8)
    assert 0 <= output.images.min() <= output.images.max() <= 1
    assert [x.shape for x in output.latents] == [(2, 1, 8, 8)] * 6
    assert [x.shape for x in output.log_probs] == [(2,)] * 5
    assert all(x.abs().min() > 0 for x in output.log_probs), "every step is a draw"

    def images(**keywords):
        noise = torch.Generator().manual_seed(0)
        return pipeline(num_inference_steps=2, generator=noise, output_type="pt", **keywords).images

    assert torch.equal(images(prompt=["3"], guidance_scale=1.0), images(prompt=["3"], guidance_scale=0.0))
    assert not torch.equal(images(prompt=["3"], guidance_scale=3.0), images(prompt=["3"], guidance_scale=1.0))
    # Guided away from itself is not guided at all.
    torch.testing.assert_close(
        images(prompt=["3"], negative_prompt="3", guidance_scale=3.0), images(prompt=["3"], guidance_scale=1.0)
    )
    assert isinstance(pipeline("1", num_inference_steps=1).images[0], Image.Image)
    with pytest.raises(ValueError, match="either prompt or prompt_embeds"):
        pipeline()


def test_saved_pipeline_and_checkpoint_come_back(pipeline, tmp_path):
    pipeline.save_pretrained(str(tmp_path))
    again = DDPODigitsPipeline.from_pretrained(tmp_path)
    for ours, theirs in ((pipeline.unet, again.unet), (pipeline.text_encoder, again.text_encoder)):
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name])
    torch.nn.init.ones_(again.unet.conv_in.weight)
    again.load_checkpoint([again.unet], str(tmp_path))
    assert torch.equal(again.unet.conv_in.weight, pipeline.unet.conv_in.weight)
    with pytest.raises(ValueError, match="Unknown model type"):
        again.save_checkpoint([torch.nn.Linear(1, 1)], [], str(tmp_path))
    with pytest.raises(ValueError, match="length 1"):
        again.load_checkpoint([], str(tmp_path))


def test_base_model_is_trained_once(tmp_path, monkeypatch):
    before = torch.get_rng_state()
    monkeypatch.setenv("TRL_CACHE", str(tmp_path))
    first = digits_pipeline(steps=2, width=8)
    assert torch.equal(torch.get_rng_state(), before), "training the base must not move the caller's random state"
    monkeypatch.setattr(digits_base, "pretrain_digits", None)
    second = digits_pipeline(steps=2, width=8)
    for name, value in first.unet.state_dict().items():
        assert torch.equal(value, second.unet.state_dict()[name])
    assert len(list(tmp_path.iterdir())) == 1


def test_the_real_digits():
    images, labels = digits()
    assert images.shape == (1797, 1, 8, 8)
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (images.min(), images.max()) == (0, 1)


@pytest.mark.slow
def test_base_model_learns_to_draw_what_was_asked():
    torch.manual_seed(0)
    pipeline = quiet(pretrain_digits(steps=100))
    prompts = [str(index % 10) for index in range(100)]
    drawn = pipeline(prompts, output_type="pt").images.flatten(1)
    images, labels = digits()
    nearest = labels[torch.cdist(drawn, images.flatten(1)).argmin(1)]
    asked = torch.tensor([int(prompt) for prompt in prompts])
    assert (nearest == asked).float().mean() > 0.4  # chance: 0.1
