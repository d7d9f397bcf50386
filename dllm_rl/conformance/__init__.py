"""Checks that hold a plugin to the contracts of dllm_rl.protocols, on small real cases."""
