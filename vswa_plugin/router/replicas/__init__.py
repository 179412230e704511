"""Several routers of one model: each tells the others what it has sent where."""
