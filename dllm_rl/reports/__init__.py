"""Metrics, writers, plots."""
