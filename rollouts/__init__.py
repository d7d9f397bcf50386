"""Rollout engines and unmasking strategies."""

OWNER = "dllm-rl"
