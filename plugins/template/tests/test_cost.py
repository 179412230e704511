from __future__ import annotations

import pytest
import vswa_example_cost as plugin

from vswa_plugin.errors import ConfigError
from vswa_plugin.selection import Candidate, Load, RoutedRequest, Scored
from vswa_plugin.testing.host import plugin_host
from vswa_plugin.wire import Rank

REQUEST = RoutedRequest("r", "m", prompt_tokens=64, block_size=16, sequence_hashes=[1, 2, 3, 4])
IDLE, BUSY = (Scored(Candidate(Rank(n), load=Load(requests=3 * n)), cost=4.0) for n in (0, 1))


@pytest.mark.parametrize(("options", "extra"), [({}, 24), ({"blocks": 2}, 6)])
def test_a_busy_rank_costs_more(options: dict[str, int], extra: float) -> None:
    with plugin_host(plugin.ExampleCost(), options={"plugin1": options}) as host:
        hooks = host.selection_hooks()
        assert hooks is not None, "the plugin takes part in choices"
        added = hooks.score(REQUEST, [IDLE, BUSY])

    assert (0, extra) == (added.get(Rank(0), 0), added[Rank(1)])


def test_a_misspelt_option_is_refused() -> None:
    host = plugin_host(plugin.ExampleCost(), options={"plugin1": {"block": 2}})
    with pytest.raises(ConfigError, match="blocks"), host:
        pass
