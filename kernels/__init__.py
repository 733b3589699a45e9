"""Hand-written Triton kernels for the two operations that the project exists to fuse, one file an operator."""
