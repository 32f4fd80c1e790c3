"""What a step with pictures costs: GRPO with 8 completions of one prompt, and DPO of 4 pairs, each with a picture.

`python -m benchmarks.vision_cost` prints the table of docs/vision.md. A way is a process of its own with one thread:
`here`, by the trainers; `together`, each completion a row of a padded batch with its own copy of the picture, as
transformers alone does it; `alone`, row by row. The model has SmolVLM-256M's widths and random weights.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness import printed_by

SIDE, PATCH, MERGED = 384, 16, 4
VISION_LAYERS, TEXT_LAYERS = 6, 8
COMPLETIONS, TOKENS, PAIRS, STEPS = 8, 32, 4, 3
"""of GRPO's prompt, of each completion, of DPO's step, and the steps that a way takes; the first is not counted"""
WAYS, JOBS = ("here", "together", "alone"), ("GRPO", "DPO")
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def processor_of() -> Any:
    """Idefics3's processor, which SmolVLM's is but for videos, over a vocabulary of SmolVLM's size."""
    import transformers as t
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    marks = ["<pad>", "<end>", "<unk>", "<user>", "<assistant>", "<image>", "<fake_token_around_image>"]
    marks += ["<global-img>", "<end_of_utterance>", *tiles]
    names = [*marks, *(f"w{number}" for number in range(49_280 - len(marks)))]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<unk>",
        extra_special_tokens=marks[5:],
    )  # fmt: skip
    pictures = t.Idefics3ImageProcessorPil(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    tokens = (SIDE // PATCH // MERGED) ** 2
    return t.Idefics3Processor(pictures, tokenizer, image_seq_len=tokens, chat_template=TEMPLATE)


def model_of(processor: Any) -> Any:
    """SmolVLM-256M's widths: 6 of its 12 layers that see, and 8 of its 30 that write."""
    import torch
    import transformers as t

    tokenizer = processor.tokenizer
    torch.manual_seed(0)
    config = t.Idefics3Config(
        text_config=t.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=576, intermediate_size=1536, num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        ),
        vision_config={
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": VISION_LAYERS,
            "num_attention_heads": 12, "image_size": SIDE, "patch_size": PATCH,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=MERGED,
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    return t.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def picture(number: int) -> Any:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def words(first: int, count: int) -> str:
    return " ".join(f"w{(first + 17 * i) % 40_000}" for i in range(count))


def rows(job: str) -> list[dict[str, Any]]:
    """Prompts of a picture and 24 words; pairs with answers of so many words."""
    found = []
    for number in range(PAIRS if job == "DPO" else 1):
        content = [{"type": "image"}, {"type": "text", "text": words(100 * number, 24)}]
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": content}], "images": [picture(number)]}
        if job == "DPO":
            for side, first in (("chosen", 7), ("rejected", 5000)):
                row[side] = [{"role": "assistant", "content": words(first + 31 * number, TOKENS - 1)}]
        found.append(row)
    return found


class Counted:
    """Pictures that vision towers are given, and CPU seconds, from one step to the next."""

    def __init__(self) -> None:
        self.pictures, self.seen, self.steps = 0, 0, []
        self.began = time.process_time()

    def watch(self, model: Any) -> None:
        model.model.vision_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        self.pictures += len(given["pixel_values"] if "pixel_values" in given else args[0])

    def step(self, loss: float) -> None:
        """One is over."""
        now = time.process_time()
        self.steps.append({"cpu": now - self.began, "pictures": self.pictures - self.seen, "loss": loss})
        self.began, self.seen = now, self.pictures


def here(job: str, counted: Counted) -> None:
    """By the trainer."""
    from datasets import Dataset
    from transformers import TrainerCallback

    import trl

    processor = processor_of()
    model = model_of(processor)
    counted.watch(model)

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            if "loss" in logs:
                counted.step(logs["loss"])

    shared: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "max_steps": STEPS, "logging_steps": 1, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-6, "lr_scheduler_type": "constant",
    }  # fmt: skip
    data = Dataset.from_list(rows(job))
    if job == "DPO":
        config = trl.DPOConfig(per_device_train_batch_size=PAIRS, max_length=None, **shared)
        trainer = trl.DPOTrainer(
            model, args=config, train_dataset=data, processing_class=processor, callbacks=[Watch()]
        )  # fmt: skip
        counted.watch(trainer.ref_model)
    else:
        config = trl.GRPOConfig(
            per_device_train_batch_size=COMPLETIONS, num_generations=COMPLETIONS, max_completion_length=TOKENS,
            save_rollouts=False, **shared,
        )  # fmt: skip
        trainer = trl.GRPOTrainer(
            model, args=config, train_dataset=data, processing_class=processor, reward_funcs=judge, callbacks=[Watch()]
        )
    counted.began = time.process_time()
    trainer.train()


def judge(completions: Iterable[Any], **columns: Any) -> list[float]:
    return [float(number) for number, _ in enumerate(completions)]


def plain(job: str, counted: Counted, size: int) -> None:
    """By transformers alone, so many rows at a time."""
    import torch

    processor = processor_of()
    model = model_of(processor).train()
    counted.watch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    step = grpo_step if job == "GRPO" else dpo_step
    more = []
    if job == "DPO":
        reference = model_of(processor).eval().requires_grad_(False)
        counted.watch(reference)
        more = [reference]
    counted.began = time.process_time()
    for _ in range(STEPS):
        loss = step(model, processor, rows(job), size, *more)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        counted.step(loss)


def logps(model: Any, inputs: dict[str, Any], tokens: int) -> Any:
    """Of the last so many tokens of each row. [B, T]"""
    logits = model(**inputs, use_cache=False, logits_to_keep=tokens + 1).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(2, inputs["input_ids"][:, -tokens:, None]).squeeze(2)


def grpo_step(model: Any, processor: Any, given: list[dict[str, Any]], size: int) -> float:
    import torch

    text = processor.apply_chat_template(given[0]["prompt"], add_generation_prompt=True, tokenize=False)
    inputs = dict(processor(text=[text] * size, images=[given[0]["images"]] * size, return_tensors="pt"))
    model.eval()
    made = [
        model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
        for _ in range(COMPLETIONS // size)
    ]
    model.train()
    rewards = torch.tensor(judge(range(COMPLETIONS)))
    advantages = ((rewards - rewards.mean()) / rewards.std()).split(size)
    for ids, own in zip(made, advantages, strict=True):
        both = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        lp = logps(model, both, TOKENS)
        (-(own[:, None] * (lp - lp.detach()).exp()).sum() / (COMPLETIONS * TOKENS)).backward()
    return 0.0


def dpo_step(model: Any, processor: Any, given: list[dict[str, Any]], size: int, reference: Any) -> float:
    import torch

    total, pairs = 0.0, max(1, size // 2)
    for first in range(0, len(given), pairs):
        some = given[first : first + pairs]
        sides = []
        for side in ("chosen", "rejected"):
            texts = [processor.apply_chat_template(row["prompt"] + row[side], tokenize=False) for row in some]
            sides.append(dict(processor(text=texts, images=[row["images"] for row in some], return_tensors="pt")))
        if size > 1:
            sides = [{name: torch.cat([side[name] for side in sides]) for name in sides[0]}]
        policy = torch.cat([logps(model, side, TOKENS).sum(-1) for side in sides])
        with torch.no_grad():
            base = torch.cat([logps(reference, side, TOKENS).sum(-1) for side in sides])
        chosen, rejected = (policy - base).chunk(2)
        loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).sum() / len(given)
        loss.backward()
        total += loss.item()
    return total


def measure(job: str, way: str) -> None:
    """Print what the steps after the first cost, and the most memory that the process held."""
    import torch

    torch.set_num_threads(1)
    counted = Counted()
    rows_at_once = {"together": COMPLETIONS, "alone": 1}
    here(job, counted) if way == "here" else plain(job, counted, rows_at_once[way])
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    cpu = min(step["cpu"] for step in counted.steps[1:])
    losses = [round(step["loss"], 6) for step in counted.steps]
    found = {"cpu": cpu, "pictures": counted.steps[-1]["pictures"], "mb": int(peak.split()[1]) / 1024, "losses": losses}
    print(json.dumps(found))


def main() -> None:
    chosen = sys.argv[1:] or JOBS
    print("| step | way | pictures encoded | CPU seconds | peak memory, MB |\n| --- | --- | --- | --- | --- |")
    for job in chosen:
        for way in WAYS:
            code = f"from benchmarks.vision_cost import measure; measure({job!r}, {way!r})"
            found = json.loads(printed_by(code).splitlines()[-1])
            print(f"{job}, {way}: losses {found['losses']}", file=sys.stderr)
            print(f"| {job} | {way} | {found['pictures']:g} | {found['cpu']:.1f} | {found['mb']:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
