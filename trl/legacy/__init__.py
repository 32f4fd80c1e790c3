"""What only scripts written for older releases call: padded batches, collators, old import paths."""
