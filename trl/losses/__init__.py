"""Objectives: tensors in, a LossSum out."""
