"""Rollouts: prompts are sampled, rewarded, measured and handed out as training data, for every on-policy trainer."""
