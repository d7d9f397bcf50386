"""A package of somebody else's: one file for each row of "Where do I change what" in docs/architecture.md."""
