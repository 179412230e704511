"""Whose requests are read here: the preprocessor's models, kept as the registry has them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

from vswa_plugin.dynamo.client import ModelCard
from vswa_plugin.router.faults import Faults
from vswa_plugin.router.models import RETRY_S, TICK_S, card_here, card_of, same_for_clients
from vswa_plugin.router.pools import Group


class Shows(Protocol):
    """What reads requests of models; see ``vswa_plugin.dynamo.preprocess``."""

    async def show(self, card: ModelCard) -> None: ...
    async def hide(self, name: str) -> None: ...


class ShownModels:
    """Shows the models of all workers, each with the card that the frontend has of it.

    :param groups: the workers by model, as they are now.
    """

    def __init__(self, preprocessor: Shows, groups: Callable[[], Mapping[str, Group]]) -> None:
        self._preprocessor = preprocessor
        self._groups = groups
        self._shown: dict[str, ModelCard] = {}
        self._retry_at: dict[str, float] = {}
        self._faults = Faults()

    async def follow(self) -> None:
        """Keep up with the workers until cancelled."""
        while True:
            await self.update()
            await asyncio.sleep(TICK_S)

    async def update(self) -> None:
        """Show what has come, and hide what has gone; what fails is tried again after a while."""
        groups = self._groups()
        now = asyncio.get_running_loop().time()
        for name, group in groups.items():
            if now < self._retry_at.get(name, 0.0):
                continue
            what = f"requests of model {name!r} cannot be read, and go on without a choice"
            try:
                card, _ = card_here(card_of(name, group.used))
                shown = self._shown.get(name)
                if shown is None or not same_for_clients(shown, card):
                    await self._preprocessor.show(card)
                    self._shown[name] = card
                self._faults.over(what)
            except Exception as error:  # Dynamo raises plain Exception
                self._retry_at[name] = now + RETRY_S
                self._faults.report(what, f"{error or type(error).__name__}; tried again every {RETRY_S:g} s")
        for name in self._shown.keys() - groups.keys():
            del self._shown[name]
            await self._preprocessor.hide(name)
