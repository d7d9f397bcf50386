"""Optimisation, micro-batches, checkpoints."""
