"""Recovery: the mathematics of robust recovery, as functions on tensors."""
