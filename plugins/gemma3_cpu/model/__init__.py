"""The model: configuration, layers, attention, sampling."""
