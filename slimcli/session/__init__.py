"""What every command starts with: a target, resolved to one recipe, with its model, its data and its device."""
