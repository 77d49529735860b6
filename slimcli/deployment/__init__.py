"""Out of slim: models exported for a runtime, and predictions for images."""
