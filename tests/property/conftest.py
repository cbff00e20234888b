"""How property tests run: no deadline for one example, because a busy machine says nothing about a law."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("shardkit", deadline=None)
settings.load_profile("shardkit")
