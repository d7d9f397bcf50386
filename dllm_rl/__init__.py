"""dllm-rl: reinforcement learning and post-training for diffusion language models."""

import logging

__version__ = "0.1.0"

# peft imports it wherever it is installed, and on a CPU it warns of a kernel that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
