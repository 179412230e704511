"""Routing simulated: workloads, ranks without models, policies, costs."""
