"""A table of three steps of each trainer, on one process and on two ranks of an engine: DDP, FSDP2, FSDP2 with LoRA.

accelerate turns FSDP2 on for accelerators only: `shard_on_the_cpu` makes it do so on ranks of a CPU.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from conformity import CASES, build, config, history, tokenizer
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma2Config
from zero_runs import begin_whole, whole, zero_config, zero_plugin

from trl.generation import packed_weights
from trl.models.forward import plan_of

SIZES = {name: getattr(config(), name) for name in (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
)}  # fmt: skip
GEMMA = {"head_dim": 8, "final_logit_softcapping": 2.0, "tie_word_embeddings": False}


def seeded(kind: str) -> torch.nn.Module:
    """The same model on every rank."""
    torch.manual_seed(0)
    if kind == "reward":
        return AutoModelForSequenceClassification.from_config(config(num_labels=1))
    if kind == "soft-cap":
        return AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, **GEMMA))
    return AutoModelForCausalLM.from_config(config(tie_word_embeddings=kind == "tied"))


def shard_on_the_cpu() -> None:
    """Make accelerate take its FSDP plugin on ranks of a CPU too. Call it before the first Accelerator is made."""
    make = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = init


@dataclass(frozen=True)
class Run:
    """A row of the table."""

    case: str
    """of the conformity suite"""
    kind: str = ""
    """of the model, see `seeded`; "": that of the case"""
    settings: dict[str, Any] = field(default_factory=dict)
    rows: int = 4
    """of an optimizer step, over all ranks"""
    lora: bool = True
    """whether it has a column with an adapter"""
    arguments: Callable[[], dict[str, Any]] | None = None
    """of the constructor; None: those of the case"""


def episodes() -> dict[str, Any]:
    """An environment whose episodes have different numbers of turns."""
    from environments_for_tests import talkative

    return {"environment": talkative()}


def adapted(**more: Any) -> Callable[[], dict[str, Any]]:
    """An adapter on other modules than that of the columns with LoRA."""
    from peft import LoraConfig

    settings = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": "gaussian", **more}
    return lambda: {"peft_config": LoraConfig(**settings)}


ON_HEAD = ["q_proj", "lm_head"]
ROLLOUT = {"max_completion_length": 6, "num_generations": 2, "save_rollouts": False}
RUNS: dict[str, Run] = {
    "SFT": Run("sft", "plain"),
    "SFT, packed to blocks": Run("sft-packing", settings={"max_length": 14}, lora=False),
    "SFT, tied head": Run("sft", "tied"),
    "SFT, soft-capped logits": Run("sft", "soft-cap", lora=False),
    "SFT, gradient checkpointing": Run("sft", "plain", {"gradient_checkpointing": True}),
    "SFT, token budget": Run("sft", "plain", {"max_tokens_per_microbatch": 14}),
    "SFT, accumulation": Run("sft", "plain", {"gradient_accumulation_steps": 2}, rows=2, lora=False),
    "SFT, adapter on the head": Run("sft", "plain", arguments=adapted(target_modules=ON_HEAD), lora=False),
    "SFT, adapter and a whole head": Run("sft", "plain", arguments=adapted(modules_to_save=["lm_head"]), lora=False),
    "Reward": Run("reward", "reward"),
    "PRM": Run("prm"),
    "DPO": Run("dpo-sigmoid", "plain"),
    "DPO, adapter on the head": Run("dpo-sigmoid", "plain", arguments=adapted(target_modules=ON_HEAD), lora=False),
    "DPO, moving reference": Run("dpo-many", lora=False),
    "DPO, precomputed reference": Run("dpo-sigmoid", settings={"precompute_ref_log_probs": True}),
    "DPO, token budget": Run("dpo-sigmoid", "plain", {"max_tokens_per_microbatch": 14}, lora=False),
    "KTO": Run("kto", "plain"),
    "ORPO": Run("orpo"),
    "CPO": Run("cpo"),
    "GRPO": Run("grpo", settings={**ROLLOUT, "beta": 0.1, "num_iterations": 2}),
    "GRPO, groups across ranks": Run("grpo", settings={**ROLLOUT, "num_generations": 4}),
    "GRPO, moving reference": Run(
        "grpo",
        settings={**ROLLOUT, "beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
        lora=False,
    ),
    "GRPO, layer by layer": Run(
        "grpo", settings={**ROLLOUT, "max_completion_length": 8, "beta": 0.1, "gather": "layers"}
    ),
    "GRPO, adapter on the head": Run(
        "grpo",
        settings={**ROLLOUT, "beta": 0.1},
        arguments=lambda: {**CASES["grpo"].arguments(), **adapted(target_modules=ON_HEAD)()},
        lora=False,
    ),
    "GRPO, environment": Run("grpo", settings={**ROLLOUT, "max_completion_length": 20}, arguments=episodes),
    "GRPO, environment, layer by layer": Run(
        "grpo", settings={**ROLLOUT, "max_completion_length": 20, "gather": "layers"}, arguments=episodes, lora=False
    ),
    "RLOO": Run("rloo", settings=ROLLOUT),
    "Online DPO": Run("online-dpo", settings={**ROLLOUT, "dynamic_sampling": False, "generation_batch_size": None}),
    "RAFT": Run("raft", settings={**ROLLOUT, "keep_best": 1}),
    "Distillation": Run("distillation", settings={**ROLLOUT, "num_iterations": 1}),
    "GKD, samples of the teacher": Run(
        "gkd", settings={"max_completion_length": 6, "save_rollouts": False, "seq_kd": True}, lora=False
    ),
    "PPO, step": Run("ppo"),
    "PPO, step, critic": Run("ppo", lora=False),
    "PPO, train (greedy)": Run("ppo"),
    "GKD": Run("gkd", settings={"max_completion_length": 6, "save_rollouts": False}),
}
"""the name of a row -> how it is run"""
RESUMED = ("SFT", "SFT, tied head", "Reward", "DPO", "KTO", "GRPO", "RLOO", "Online DPO", "Distillation")
"""rows whose run is done again from its checkpoint of step 2"""
WHOLE = "SFT, tied head"
"""the one whose checkpoint has the weights whole under FSDP2; others have shards"""
PPO_NUMBERS = (
    "ppo/loss/total", "ppo/loss/policy", "ppo/loss/value", "objective/kl", "ppo/policy/entropy", "ppo/mean_scores",
    "ppo/std_scores", "ppo/val/mean", "ppo/val/var", "ppo/returns/mean", "ppo/returns/var",
    "ppo/mean_non_score_reward", "tokens/responses_len_std",
)  # fmt: skip


def ppo_trainer(world: int, engine: str, lora: bool, critic: bool) -> Any:
    """A trainer whose steps have four samples over all ranks."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model

    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    rows, keywords = 4 // world, dict[str, Any]()
    if engine.startswith("fsdp2"):
        keywords["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
        )
    if engine.startswith("zero"):
        begin_whole()
        keywords["deepspeed_plugin"] = zero_plugin(int(engine[4]))
    model: Any = seeded("plain")
    if lora:
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
        model = get_peft_model(model, adapter)
    torch.manual_seed(1)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(model)
    value_model = seeded("reward") if critic else None
    trained = [p for each in (model, value_model) if each is not None for p in each.parameters() if p.requires_grad]
    return PPOTrainer(
        PPOConfig(
            batch_size=rows, mini_batch_size=rows, ppo_epochs=2, steps=3 * rows, seed=0, max_new_tokens=5,
            max_grad_norm=0.5, accelerator_kwargs=keywords,
            generation_kwargs={"do_sample": False},  # each process has a random generator of its own
        ),
        model, tokenizer=tokenizer(), data_collator=list, value_model=value_model,
        optimizer=torch.optim.SGD(trained, lr=0.1),
        dataset=Dataset.from_list([{"prompt": text} for text in ("a b", "c", "d e f", "g h") * 3]),
        reward_funcs=lambda completions, **columns: [len(text) / 30 for text in completions],
    )  # fmt: skip


