"""What the commands do, as functions: they take a model or a recipe, tell their progress, and return results.

They are exported by `slimcli` itself, each called verb_object, so that no name is that of a module.
"""
