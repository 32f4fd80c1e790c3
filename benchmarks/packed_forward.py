"""A DPO-shaped forward and backward, packed or padded: 8 pairs, prompt ~200, completion ~60, a 22 M Llama.

/usr/bin/time -v python -m benchmarks.packed_forward packed
/usr/bin/time -v python -m benchmarks.packed_forward padded
"""

import random
import sys
import time

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from trl.data.packing import pack
from trl.data.records import Branch, PackedBatch, TokenTree
from trl.models.forward import padded_inputs
from trl.models.scoring import score

VOCABULARY = 32_000


def llama_22m() -> LlamaForCausalLM:
    """Width 384, 6 layers, vocabulary 32,000, tied."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def pairs(count: int = 8, prompt: int = 200, completion: int = 60, seed: int = 0) -> PackedBatch:
    """Preference pairs with log-normal lengths around the means."""
    rng = random.Random(seed)

    def ids(mean: int) -> list[int]:
        length = max(4, min(3 * mean, round(rng.lognormvariate(0, 0.4) * mean / 1.08)))
        return [rng.randrange(3, VOCABULARY) for _ in range(length)]

    return pack([TokenTree(ids(prompt), [Branch(ids(completion)), Branch(ids(completion))]) for _ in range(count)])


def padded_logprobs(model: torch.nn.Module, packed: PackedBatch) -> torch.Tensor:
    """As trainers usually do it: padded rows, logits of every position."""
    inputs = padded_inputs(packed)
    logprobs = model(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    of_next = logprobs.gather(2, inputs["input_ids"][:, 1:, None]).squeeze(2)
    return packed.spread(of_next[packed.row_S, packed.position_N[packed.scored_S]])


def main(kind: str, steps: int = 2) -> None:
    torch.set_num_threads(1)
    model, packed = llama_22m(), pairs()
    reference = llama_22m().requires_grad_(False)
    forward = {"packed": lambda m, p: score(m, p).logprobs_BT, "padded": padded_logprobs}[kind]
    print(f"{packed.rows} rows, {len(packed.ids_N)} packed tokens, {len(packed.row_S)} scored")
    for _ in range(steps):
        start = time.process_time()
        with torch.no_grad():
            reference_BT = forward(reference, packed)
        after_reference = time.process_time()
        ratio_B = (forward(model, packed) - reference_BT).sum(-1)
        loss = -F.logsigmoid(0.1 * (ratio_B[0::2] - ratio_B[1::2])).mean()
        after_forward = time.process_time()
        loss.backward()
        end = time.process_time()
        print(
            f"{kind}: loss {loss.item():.6f}, CPU seconds: reference {after_reference - start:.2f}, "
            f"forward {after_forward - after_reference:.2f}, backward {end - after_forward:.2f}"
        )


if __name__ == "__main__":
    main(sys.argv[1])
