"""What exists for speed only; without it the results are the same.

A pass is made fast by `layers.fast`, the head by `head_tiles.LinearLogprobs`, a training loop by the two contexts of
`step_memory`, sampling by `onednn`.
"""
