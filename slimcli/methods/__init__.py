"""Other rules by which patches leave, on the same block loop: what life regression is compared with."""
