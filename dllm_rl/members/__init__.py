"""The engines and learners of a run, and the driver's view of them."""
