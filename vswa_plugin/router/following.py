"""What a router and a selector have in common: they follow a fleet as their arguments say."""

from __future__ import annotations

from vswa_plugin.following.fleet import Fleet
from vswa_plugin.following.subscriber import SubscriberOptions
from vswa_plugin.following.view import ViewOptions
from vswa_plugin.host.host import PluginHost
from vswa_plugin.index import WindowIndex
from vswa_plugin.registry import Registry
from vswa_plugin.router.args import RouterArgs
from vswa_plugin.wire.transport import Transport


def fleet_of(args: RouterArgs, host: PluginHost, registry: Registry, transport: Transport) -> Fleet:
    """The ranks of ``args.namespace`` with an index that knows the plugins' reuse rules; not started."""
    view = ViewOptions(heartbeat_s=args.heartbeat_s, stale_grace_s=args.stale_grace_s)
    return Fleet(
        transport,
        registry,
        namespace=args.namespace,
        options=SubscriberOptions(view=view),
        index=WindowIndex(rules=host.reuse_rules()),
    )
