"""``vswa demo``: the whole system once, with what each request reused."""
