"""What every process of ours shares: arguments, exit codes, lifetime, and the HTTP surface of its state."""
