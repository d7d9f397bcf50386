"""Weights on their way from learners to engines: both ends, and the transports between them."""
