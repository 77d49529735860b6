"""Life regression beside other methods: its `cells`, their `stages` and the `table`."""
