"""8 completions of each of 8 prompts with the local sampler."""

import torch
from common import SETTINGS, Clock, ids, model, report

from trl.generation.local import LocalSampler
from trl.generation.sampler import SamplingParams

drawn = SETTINGS.get("drawn", False)
policy = model("stopping" if drawn else "policy").eval()
sampler = LocalSampler(policy)
params = SamplingParams(
    max_new_tokens=SETTINGS["tokens"],
    temperature=1.0 if drawn else 0.0,
    stop_token_ids=None if drawn else (),
    seed=SETTINGS.get("seed", 0),
)
prompts = [row["prompt"] for row in ids("prompts")]
torch.manual_seed(0)
clock = Clock()
clock.start()
groups = sampler.sample(prompts, params, n=8)
measured = clock.stop(1)
lengths = [len(completion.ids) for group in groups for completion in group]
gate = {"tokens": [sum(lengths)]}
if not drawn:
    gate["sum of token ids"] = [sum(completion.ids) for group in groups for completion in group]
report(gate, {**measured, "units": sum(lengths)})
