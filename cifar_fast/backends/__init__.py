"""Ways to compute one training step and one evaluation: eager, compiled, and fused kernels in a CUDA graph."""
