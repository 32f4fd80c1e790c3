"""Samplers: prompts in, completions with their log-probabilities out."""

from trl.import_utils import lazy_names

_names = {
    "trl.generation.local": ["LocalSampler", "make_sampler"],
    "trl.generation.sampler": ["Sampler", "SamplingParams"],
    "trl.generation.transformers_sampler": ["TransformersSampler"],
}

__getattr__, __dir__, __all__ = lazy_names(__name__, _names)