def ppo_step(trainer: Any, world: int) -> dict[str, Any]:
    """A step on this rank's part of four responses."""
    rows = 4 // world
    part = slice(trainer.accelerator.process_index * rows, (trainer.accelerator.process_index + 1) * rows)
    g = torch.Generator().manual_seed(1)
    queries = [torch.randint(4, 100, (3 + i,), generator=g) for i in range(4)]
    responses = [torch.randint(4, 100, (2 + 2 * i,), generator=g) for i in range(4)]
    scores = [torch.tensor(float(i)) for i in (3, 0, 1, -2)]
    return trainer.step(queries[part], responses[part], scores[part])


def ppo(world: int, engine: str, name: str, lora: bool) -> dict[str, Any]:
    """Three steps of PPO: by `train`, which samples, or by `step`; with a critic of its own, or a value head."""
    trainer = ppo_trainer(world, engine, lora, "critic" in name)
    steps: list[dict[str, Any]] = []
    if "train" in name:
        trainer.train(callback=lambda step, stats, batch: steps.append(stats))
    else:
        steps += [ppo_step(trainer, world) for _ in range(3)]
    models = {"policy": trainer.model, "critic": trainer.value_model}
    weights = {
        f"{who}.{key.removeprefix('module.')}": weight
        for who, model in models.items()
        if model is not None
        for key, weight in model.named_parameters()
    }
    numbers = {key: [float(stats[key]) for stats in steps] for key in PPO_NUMBERS}
    return gist(weights, {"loss": numbers.pop("ppo/loss/total"), **numbers}, plan_of(trainer.model).packed)


