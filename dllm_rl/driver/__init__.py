"""What runs in the driver: building a run, collecting batches, pushing weights, recovery."""
