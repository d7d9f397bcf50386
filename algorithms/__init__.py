"""Training methods, one file each."""

OWNER = "dllm-rl"
