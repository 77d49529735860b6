"""What is measured (`evaluation`, `profiling`, `per_layer`, `operators`), how (`clock`, `timing`), and its `rows`."""
