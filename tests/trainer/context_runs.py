"""Trainers whose ranks share their rows: what they learn, and what they refuse."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import transformers as t
from accelerate import ParallelismConfig
from conformity import tokenizer
from datasets import Dataset
from peft import LoraConfig
from sharded_runs import shard_on_the_cpu
from tiny_recurrent import model as recurrent

import trl
from trl.models.forward import plan_of

SIZES = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "plain": t.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "tied": t.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "windows": t.Gemma2Config(**SIZES, head_dim=8, sliding_window=24, final_logit_softcapping=2.0),
    "sinks": t.GptOssConfig(
        **SIZES, head_dim=8, sliding_window=24, num_local_experts=2, num_experts_per_tok=1, router_aux_loss_coef=0.1,
        output_router_logits=True, layer_types=["sliding_attention", "full_attention"],
    ),
}  # fmt: skip


def seeded(kind: str) -> Any:
    """The same model on every rank."""
    torch.manual_seed(0)
    if kind == "reward":
        return t.AutoModelForSequenceClassification.from_config(t.LlamaConfig(**SIZES, num_labels=1))
    if kind == "steps":
        return t.AutoModelForTokenClassification.from_config(t.LlamaConfig(**SIZES, num_labels=2))
    return t.AutoModelForCausalLM.from_config(CONFIGS[kind])


def ids(length: int, seed: int) -> list[int]:
    return [4 + (i * i * 7 + seed * 13 + i) % 90 for i in range(length)]


def texts(*lengths: int) -> Dataset:
    return Dataset.from_list([{"input_ids": ids(length, seed)} for seed, length in enumerate(lengths)])


def pairs(scale: int = 1) -> Dataset:
    return Dataset.from_list(
        [{"prompt_ids": ids((5 + i) * scale, i), "chosen_ids": ids((3 + i % 3) * scale, i + 20),
          "rejected_ids": ids((2 + i % 4) * scale, i + 40)} for i in range(6)]
    )  # fmt: skip


def unpaired() -> Dataset:
    rows = [{"prompt_ids": ids(5 + i, i), "completion_ids": ids(3 + i % 3, i + 20)} for i in range(6)]
    return Dataset.from_list([{**row, "label": i % 3 > 0} for i, row in enumerate(rows)])


def steps() -> Dataset:
    rows = [{"input_ids": ids(12, i), "labels": [-100] * 5 + [i % 2] + [-100] * 5 + [1]} for i in range(6)]
    return Dataset.from_list(rows)


@dataclass(frozen=True)
class Case:
    trainer: str
    rows: Callable[[], Dataset]
    kind: str = "plain"
    settings: dict[str, Any] = field(default_factory=dict)
    lora: bool = False
    sharded: bool | None = None
    """on weights that FSDP2 shards, or whole ones; None: on both"""


LONG = (2000, 801, 1200, 2000, 300)
CASES = {
    "long rows": Case(
        "SFT", partial(texts, *LONG), settings={"max_length": 2000, "gradient_accumulation_steps": 2},
    ),
    "packed rows, checkpointed": Case(
        "SFT", partial(texts, *LONG), "tied", sharded=True,
        settings={"max_length": 2000, "packing": True, "gradient_checkpointing": True, "eval_packing": False},
    ),
    "a budget of tokens": Case(
        "SFT", partial(texts, *LONG), settings={"max_length": 300, "max_tokens_per_microbatch": 400}, sharded=False,
    ),
    "adapter": Case("SFT", partial(texts, 90, 40, 3, 30, 7, 61), lora=True, sharded=True),
    "windows and soft-caps": Case("SFT", partial(texts, 90, 40, 3, 30, 7, 61), "windows", sharded=False),
    "sinks and balanced experts": Case("SFT", partial(texts, 90, 40, 3, 30, 7, 61), "sinks", sharded=False),
    "DPO": Case("DPO", partial(pairs, 30), settings={"beta": 0.3}),
    "DPO, adapter, precomputed": Case(
        "DPO", pairs, lora=True, settings={"precompute_ref_log_probs": True, "gradient_checkpointing": True},
        sharded=False,
    ),
    "DPO, losses with a state": Case("DPO", pairs, settings={"loss_type": ["bco_pair", "kto_pair"]}, sharded=False),
    "KTO": Case("KTO", unpaired, settings={"beta": 0.3}, sharded=True),
    "reward": Case("Reward", pairs, "reward", settings={"center_rewards_coefficient": 0.1}, sharded=True),
    "process reward": Case("PRM", steps, "steps", sharded=False),
}  # fmt: skip
ENGINES = [
    (name, sharded) for name, case in CASES.items() for sharded in (False, True) if case.sharded in (None, sharded)
]


def build(case: Case, folder: str, arguments: dict[str, Any] | None = None, **more: Any) -> Any:
    settings = {
        "output_dir": folder, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 3,
        "logging_steps": 1, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "use_cpu": True,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 3, **case.settings, **more,
    }  # fmt: skip
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
    rows = case.rows()
    return getattr(trl, f"{case.trainer}Trainer")(
        args=getattr(trl, f"{case.trainer}Config")(**settings),
        train_dataset=rows,
        eval_dataset=rows.select(range(3)),
        processing_class=tokenizer(),
        **({"peft_config": adapter} if case.lora else {}),
        **{"model": seeded(case.kind), **(arguments or {})},
    )


def train(case: Case, **settings: Any) -> dict[str, Any]:
    """What three steps and an evaluation log, and the weights then."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(case, folder, **settings)
        trainer.train()
        trainer.evaluate()
    timed = ("runtime", "per_second", "total_flos")
    history = [
        {k: v for k, v in row.items() if not any(part in k for part in timed)} for row in trainer.state.log_history
    ]
    weights = {name: whole(weight).detach().clone() for name, weight in trainer.model.named_parameters()}
    return {
        "logged": history, "weights": weights, "packed": plan_of(trainer.model).packed,
        "ranks": trainer.shared.size, "sharded": trainer.is_fsdp_enabled, "flops": trainer.state.total_flos,
    }  # fmt: skip


