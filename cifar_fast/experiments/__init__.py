"""Train many variants of the recipe, and report how their results differ."""
