"""Train a recipe: options, epochs, runs, checkpoints, results, and their files."""
