"""Life regression beside other methods: the runs (`compare`), their `stages` and the `table`."""
