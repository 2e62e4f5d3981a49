"""Experiments: one file each, found by `just run`."""
