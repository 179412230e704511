"""Where weights come from: safetensors, GGUF, packages with named models."""
