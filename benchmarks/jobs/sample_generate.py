"""8 completions of each of 8 prompts with transformers: prompts padded on the left, prefilled once each row."""

import torch
from common import SETTINGS, Clock, ids, model, report

drawn = SETTINGS.get("drawn", False)
policy = model("stopping" if drawn else "policy").eval()
prompts = [row["prompt"] for row in ids("prompts")]
width = max(map(len, prompts))
padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
how = {"max_new_tokens": SETTINGS["tokens"], "pad_token_id": 0}
if drawn:
    how.update(do_sample=True, top_k=0, num_return_sequences=8)
else:  # greedy search returns one sequence a row
    how.update(do_sample=False, eos_token_id=None)
    padded, mask = padded.repeat_interleave(8, 0), mask.repeat_interleave(8, 0)
torch.manual_seed(SETTINGS.get("seed", 0))
clock = Clock()
clock.start()
with torch.inference_mode():
    rows = policy.generate(input_ids=padded, attention_mask=mask, **how)[:, width:].tolist()
measured = clock.stop(1)
lengths = [row.index(2) + 1 if drawn and 2 in row else len(row) for row in rows]
gate = {"tokens": [sum(lengths)]}
if not drawn:
    gate["sum of token ids"] = [sum(row) for row in rows]
report(gate, {**measured, "units": sum(lengths)})
