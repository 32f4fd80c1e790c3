"""`trl quickstart`: fine-tune, reward and reinforce a real model, then report whether it got better."""
