"""Training recipes for the checkpoints that ship with the project. Needs the `train` extra."""
