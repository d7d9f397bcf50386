"""python -m dllm_rl: the dllm-rl command where it is not on the path, as in a Ray job."""

from dllm_rl.cli.main import entry

entry()
