"""What runs in an actor (or, locally, in the driver's process): engines and learner ranks."""
