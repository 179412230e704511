"""Engine configurations, as package ``vswa_engine_configs``: data for ``--engine-config`` of a worker."""
