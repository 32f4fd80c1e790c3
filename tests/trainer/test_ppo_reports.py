"""What PPO refuses, logs, saves and uploads."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as t
from datasets import Dataset
from ppo_cases import COMMON, batch, causal, lora, maker

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.rollout.measure import check_first_ratio

pytestmark = pytest.mark.filterwarnings("ignore:No dataset is provided:UserWarning")


@pytest.fixture
def make(tiny_tokenizer):
    return maker(tiny_tokenizer)


# --- arguments, data, reports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, r, s: (tuple(q), r, s), "queries must be a list of tensors - got"),
        (lambda q, r, s: (q, [row.tolist() for row in r], s), "Elements in responses must be tensors - got"),
        (lambda q, r, s: (q, r, s[:3]), r"Batch size \(4\) does not match number of examples - but got 3 for: scores"),
        (lambda q, r, s: (q, r, [x.view(1, 1) for x in s]), "Scores must be 1-dimensional - got 2"),
        (lambda q, r, s: (q, r, [torch.tensor([1.0, 2.0])] * 4), r"scores\[0\] holds 2 numbers"),
        (lambda q, r, s: (q, r, [*s[:3], torch.tensor(float("nan"))]), r"scores\[3\]=nan is not finite"),
        (lambda q, r, s: (q, r, s, [torch.ones(1)] * 4), r"masks\[0\] has shape"),
    ],
)
def test_what_is_no_batch_is_refused(make, change, message):
    with pytest.raises(ValueError, match=message):
        make().step(*change(*batch()))


def test_safety_checker_squeezes_scores(make):
    queries, responses, scores = batch()
    *_, checked, masks = make()._step_safety_checker(4, queries, responses, [score[None] for score in scores])
    assert [score.shape for score in checked] == [torch.Size([])] * 4
    assert masks is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("config", object(), "config must be a PPOConfig, got"),
        ("tokenizer", "gpt2", "tokenizer must be a PreTrainedTokenizerBase like"),
        ("model", torch.nn.Linear(1, 1), "model must be a PreTrainedModelWrapper, got"),
        ("ref_model", torch.nn.Linear(1, 1), "ref_model must be a PreTrainedModelWrapper or `None`"),
        ("dataset", [1], "dataset must be a torch.utils.data.Dataset or datasets.Dataset"),
        ("lr_scheduler", object(), "lr_scheduler must be a torch.optim.lr_scheduler"),
        ("config", PPOConfig(push_to_hub_if_best_kwargs={"private": True}), "You have to specify repo_id"),
    ],
)
def test_arguments_of_the_wrong_kind(tiny_tokenizer, name, value, message):
    given = {"config": PPOConfig(), "model": causal(), "tokenizer": tiny_tokenizer, name: value}
    with pytest.raises(ValueError, match=message):
        PPOTrainer(**given)


def test_both_names_of_the_tokenizer(tiny_tokenizer):
    trainer = PPOTrainer(PPOConfig(), causal(), processing_class=tiny_tokenizer)
    assert trainer.tokenizer is trainer.processing_class is tiny_tokenizer


def test_no_dataset_is_said(tiny_tokenizer):
    with pytest.warns(UserWarning, match="No dataset is provided"):
        assert PPOTrainer(PPOConfig(), causal(), tokenizer=tiny_tokenizer).dataloader is None


def test_runtime_config(make):
    config = make(gradient_accumulation_steps=2).config
    assert (config.is_encoder_decoder, config.is_peft_model, config.world_size) == (False, False, 1)
    assert (config.global_backward_batch_size, config.global_batch_size) == (4, 4)


def test_dataloader_drops_what_nobody_takes(make):
    rows = Dataset.from_list([{"input_ids": [i], "query": str(i), "other": i} for i in range(10)])
    collate = lambda rows: {name: [row[name] for row in rows] for name in rows[0]}  # noqa: E731
    trainer = make(dataset=rows, data_collator=collate)
    batches = list(trainer.dataloader)
    assert len(batches) == 2  # the rest is dropped
    assert set(batches[0]) == {"input_ids", "query"}
    kept = make(dataset=rows, data_collator=collate, remove_unused_columns=False)
    assert set(next(iter(kept.dataloader))) == {"input_ids", "query", "other"}


def test_accumulation_holds_at_the_end_of_the_data(make):
    """The last batch of a prepared loader makes accelerate step at every micro-batch, unless it is told not to."""
    rows = Dataset.from_list([{"input_ids": [i + 4]} for i in range(4)])
    trainer = make(dataset=rows, data_collator=lambda rows: rows, gradient_accumulation_steps=2, ppo_epochs=1)
    steps = []
    step = trainer.optimizer.optimizer.step
    trainer.optimizer.optimizer.step = lambda *a, **k: steps.append(1) or step(*a, **k)
    for _ in trainer.dataloader:
        trainer.step(*batch())
    assert len(steps) == 1


def test_log_stats(make, tmp_path):
    trainer = make(log_with="tensorboard", project_kwargs={"logging_dir": str(tmp_path)})
    queries, responses, scores = batch()
    stats = trainer.step(queries, responses, scores)
    trainer.log_stats(stats, {"query": ["a"] * 4, "response": ["b"] * 4}, scores)
    trainer.accelerator.end_training()
    assert list(tmp_path.rglob("events.out.*"))
    logged = {}
    trainer.accelerator.log = lambda values, step=None: logged.update(values, step=step)
    trainer.log_stats(stats, {"query": ["a"] * 4, "response": ["b"] * 4}, scores)
    assert logged["env/reward_mean"] == pytest.approx(0.25)
    assert logged["env/reward_std"] == pytest.approx(torch.stack(scores).std().item())
    assert logged["env/reward_dist"].shape == (4,)
    assert logged["step"] == 1
    with pytest.warns(UserWarning, match="The game logs will not be logged"):
        trainer.log_stats(stats, {}, scores)
    assert logged["step"] == 2


def test_push_if_best(make):
    pushed = []
    trainer = make(push_to_hub_if_best_kwargs={"repo_id": "me/it"}, compare_steps=2)
    trainer.push_to_hub = lambda **kwargs: pushed.append(kwargs)
    for score in (
        1.0,
        9.0,
        2.0,
        9.0,
        1.5,
    ):  # only every second step is looked at; the first is what the others must beat
        trainer._push_if_best(torch.full((4,), score))
    assert pushed == [{"repo_id": "me/it"}]
    assert trainer.highest_reward == 2.0


def test_push_to_hub_uploads_model_tokenizer_and_card(make, monkeypatch):
    uploaded = {}

    class Hub:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, **_):
            uploaded[repo_id] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.whoami", lambda: {"name": "me"})
    make().push_to_hub("me/it", private=True)
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(uploaded["me/it"])
    assert b"- ppo" in uploaded["me/it"]["README.md"]
    assert json.loads(uploaded["me/it"]["config.json"])["model_type"] == "llama"


def test_wandb_gets_a_table_and_arrays(make, monkeypatch):
    tables, logged = [], {}
    fake = SimpleNamespace(Table=lambda columns, rows: tables.append((columns, rows)))
    trainer = make()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    trainer.config.log_with = "wandb"
    trainer.accelerator.log = logged.update
    queries, responses, scores = batch()
    stats = trainer.step(queries, responses, scores)
    assert isinstance(stats["ppo/loss/total"], np.ndarray)
    texts = {"query": list("abcd"), "response": list("efgh"), "ref_response": list("ijkl")}
    trainer.log_stats(stats, texts, scores, columns_to_log=["query", "response", "ref_response"])
    ((columns, rows),) = tables
    assert columns == ["query", "response", "ref_response", "reward"]
    assert rows[1] == ["b", "f", "j", 0.5]
    assert "game_log" in logged
    with pytest.raises(ValueError, match="are not present in the batch"):
        trainer.log_stats(stats, {"query": list("abcd")}, scores)


def test_save_pretrained(make, tmp_path, monkeypatch):
    trainer = make()
    with pytest.warns(UserWarning, match="Cannot retrieve user information"):
        trainer.create_model_card(str(tmp_path / "offline"))
    assert not (tmp_path / "offline").exists()
    monkeypatch.setattr("huggingface_hub.whoami", lambda: {"name": "someone"})
    trainer.save_pretrained(tmp_path / "online")
    assert "someone/online" in (tmp_path / "online" / "README.md").read_text()
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "online"))
    ours, theirs = trainer.model.state_dict(), loaded.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert t.AutoTokenizer.from_pretrained(tmp_path / "online").eos_token == "<eos>"


def test_show_tokens(make, capsys):
    make()._show_tokens(torch.tensor([4, 5]), torch.tensor([0, 1]))
    assert capsys.readouterr().out.split() == ["a", "b"]


def test_half_precision_has_coarser_bounds():
    off = {"ratio": torch.tensor(1.001), "policy_kl": torch.tensor(-1e-3), "approx_kl": torch.tensor(1e-4)}
    for precision in ("float32", "float64"):
        with pytest.raises(RuntimeError, match=r"the ratio is 1\.0010000 and approx_kl 1\.0e-04"):
            check_first_ratio(off, lambda: precision)  # noqa: B023
    for precision in ("tf32", "float16", "bfloat16"):
        check_first_ratio(off, lambda: precision)  # noqa: B023
        with pytest.raises(RuntimeError, match=r"the ratio is 1\.0010000 and approx_kl 2\.0e-02"):
            check_first_ratio(off | {"approx_kl": 0.02}, lambda: precision)  # noqa: B023


def test_nothing_is_checked_without_tokens_or_without_a_ratio():
    zero = torch.tensor(0.0)
    check_first_ratio({"ratio": zero, "policy_kl": zero, "approx_kl": zero}, lambda: "float32")
    check_first_ratio({"loss": torch.tensor(5.0)}, lambda: "float32")


def test_generic_logging_does_not_warn(make, caplog):
    with caplog.at_level(logging.WARNING):
        make().step(*batch())
    assert [message.split(":")[0] for message in caplog.messages] == ["memory"]


def test_reward_adapter_scores_and_rests(make, tmp_path):
    """One base model, two adapters: the policy's and the reward model's."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    judge = peft.get_peft_model(
        t.LlamaForSequenceClassification(t.LlamaConfig(**COMMON, num_labels=1)),
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", init_lora_weights=False),
    )
    judge.save_pretrained(str(tmp_path))
    torch.manual_seed(0)
    base = t.AutoModelForCausalLM.from_config(t.LlamaConfig(**COMMON))
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=lora(), reward_adapter=str(tmp_path))
    trainer = make(model, learning_rate=1e-2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    queries, responses, _ = batch()
    for _ in range(2):
        inputs = trainer.prepare_model_inputs(queries, responses)
        raw = trainer.accelerator.unwrap_model(trainer.model).compute_reward_score(**inputs)
        assert raw.shape == (*inputs["input_ids"].shape, 1)
        stats = trainer.step(queries, responses, [row[-1, 0] for row in raw])
    assert stats["objective/kl"] != 0  # against the base model: neither adapter
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("default" in name for name in moved)
    assert not any("reward_adapter" in name or name.startswith("score") for name in moved)
