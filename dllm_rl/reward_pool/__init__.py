"""Reward functions in killable processes."""
