"""Limits and counters of a subscriber."""

from __future__ import annotations

import msgspec

from vswa_plugin.following.reader import ReaderOptions
from vswa_plugin.following.view import ViewOptions
from vswa_plugin.wire.numbering import MAX_EPOCH_AHEAD_S


class SubscriberOptions(msgspec.Struct, frozen=True):
    """Limits of a subscriber.

    :param request_timeout_s: how long an answer to a replay or snapshot request may take.
    :param requests: how many such requests may be out at a time.
    :param request_patience_s: a request that has waited so long for its answer is not counted among them.
    :param max_epoch_ahead_s: an epoch that lies further ahead of our clock, and of what the registry says, is
        nobody's.
    """

    view: ViewOptions = ViewOptions()
    reader: ReaderOptions = ReaderOptions()
    request_timeout_s: float = 2.0
    requests: int = 16
    request_patience_s: float = 0.1
    max_epoch_ahead_s: float = MAX_EPOCH_AHEAD_S


class SubscriberStats(msgspec.Struct):
    """Counters since start, over all ranks.

    :param foreign_subjects: messages on subjects that are not those of a rank that we follow.
    :param unregistered: messages of ranks that the registry does not list, where only those are followed.
    :param implausible_epochs: messages of epochs that lie too far ahead.
    :param errors: times that a rank was given up until its next epoch because something unforeseen happened.
    """

    messages: int = 0
    malformed: int = 0
    foreign_subjects: int = 0
    unregistered: int = 0
    implausible_epochs: int = 0
    requests: int = 0
    errors: int = 0
