"""The protocol between workers and routers (docs/protocol.md): its messages, and NATS, which carries them."""
