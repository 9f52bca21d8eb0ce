"""Where the batches come from: one task a file, real data or synthetic tensors of cited sizes."""
