"""What is measured (`evaluate`, `profile`), how (`clock`, `timing`, `scores`) and what comes of it (`rows`)."""
