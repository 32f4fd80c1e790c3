"""Objectives as pure functions: they take tensors and return a `LossSum`."""
