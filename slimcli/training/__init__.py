"""How a recipe's stages are run: tasks, the loop, checkpoints and the plan. `slimcli.train` is the way in."""
