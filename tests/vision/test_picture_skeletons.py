"""Short scripts with pictures as users write them today: they run unchanged, on a tiny model, and learn."""

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from families import model_of, picture, processor_of
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification, AutoProcessor

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:You passed a model_id")]
QUIET = {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "max_steps": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and its processor, as they lie on disk."""
    return saved("llava", tmp_path_factory.mktemp("models") / "tiny-llava")


def saved(family, place):
    model_of(family).save_pretrained(place)
    processor_of(family).save_pretrained(place)
    return str(place)


def asked(text="What is this?", pictures=1):
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": text}]
    return {"role": "user", "content": content}


def answered(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def learned(trainer, keys=("loss",)):
    """It took its steps, its weights moved, and what it logged are numbers."""
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(before[name], value)}
    assert any("vision" in name for name in moved), "the tower did not learn"
    assert any("language" in name for name in moved)
    logged = {key: value for row in trainer.state.log_history for key, value in row.items()}
    assert all(torch.isfinite(torch.tensor(logged[key])) for key in keys)
    return logged


def test_sft_by_the_name_of_a_folder(folder, tmp_path):
    """`messages` of texts and `images`, and nothing but a path."""
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list(
        [
            {
                "messages": [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A cat."}],
                "images": [picture(number)],
            }
            for number in range(4)
        ]
    )
    training_args = SFTConfig(output_dir=str(tmp_path), max_length=None, per_device_train_batch_size=2, **QUIET)
    with pytest.warns(UserWarning, match="will automatically create an `AutoModelForImageTextToText`"):
        trainer = SFTTrainer(model=folder, args=training_args, train_dataset=rows)
    learned(trainer)
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoProcessor.from_pretrained(tmp_path / "saved")  # a whole model: its processor lies with it
    assert type(again) is type(AutoProcessor.from_pretrained(folder))
    AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")


def test_sft_with_parts_that_hold_their_pictures(folder, tmp_path):
    """The form of vision recipes: pictures inside of the messages, several a turn and over turns."""
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    rows = [
        {
            "messages": [
                {"role": "user", "content": [
                    {"type": "image", "image": picture(number)}, {"type": "image", "image": picture(number + 9)},
                    {"type": "text", "text": "Which is older?"}]},
                answered("The first."),
                {"role": "user", "content": [
                    {"type": "text", "text": "And now?"}, {"type": "image", "image": picture(number + 20)}]},
                answered("The third."),
            ]
        }
        for number in range(2)
    ]  # fmt: skip
    training_args = SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=2,
        assistant_only_loss=True, max_length=None, **QUIET,
    )  # fmt: skip
    learned(SFTTrainer(model=model, args=training_args, train_dataset=rows, processing_class=processor))


def test_sft_of_prompts_and_completions(folder, tmp_path):
    """One picture in `image`, as a column of `datasets` with its own feature; evaluation and LoRA beside it."""
    from peft import LoraConfig

    from trl import SFTConfig, SFTTrainer

    features = Features({"prompt": List({"role": Value("string"), "content": Value("string")}), "image": Image(),
                         "completion": List({"role": Value("string"), "content": Value("string")})})  # fmt: skip
    rows = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "How many?"}],
                "completion": [{"role": "assistant", "content": str(number)}],
                "image": picture(number),
            }
            for number in range(4)
        ],
        features=features,
    )
    trainer = SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(folder),
        args=SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, max_length=None, **QUIET),
        train_dataset=rows,
        eval_dataset=rows.select(range(2)),
        processing_class=AutoProcessor.from_pretrained(folder),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    learned(trainer)
    assert trainer.evaluate()["eval_loss"] > 0


def pairs(count=4):
    return Dataset.from_list(
        [
            {
                "prompt": [asked()],
                "chosen": [answered("A small cat.")],
                "rejected": [answered("A dog.")],
                "images": [picture(number)],
            }
            for number in range(count)
        ]
    )


def test_dpo(folder, tmp_path):
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(folder),
        ref_model=AutoModelForImageTextToText.from_pretrained(folder),
        args=DPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, max_length=None, **QUIET),
        train_dataset=pairs(),
        processing_class=AutoProcessor.from_pretrained(folder),
    )
    logged = learned(trainer)
    assert logged["loss"] == pytest.approx(0.6931, abs=1e-4)  # the first step: policy and reference agree


def test_kto(folder, tmp_path):
    from trl import KTOConfig, KTOTrainer

    rows = [
        {
            "prompt": [asked()],
            "completion": [answered("A cat.")],
            "label": bool(number % 2),
            "images": [picture(number)],
        }
        for number in range(4)
    ]
    trainer = KTOTrainer(
        model=folder,
        args=KTOConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, **QUIET),
        train_dataset=Dataset.from_list(rows),
    )
    logged = learned(trainer)
    assert logged["loss"] == pytest.approx(0.5, abs=1e-4)


def test_reward(tmp_path):
    """Gemma 3 is the family that transformers has a classifier of."""
    from trl import RewardConfig, RewardTrainer

    gemma = saved("gemma3", tmp_path / "gemma")
    processor = AutoProcessor.from_pretrained(gemma)
    model = AutoModelForSequenceClassification.from_pretrained(gemma, num_labels=1)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, **QUIET),
        processing_class=processor,
        train_dataset=pairs(),
    )
    learned(trainer)


def prompts(count=4, pictures=1):
    return Dataset.from_list(
        [
            {
                "prompt": [asked("Which is it?", pictures)],
                "images": [picture(10 * number + place) for place in range(pictures)],
                "answer": str(number),
            }
            for number in range(count)
        ]
    )


def test_grpo_with_a_reward_that_sees_the_pictures(folder, tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    seen = []

    def red(completions, images, answer, **kwargs):
        assert len(completions) == len(images) == len(answer) == 8
        seen.extend(zip(images, answer, strict=True))
        return [shown[0].getpixel((0, 0))[0] / 255 + len(text[0]["content"]) for shown, text in
                zip(images, completions, strict=True)]  # fmt: skip

    rows = prompts(pictures=2)
    trainer = GRPOTrainer(
        model=folder,
        reward_funcs=red,
        args=GRPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_completion_length=6, **QUIET
        ),
        train_dataset=rows,
    )
    trainer.train()
    assert trainer.state.global_step == 1
    originals = {row["answer"]: row["images"] for row in rows}
    for shown, answer in seen:
        assert [one.tobytes() for one in shown] == [one.convert("RGB").tobytes() for one in originals[answer]]


def test_rloo(folder, tmp_path):
    from trl import RLOOConfig, RLOOTrainer

    trainer = RLOOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(folder),
        reward_funcs=lambda completions, **kwargs: [float(number % 4) for number in range(len(completions))],
        args=RLOOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=6,
            beta=0.1,
            **QUIET,
        ),
        train_dataset=prompts(),
        processing_class=AutoProcessor.from_pretrained(folder),
    )
    learned(trainer, ("loss", "reward"))


def test_online_dpo(folder, tmp_path):
    from trl import OnlineDPOConfig, OnlineDPOTrainer

    trainer = OnlineDPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(folder),
        reward_funcs=lambda completions, images, **kwargs: [float(i % 2) for i, _ in enumerate(images)],
        args=OnlineDPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, max_new_tokens=6, **QUIET),
        train_dataset=prompts(),
        processing_class=AutoProcessor.from_pretrained(folder),
    )
    learned(trainer)


def test_distillation(folder, tmp_path):
    from trl import DistillationConfig, DistillationTrainer

    teacher = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(2)
    trainer = DistillationTrainer(
        model=AutoModelForImageTextToText.from_pretrained(folder),
        teacher_model=teacher,
        args=DistillationConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_completion_length=6, lmbda=1.0, **QUIET
        ),
        train_dataset=prompts(),
        processing_class=AutoProcessor.from_pretrained(folder),
    )
    assert learned(trainer)["loss"] > 0


def test_a_collator_that_reads_pictures_itself_is_refused(folder, tmp_path):
    """The batch of the older form has pixels, which would be left out; the rows alone are enough."""
    from trl import SFTConfig, SFTTrainer

    processor = AutoProcessor.from_pretrained(folder)
    rows = [{"messages": [asked(), answered("A cat.")], "images": [picture(number)]} for number in range(2)]

    def collate(examples):
        texts = [processor.apply_chat_template(example["messages"], tokenize=False) for example in examples]
        pictures = [example["images"] for example in examples]
        batch = processor(text=texts, images=pictures, return_tensors="pt", padding=True)
        return batch | {"labels": batch["input_ids"].clone()}

    def train(**settings):
        trainer = SFTTrainer(
            model=AutoModelForImageTextToText.from_pretrained(folder),
            args=SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, **settings, **QUIET),
            data_collator=collate,
            train_dataset=rows,
            processing_class=processor,
        )
        trainer.train()

    with pytest.raises(ValueError, match=r"returned pixel_values: the trainer reads pictures itself; leave .* out"):
        train(remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True})
    with pytest.raises(ValueError, match=r"looks for 'messages' in rows that are tokenised already .*: leave it out"):
        train()


def test_a_collator_of_texts_does_not_teach_pictures(folder, tmp_path):
    """It makes labels of all ids; those of pictures are left out of the 2 + 1 tokens that are learned."""
    from transformers import DataCollatorForLanguageModeling

    from trl import SFTConfig, SFTTrainer

    processor = AutoProcessor.from_pretrained(folder)
    trainer = SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(folder),
        args=SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=1, **QUIET),
        data_collator=DataCollatorForLanguageModeling(processor.tokenizer, mlm=False),
        train_dataset=[{"prompt": "<image>", "completion": "ab", "images": [picture(0)]}],
        processing_class=processor,
    )
    trainer.train()
    (batch,) = trainer.get_train_dataloader()
    assert int((batch["packed"].ids_N < 0).sum()) == 16
    end = processor.tokenizer.eos_token_id
    assert batch["packed"].target_S.tolist() == [*processor.tokenizer("ab", add_special_tokens=False).input_ids, end]
