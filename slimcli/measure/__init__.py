"""What is measured (`evaluate`, `profile`, `per_layer`), how (`clock`, `timing`, `scores`), and the `rows` of it."""
