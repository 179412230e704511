"""A whole deployment on this machine: brokers, frontend, routers and workers as child processes."""
