"""A router that chooses and does not forward: ``/select`` for gateways."""
