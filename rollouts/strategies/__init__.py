"""Unmasking strategies, one file each."""
