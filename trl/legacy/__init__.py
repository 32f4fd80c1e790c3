"""Code that only scripts for older releases call: padded batches, collators, old import paths."""
