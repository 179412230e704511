"""State machines over several parts at once."""