ENGINES = {"ddp": "DDP", "fsdp2": "FSDP2", "fsdp2-lora": "FSDP2 with LoRA"}
"""engine -> its column in the table"""
LOGGED = (
    "loss", "grad_norm", "kl", "reward", "entropy", "ratio", "rewards/margins", "rewards/accuracies", "logps/chosen",
    "eval_loss", "eval_reward", "mean_token_accuracy", "accuracy", "completions/mean_length", "num_tokens",
)  # fmt: skip


def runs_of(engine: str) -> list[str]:
    """The rows that this engine has."""
    return [name for name, run in RUNS.items() if run.lora or not engine.endswith("lora")]


def engine_settings(engine: str, layer: str = "LlamaDecoderLayer", kept: str = "SHARDED") -> dict[str, Any]:
    """What a config says for it. kept: FULL or SHARDED, what FSDP2's checkpoints have."""
    if engine == "one":
        return {}
    settings: dict[str, Any] = {"ddp_backend": "gloo"}
    if engine.startswith("fsdp2"):
        sharding = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": [layer]}
        settings |= {"fsdp": True, "fsdp_config": {**sharding, "state_dict_type": f"{kept}_STATE_DICT"}}
    if engine.startswith("zero"):
        settings |= {"deepspeed": zero_config(int(engine[4]))}
    return settings


def train_all(rank: int, world: int, path: str, engine: str, names: list[str], lora: bool) -> None:
    """`train` each of the rows and write what came of it to `path`, after each."""
    torch.set_num_threads(1)
    packed_weights._LARGE = 1  # so that the sampler lays these small weights out too
    if engine.startswith("fsdp2"):
        shard_on_the_cpu()
    found = {}
    for name in names:
        found[name] = train(world, engine, name, lora, Path(path).parent)
        torch.save(found, f"{path}-{rank}")


def train(world: int, engine: str, name: str, lora: bool, common: Path | None = None) -> dict[str, Any]:
    """Losses, gradient norms, other numbers, and weights after three steps.

    common: a folder of all ranks; the rows `RESUMED` are saved there and go on from there once more.
    """
    run = RUNS[name]
    if run.case == "ppo":
        return ppo(world, engine, name, lora)
    case = CASES[run.case]
    layer = "Gemma2DecoderLayer" if run.kind == "soft-cap" else "LlamaDecoderLayer"
    settings: dict[str, Any] = {"max_steps": 3, "use_cpu": True, "optim": "sgd", "learning_rate": 0.1}
    settings |= {**run.settings, **engine_settings(engine, layer, "FULL" if name == WHOLE else "SHARDED")}
    if engine.startswith("zero"):
        begin_whole()
    if run.kind:
        case = replace(case, model=lambda: seeded(run.kind))
    CASES["at hand"] = replace(
        case, settings={**case.settings, **run.settings}, arguments=run.arguments or case.arguments
    )
    rows = {f"per_device_{kind}_batch_size": run.rows // world for kind in ("train", "eval")}
    resumes = common is not None and world > 1 and name in RESUMED
    if resumes:
        settings |= {"save_strategy": "steps", "save_steps": 2}
    with tempfile.TemporaryDirectory() as own:
        folder = Path(common, f"{engine}-{name}") if resumes else Path(own)
        trainer = build("at hand", folder, lora, **rows, **settings)
        trainer.train()
        if not engine.startswith("zero"):
            trainer.evaluate()
        found = results(trainer)
        if resumes:
            found["resumed"] = resumed(folder, found["weights"], engine, lora, {**rows, **settings})
    assert trainer.args.world_size == world
    assert trainer.is_fsdp_enabled == engine.startswith("fsdp2")
    return found


def resumed(folder: Path, ended: dict[str, torch.Tensor], engine: str, lora: bool, settings: dict[str, Any]) -> float:
    """How far the weights of a run that goes on from step 2 are from those of the run that was not stopped."""
    if engine.startswith("zero"):
        begin_whole()
    trainer = build("at hand", folder, lora, **settings)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    again = results(trainer)["weights"]
    return max(float((again[key] - weight).abs().max()) for key, weight in ended.items())


def results(trainer: Any) -> dict[str, Any]:
    """What came of a trainer."""
    numbers = {key: history(trainer, key) for key in LOGGED}
    found = {key: values for key, values in numbers.items() if values}
    return gist(dict(trainer.model.named_parameters()), found, plan_of(trainer.model).packed)


def gist(weights: dict[str, Any], numbers: dict[str, list[float]], packed: bool) -> dict[str, Any]:
    """What two runs are compared by."""
    return {
        "numbers": numbers,
        "packed": packed,
        "sharded": any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in weights.values()),
        "weights": {key: _whole(weight).detach().clone() for key, weight in weights.items() if weight.requires_grad},
    }


