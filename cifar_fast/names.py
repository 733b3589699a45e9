"""The names of backends, dtypes, memory formats and activations; without torch, which takes seconds to import."""

BACKENDS = ("eager", "compiled", "fused")
DTYPES = ("float16", "bfloat16", "float32")
MEMORY_FORMATS = ("contiguous_format", "channels_last")
ACTIVATIONS = ("celu", "relu", "gelu", "silu")