def whole(weight: Any) -> torch.Tensor:
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def settings_of(case: Case, sharded: bool) -> dict[str, Any]:
    """Two ranks share rows: by our own field, or by accelerate's config, which wants FSDP2."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # TrainingArguments set it, and leave it
    if not sharded:
        return {"context_parallel_size": 2, "ddp_backend": "gloo"}
    layer = "Gemma2DecoderLayer" if case.kind == "windows" else "LlamaDecoderLayer"
    fsdp = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": [layer]}
    return {
        "parallelism_config": ParallelismConfig(cp_size=2),
        "fsdp": True,
        "fsdp_config": fsdp,
        "ddp_backend": "gloo",
    }


REFUSED: dict[str, tuple[Case, dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "padded rows": (CASES["adapter"], {"padding_free": False}, dict),
    "two numbers": (CASES["KTO"], {"parallelism_config": ParallelismConfig(cp_size=3)}, dict),
    "three ranks of two": (CASES["KTO"], {"context_parallel_size": 3}, dict),
    "a recurrence": (CASES["adapter"], {}, lambda: {"model": recurrent("lfm2")}),
    "ALiBi": (CASES["DPO"], {}, lambda: {"model": t.AutoModelForCausalLM.from_config(
        t.BloomConfig(vocab_size=100, hidden_size=16, n_layer=2, n_head=2))}),
    "an encoder": (CASES["reward"], {}, lambda: {"model": t.AutoModelForSequenceClassification.from_config(
        t.BertConfig(vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                     num_attention_heads=2, num_labels=1))}),
}  # fmt: skip


class WholeRows(trl.SFTTrainer):
    """Learns from a pass of its own."""

    def objective(self, model: Any, batch: Any) -> Any:
        return trl.losses.loss_sum.LossSum(model(input_ids=batch["input_ids"]).logits.sum(), self.count(batch))


def refusals() -> dict[str, str]:
    """The error of each case that cannot be done."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (case, settings, model) in REFUSED.items():
            given = {**settings_of(case, False), **settings}
            found[name] = error_of(partial(build, replace(case, lora=False), folder, model(), **given))
        os.environ |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}
        found["GRPO under the launcher"] = error_of(lambda: grpo(folder))
        found["rows at random"] = error_of(lambda: build_own(folder, data_collator=at_random).train())
        found["whole rows"] = error_of(lambda: build_own(folder).train())
    return found


def at_random(rows: Any) -> Any:
    """A collator that leaves out other tokens on each rank."""
    ids = torch.tensor([row["input_ids"][: 2 + int(os.environ["RANK"])] for row in rows])
    return {"input_ids": ids, "labels": ids}


def build_own(folder: str, **more: Any) -> Any:
    """A trainer whose objective is the user's, under the launcher that asks for two ranks a row."""
    trl.WholeRowsTrainer, trl.WholeRowsConfig = WholeRows, trl.SFTConfig  # type: ignore[attr-defined]
    case = replace(CASES["adapter"], trainer="WholeRows", lora=False)
    fsdp = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    return build(case, folder, more, fsdp=True, fsdp_config=fsdp, ddp_backend="gloo")


def grpo(folder: str) -> Any:
    args = trl.GRPOConfig(
        folder, use_cpu=True, fsdp=True, fsdp_config={"fsdp_version": 2}, ddp_backend="gloo", report_to="none",
        per_device_train_batch_size=4, num_generations=4,
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": ["a b"] * 8})
    return trl.GRPOTrainer(
        seeded("plain"), args=args, reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        train_dataset=rows, processing_class=tokenizer(),
    )  # fmt: skip


def error_of(make: Callable[[], Any]) -> str:
    try:
        make()
    except ValueError as error:
        return str(error)
    return ""


def run_all(rank: int, world: int, path: str) -> None:
    """`train` each case and write what came of it to `path`."""
    found: dict[Any, Any] = {}
    if world == 1:
        found = {name: train(case) for name, case in CASES.items()}
    else:
        torch.set_num_threads(1)
        shard_on_the_cpu()
        for name, sharded in ENGINES:
            found[name, sharded] = train(CASES[name], **settings_of(CASES[name], sharded))
        found["refused"] = refusals()
    torch.save(found, f"{path}-{rank}")
