"""The dllm-rl command."""
