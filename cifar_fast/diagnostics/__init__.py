"""Check a machine and its kernels, compare two backends, profile a step, and bound its time."""
