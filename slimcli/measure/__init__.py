"""Measured: `evaluation`, `profiling`, `per_layer`, `operators`; how: `clock`, `timing`, `scores`; what is found: `rows`."""
