"""dllm-rl: reinforcement learning and post-training for diffusion language models."""

__version__ = "0.1.0"
