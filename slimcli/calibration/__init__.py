"""A working slimmed model before any training: observe the dense model, fit the life head, search, judge."""
