"""What a run writes: whole files, checkpoints, and the lock of a run folder."""
