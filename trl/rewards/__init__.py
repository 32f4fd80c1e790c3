"""Reward functions that a user can name."""
