"""Completions by vLLM: a server or its offline engine, whose weights follow the policy's."""
