"""Random walks: imitate 1,000 random walks, then learn the shortest ones from their score. Prints and plots both.

OMP_NUM_THREADS=1 python benchmarks/random_walks.py --out docs/results
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import plots
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel
from walks import Graph, known_graph, make_graph, rewards_for, tokenizer_of

from trl import (
    AutoModelForCausalLMWithValueHead,
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    SFTConfig,
    SFTTrainer,
    set_seed,
)
from trl.generation.local import LocalSampler
from trl.generation.sampler import SamplingParams

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")


def new_model(graph: Graph) -> GPT2LMHeadModel:
    """The published size: 6 layers of width 144."""
    tokens, goal = len(graph.edges) + 1, list(graph.edges).index(graph.goal)
    config = GPT2Config(
        vocab_size=tokens, n_positions=16, n_embd=144, n_layer=6, n_head=12, bos_token_id=None, eos_token_id=goal,
        pad_token_id=tokens - 1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def imitate(graph: Graph, walks: list[str], seed: int) -> GPT2LMHeadModel:
    """A model that walks as the data does."""
    set_seed(seed)
    model, tokenizer = new_model(graph), tokenizer_of(graph)
    rows = Dataset.from_list([{"input_ids": tokenizer(walk)["input_ids"]} for walk in walks])
    with tempfile.TemporaryDirectory() as scratch:
        numbers = SFTConfig(
            output_dir=scratch, per_device_train_batch_size=100, num_train_epochs=25, learning_rate=1e-3, seed=seed,
            lr_scheduler_type="cosine", report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        SFTTrainer(model, numbers, train_dataset=rows, processing_class=tokenizer).train()
    return model


def optimality(model: torch.nn.Module, graph: Graph, seed: int, walks: int = 50) -> float:
    """Mean over the start nodes of `walks` sampled walks each."""
    nodes = list(graph.edges)
    params = SamplingParams(max_new_tokens=graph.max_length - 1, stop_token_ids=(nodes.index(graph.goal),), seed=seed)
    groups = LocalSampler(model).sample([[nodes.index(start)] for start in graph.starts], params, n=walks)
    scores = [
        graph.optimality(start + "".join([*nodes, "?"][i] for i in completion.ids))
        for start, group in zip(graph.starts, groups, strict=True)
        for completion in group
    ]
    return sum(scores) / len(scores)


def reinforce_with_ppo(model: GPT2LMHeadModel, graph: Graph, seed: int, steps: int) -> list[float]:
    """The mean score of each step's rollouts; `model` is trained in place."""
    config = PPOConfig(
        batch_size=128, mini_batch_size=128, steps=128 * steps, learning_rate=3e-4, ppo_epochs=4, vf_coef=1.2,
        init_kl_coef=0.0, adap_kl_ctrl=False, anneal_learning_rate=True, max_new_tokens=graph.max_length - 1, seed=seed,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": start} for start in graph.starts])
    trainer = PPOTrainer(
        config, AutoModelForCausalLMWithValueHead.from_pretrained(model), tokenizer=tokenizer_of(graph), dataset=rows,
        reward_funcs=rewards_for(graph),
    )  # fmt: skip
    curve: list[float] = []
    trainer.train(callback=lambda step, stats, batch: curve.append(float(torch.stack(batch["scores"]).mean())))
    return curve


def reinforce_with_grpo(model: GPT2LMHeadModel, graph: Graph, seed: int, steps: int) -> list[float]:
    """The same without a critic: 16 walks from each of 8 start nodes a step, two updates on each rollout."""
    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch, per_device_train_batch_size=128, num_generations=16, num_iterations=2,
            max_steps=2 * steps, max_completion_length=graph.max_length - 1, learning_rate=3e-4, loss_type="dr_grpo",
            scale_rewards="group", lr_scheduler_type="constant", seed=seed, report_to=[], save_strategy="no",
            save_rollouts=False, logging_steps=2, disable_tqdm=True,
        )  # fmt: skip
        rows = Dataset.from_list([{"prompt": start} for start in graph.starts])
        trainer = GRPOTrainer(model, rewards_for(graph), config, rows, processing_class=tokenizer_of(graph))
        trainer.train()
    return [row["reward"] for row in trainer.state.log_history if "reward" in row]


METHODS = {"grpo": reinforce_with_grpo, "ppo": reinforce_with_ppo}


def one_run(method: str, name: str, graph: Graph, walks: list[str], seed: int, steps: int) -> dict[str, object]:
    started = time.process_time()
    model = imitate(graph, walks, seed)
    imitated, at = optimality(model, graph, seed), time.process_time()
    curve = METHODS[method](model, graph, seed, steps)
    done = time.process_time()
    first = next((step for step, score in enumerate(curve, 1) if score > 0.95), None)
    result = {
        "method": method, "graph": name, "seed": seed, "uniform": graph.uniform_policy()[0], "imitated": imitated,
        "final": optimality(model, graph, seed + 1), "steps_to_0.95": first, "curve": curve,
        "cpu_seconds": {"imitation": at - started, method: done - at},
    }  # fmt: skip
    print({key: value for key, value in result.items() if key != "curve"}, flush=True)
    return result


def plot(results: list[dict], path: Path) -> None:
    colours = plots.by_seed([f"seed {result['seed']}" for result in results if result["graph"] == results[0]["graph"]])
    panels = []
    for name in dict.fromkeys(result["graph"] for result in results):
        here = [result for result in results if result["graph"] == name]
        marks = [plots.Mark(0.95, "0.95", below=True), plots.Mark(here[0]["uniform"], "uniform walk", below=True)]
        curves = {f"seed {result['seed']}": result["curve"] for result in here}
        panels.append(
            plots.lines(f"{here[0]['method'].upper()}, graph {name}", curves, colours, (0.15, 1.02), marks, 5)
        )
    plots.write(path, panels, 3, colours, f"optimality of a step's 128 walks; {plots.RAW.format(5)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results"), help="runs found in its JSON are not repeated"
    )
    parser.add_argument("--method", choices=METHODS, default="ppo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--graphs", nargs="+", default=["1002", "1052", "1130", "1075", "1008"], help="1002 or seeds of graphs to make"
    )
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"random_walks_{arguments.method}.json"
    results = json.loads(file.read_text()) if file.exists() else []
    for name in arguments.graphs:
        graph, walks = known_graph() if name == "1002" else make_graph(int(name))
        for seed in arguments.seeds if name == "1002" else arguments.seeds[:1]:
            if not any((result["graph"], result["seed"]) == (name, seed) for result in results):
                results.append(one_run(arguments.method, name, graph, walks, seed, arguments.steps))
                file.write_text(json.dumps(results))
    plot(results, file.with_suffix(".svg"))


if __name__ == "__main__":
    main()
