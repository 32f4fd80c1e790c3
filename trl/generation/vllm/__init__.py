"""Completions by vLLM: a server or its offline engine, whose weights follow the policy's."""

from trl.import_utils import lazy_names

_names = {
    "trl.generation.vllm.client": ["ServerEngine"],
    "trl.generation.vllm.colocate": ["ColocatedEngine"],
    "trl.generation.vllm.engine": ["Engine", "EngineError"],
    "trl.generation.vllm.sampler": ["VLLMSampler"],
    "trl.generation.vllm.sync": ["make_sync"],
}

__getattr__, __dir__, __all__ = lazy_names(__name__, _names)
