"""What both sides of every benchmark load: the same weights and the same rows, written once to a folder."""

import bz2
import csv
import json
import random
import shutil
import sys
from collections import defaultdict
from math import log
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from benchmarks.flops import HEADS, INNER, LAYERS, VOCABULARY, WIDTH
from trl.quickstart.assets import QUOTES, SMOLLM2, fetch
from trl.quickstart.reviews import clean

EOS, FIRST_WORD = 2, 3  # 0 pads, 1 is unknown
VERSION = 5  # raise it whenever anything below changes


def config(vocabulary: int, **changes: Any) -> LlamaConfig:
    """The 22 M Llama at a vocabulary of 32,000: width 384, 6 layers, tied."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
        **changes,
    )


def _policy(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(config(vocabulary))


@torch.no_grad()
def _that_stops(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model, but about one token in thirty is the end token; lengths of completions are then geometric.

    All embeddings get one common component, which shifts all logits alike; that of the end token gets more of it.
    """
    weight_VD = model.get_input_embeddings().weight
    weight_VD[:, 0] = 1.0  # large beside the others, so that every hidden state keeps it
    ids = torch.randint(FIRST_WORD, len(weight_VD), (8, 250), generator=torch.Generator().manual_seed(0))
    component = float(model.model(ids).last_hidden_state[..., 0].mean())
    weight_VD[EOS, 0] += log(len(weight_VD) / 30) / component
    ends_B = model(ids).logits.softmax(-1)[..., EOS].mean(-1)
    if not 1 / 60 < ends_B.min() < ends_B.max() < 1 / 15:
        raise RuntimeError(
            f"the end token has probability {ends_B.tolist()}, not about 1/30: completions would not vary"
        )
    return model


def lengths(rng: random.Random, mean: int) -> int:
    """Log-normal around the mean, at least 4 and at most three times it."""
    return max(4, min(3 * mean, round(rng.lognormvariate(0, 0.4) * mean / 1.08)))


def words(rng: random.Random, mean: int, vocabulary: int = VOCABULARY) -> list[int]:
    return [rng.randrange(FIRST_WORD, vocabulary) for _ in range(lengths(rng, mean))]


def rows(seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Token ids of every data set."""
    rng = random.Random(seed)
    pairs = [{"prompt": words(rng, 200), "chosen": words(rng, 60), "rejected": words(rng, 60)} for _ in range(8)]
    both = [(row["prompt"], row[side], side == "chosen") for side in ("chosen", "rejected") for row in pairs]
    return {
        "pairs": pairs,
        "unpaired": [dict(zip(("prompt", "completion", "label"), row, strict=True)) for row in both],
        "supervised": [{"prompt": words(rng, 150), "completion": words(rng, 100)} for _ in range(16)],
        "prompts": [{"prompt": words(rng, 200)} for _ in range(8)],
        "episodes": [{"query": words(rng, 100), "response": words(rng, 40)} for _ in range(32)],
    }


def prepare(folder: Path) -> Path:
    """Write the folder once: `policy`, `policy-150k`, `stopping`, `reward`, `value_head.pt`, `rows.json`."""
    marker = folder / "VERSION"
    if marker.exists() and marker.read_text() == str(VERSION):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _policy(VOCABULARY).save_pretrained(folder / "policy")
    _policy(150_000).save_pretrained(folder / "policy-150k")
    _that_stops(_policy(VOCABULARY)).save_pretrained(folder / "stopping")
    torch.manual_seed(1)
    LlamaForSequenceClassification(config(VOCABULARY, num_labels=1)).save_pretrained(folder / "reward")
    torch.save({"weight": torch.randn(1, WIDTH) * 0.2, "bias": torch.zeros(1)}, folder / "value_head.pt")
    (folder / "rows.json").write_text(json.dumps(rows()))
    marker.write_text(str(VERSION))
    return folder


def real_rows(quotes: Path, seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """Rows of real text: what critics say of a film, and more of it; liked over disliked for the same film."""
    films: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    with bz2.open(quotes, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            films[row["movie_name"]][row["category"]].append(clean(row["text"]))
    rng, rows = random.Random(seed), []
    for film in sorted(name for name, lines in films.items() if min(len(lines[k]) for k in ("fresh", "rotten")) >= 8):
        fresh, rotten = (sorted(films[film][kind]) for kind in ("fresh", "rotten"))
        rng.shuffle(fresh)
        rng.shuffle(rotten)
        told = "\n".join(fresh[:4] + rotten[:3])
        prompt = f"Critics on the film {film}:\n{told}\nWhat else do they say?\n"
        rows.append((prompt, "\n".join(fresh[4:6]), "\n".join(rotten[4:6]), "\n".join(fresh[4:8])))
    chosen = rng.sample(rows, 12)
    return {
        "pairs": [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad, _ in chosen[:4]],
        "supervised": [{"prompt": prompt, "completion": more} for prompt, _, _, more in chosen[4:]],
    }


def prepare_real(folder: Path) -> None:
    """Write `real` (a link to SmolLM2-135M-Instruct) and `real.json`, from assets of `trl quickstart`."""
    model, quotes = fetch(SMOLLM2, print), fetch(QUOTES, print)
    (folder / "real").unlink(missing_ok=True)
    (folder / "real").symlink_to(model)
    found = real_rows(quotes / "rotten_tomatoes_corpus_full.csv.bz2")
    (folder / "real.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
    if "--real" in sys.argv[2:]:
        prepare_real(Path(sys.argv[1]))
