"""Benchmarks with confidence intervals."""
