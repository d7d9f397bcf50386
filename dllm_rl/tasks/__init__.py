"""Tasks: examples with a verifier, one file each."""