def helpers(rank: int, world: int, path: str) -> None:
    """What callbacks and helpers give on whole and on sharded weights; each rank generates as long as it likes."""
    from safetensors.torch import load_file

    from trl import BEMACallback, LogCompletionsCallback
    from trl.models.chat_setup import unwrap_model_for_generation

    torch.set_num_threads(1)
    engine = "fsdp2" if world > 1 else "one"
    if world > 1:
        shard_on_the_cpu()
    CASES["at hand"] = replace(CASES["dpo-sigmoid"], model=lambda: seeded("plain"))
    settings = {"max_steps": 3, "use_cpu": True, "optim": "sgd", "learning_rate": 0.1, **engine_settings(engine)}
    averages = BEMACallback(update_freq=1, update_after=1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build("at hand", Path(folder), per_device_train_batch_size=4 // world, **settings)
        trainer.add_callback(averages)
        trainer.train()
        saved = load_file(f"{folder}/bema/model.safetensors") if rank == 0 else {}
        again = AutoModelForCausalLM.from_pretrained(f"{folder}/bema") if rank == 0 else None
    with torch.no_grad(), unwrap_model_for_generation(trainer.model, trainer.accelerator) as model:
        ids = [
            model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=n, min_new_tokens=n, do_sample=False)
            for n in range(2, 4 + rank)
        ]
    shown = LogCompletionsCallback(trainer, num_prompts=2)._completed(3)
    torch.save({"bema": saved, "loads": again is not None, "ids": ids[1], "shown": len(shown)}, f"{path}-{rank}")


ASKED = {"loss": "loss", "gradient norm": "grad_norm"}
"""columns of the table -> what is logged; all other numbers are in one column"""


COLUMNS = (*ASKED, "other metrics", "weights", "resumed run")


def differences(one: dict[str, Any], two: dict[str, Any]) -> dict[str, float]:
    """How far two runs are apart, by column: numbers by their size, or by 0.25 if they are smaller; weights as such."""
    found = {**dict.fromkeys(COLUMNS, 0.0), "resumed run": two.get("resumed", float("nan"))}
    names = {logged: column for column, logged in ASKED.items()}
    for name in {**one["numbers"], **two["numbers"]}:
        ours, theirs = one["numbers"].get(name, []), two["numbers"].get(name, [])
        if name.startswith("eval_") and not theirs:
            continue  # not every engine evaluates here
        apart = [abs(a - b) / max(abs(a), 0.25) for a, b in zip(ours, theirs, strict=False)]
        column = names.get(name, "other metrics")
        found[column] = max([found[column], *apart, float("inf") if len(ours) != len(theirs) else 0.0])
    if one["weights"].keys() != two["weights"].keys():
        found["weights"] = float("inf")
        return found
    found["weights"] = max(float((two["weights"][key] - value).abs().max()) for key, value in one["weights"].items())
    return found


def _whole(weight: Any) -> torch.Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else whole(weight)
