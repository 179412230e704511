"""The cache managers without a model: ``vswa simulate`` and simulated ranks."""
