"""What holds on GPUs and is seen on a CPU: default precision, a kernel for Adam, the scaler of fp16, 4-bit bases."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from tiny_models import tiny_model
from tokenizers_for_tests import word_tokenizer

import trl
from trl.generation import LocalSampler
from trl.losses.loss_sum import LossSum
from trl.trainer import ppo_trainer
from trl.trainer.update import optimizer_step


@pytest.fixture(autouse=True)
def _fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("given", "variable", "expected"),
    [
        ({}, None, "bf16"),
        ({"mixed_precision": "no"}, None, "no"),
        ({"cpu": True}, None, None),
        ({}, ("ACCELERATE_MIXED_PRECISION", "fp16"), None),
        ({}, ("ACCELERATE_USE_CPU", "true"), None),
    ],
)
def test_ppo_computes_in_bfloat16_where_the_gpu_does_so(given, variable, expected, monkeypatch):
    monkeypatch.setattr(ppo_trainer, "bfloat16_by_default", lambda: True)
    monkeypatch.setattr(ppo_trainer, "Accelerator", lambda **keywords: keywords)
    if variable:
        monkeypatch.setenv(*variable)
    made = ppo_trainer.make_accelerator(trl.PPOConfig(accelerator_kwargs=given))
    assert made.get("mixed_precision") == expected


def test_adam_is_one_kernel_on_a_gpu(monkeypatch):
    monkeypatch.setattr(ppo_trainer, "Adam", lambda parameters, **keywords: keywords)
    on_gpu = SimpleNamespace(device=torch.device("cuda"), is_floating_point=lambda: True)
    elsewhere = SimpleNamespace(device=torch.device("xla"), is_floating_point=lambda: True)
    assert ppo_trainer.make_optimizer(trl.PPOConfig(), [on_gpu])["fused"] is True
    assert ppo_trainer.make_optimizer(trl.PPOConfig(), [on_gpu, elsewhere])["fused"] is None


def with_scaler():
    """An accelerator for fp16 on the CPU, which accelerate itself refuses, and a weight that it trains."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=8.0), True
    accelerator.state._mixed_precision = "fp16"
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    return accelerator, model, optimizer


@pytest.mark.parametrize("left_out", ["nan", "refused"])
def test_a_scaler_goes_on_behind_a_step_that_is_left_out(left_out):
    accelerator, model, optimizer = with_scaler()

    def step(value, accept=None):
        def objective(piece):
            return LossSum(model(torch.full((1, 1), piece)).sum(), torch.tensor(1.0), {})

        optimizer_step(
            accelerator, [model], optimizer, [value], objective, lambda piece: 1.0,
            parameters=list(model.parameters()), max_grad_norm=10.0, accept=accept,
        )  # fmt: skip
        return model.weight.item()

    before = model.weight.item()
    first = step(1.0)
    assert first == pytest.approx(before - 0.1)
    kept = step(float("nan")) if left_out == "nan" else step(1.0, lambda means: False)
    assert kept == first
    assert step(2.0) == pytest.approx(first - 0.2)
    assert accelerator.scaler.get_scale() == 8.0


@pytest.mark.filterwarnings("ignore:No dataset is provided", "ignore:No data collator is provided")
def test_each_ppo_step_in_bfloat16_sees_the_weights_that_the_last_one_moved():
    """Autocast keeps its copies of weights as long as its context lasts, which spans the steps of a batch."""
    moves = []
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        policy = trl.AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama", vocab_size=100))
        torch.manual_seed(0)
        torch.nn.init.normal_(policy.v_head.summary.weight, std=0.1)
        before = torch.cat([weight.detach().flatten() for weight in policy.parameters()])
        trainer = trl.PPOTrainer(
            trl.PPOConfig(
                batch_size=4, mini_batch_size=1, ppo_epochs=2, seed=0,
                accelerator_kwargs={"mixed_precision": precision, "cpu": True},
            ),
            policy, None, word_tokenizer(), optimizer=torch.optim.SGD(policy.parameters(), lr=0.1),
        )  # fmt: skip
        queries, responses = ([torch.arange(3, 9) + start + n for n in range(4)] for start in (0, 20))
        trainer.step(queries, responses, [torch.tensor(float(n)) for n in range(4)])
        moves.append(torch.cat([weight.detach().flatten() for weight in policy.parameters()]) - before)
    exact, found = moves
    off = float((found - exact).norm() / exact.norm())
    assert off < 0.2, off


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
def test_an_adapter_on_a_4_bit_base_in_bfloat16(kind, tmp_path):
    """The head is in bfloat16, and what the adapter's layers give it in float32."""
    t, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    tokenizer = word_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    t.LlamaForCausalLM(t.LlamaConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=0)).save_pretrained(tmp_path)
    four = t.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    pair = {"prompt": "a b", "chosen": " c d", "rejected": " e"}
    row = {"SFT": {"text": "a b c d"}, "DPO": pair, "GRPO": {"prompt": "a b"}}[kind]
    rewards = {"reward_funcs": lambda completions, **columns: [float(n % 4) for n in range(len(completions))]}
    more = {"num_generations": 4, "max_completion_length": 4, "save_rollouts": False} if kind == "GRPO" else {}
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path / "run"), use_cpu=True, bf16=True, max_steps=2, per_device_train_batch_size=4,
        logging_steps=1, report_to="none", disable_tqdm=True, save_strategy="no", learning_rate=1e-2, **more,
    )  # fmt: skip
    trainer = getattr(trl, f"{kind}Trainer")(
        t.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=four, dtype=torch.bfloat16),
        args=config, train_dataset=Dataset.from_list([row] * 8), processing_class=tokenizer,
        peft_config=peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
        **(rewards if more else {}),
    )  # fmt: skip
    assert not more or isinstance(trainer.sampler, LocalSampler)
    before = [weight.detach().clone() for weight in trainer.model.parameters() if weight.requires_grad]
    trainer.train()
    after = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(weight.isfinite().all() for weight in after)
