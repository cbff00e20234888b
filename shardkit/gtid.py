"""Global transaction ids and positions of both server families. Pure values, no I/O.

A MariaDB position is one ``domain-server-sequence`` per replication domain (MariaDB Knowledge Base, "Global
Transaction ID"); a MySQL position is a set of intervals per source, where a source is a UUID with or without a tag
(MySQL Reference Manual, "GTID Format and Storage").
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple, Self
from uuid import UUID


class Flavour(StrEnum):
    """Which family a server belongs to: their logs, their GTIDs and their privileges differ."""

    MARIADB = "mariadb"
    MYSQL = "mysql"

    @classmethod
    def of_version(cls, version: str) -> Flavour:
        """By what a server says of itself in ``VERSION()``."""
        return cls.MARIADB if "mariadb" in version.lower() else cls.MYSQL


class MariaDBGtid(NamedTuple):
    """One transaction's id on MariaDB."""

    domain: int
    server: int
    sequence: int

    def __str__(self) -> str:
        return f"{self.domain}-{self.server}-{self.sequence}"


class MySQLGtid(NamedTuple):
    """One transaction's id on MySQL. ``source`` is the UUID in lower case, with ``:tag`` where there is one."""

    source: str
    number: int

    def __str__(self) -> str:
        return f"{self.source}:{self.number}"


Gtid = MariaDBGtid | MySQLGtid


@dataclass(frozen=True, slots=True)
class MariaDBPosition:
    """The last transaction of each domain: ``0-1-100,7-2-3``. The empty text is the beginning."""

    domains: Mapping[int, MariaDBGtid] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def parse(cls, text: str) -> Self:
        """:raises ValueError: for anything that is not a GTID list."""
        domains: dict[int, MariaDBGtid] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            numbers = part.split("-")
            if len(numbers) != 3 or not all(number.isascii() and number.isdigit() for number in numbers):
                raise ValueError(f"{part!r} is not a MariaDB GTID: expected domain-server-sequence")
            gtid = MariaDBGtid(*map(int, numbers))
            if gtid.domain in domains:
                raise ValueError(f"{text!r} names domain {gtid.domain} twice")
            domains[gtid.domain] = gtid
        return cls(MappingProxyType(domains))

    def advanced(self, gtids: Iterable[Gtid]) -> MariaDBPosition:
        """The position after these transactions too, in the order given."""
        domains = dict(self.domains)
        for gtid in gtids:
            if not isinstance(gtid, MariaDBGtid):
                raise TypeError(f"{gtid} is not a MariaDB GTID")
            domains[gtid.domain] = gtid
        return MariaDBPosition(MappingProxyType(domains))

    def covers(self, other: Position) -> bool:
        """Whether everything up to ``other`` has been applied here."""
        return isinstance(other, MariaDBPosition) and all(
            domain in self.domains and self.domains[domain].sequence >= gtid.sequence
            for domain, gtid in other.domains.items()
        )

    def ahead_of(self, other: Position) -> int:
        """How many transactions this position is ahead of ``other`` (sequence numbers may have holes: at most)."""
        if not isinstance(other, MariaDBPosition):
            raise TypeError("positions of different server families cannot be compared")
        return sum(
            max(0, gtid.sequence - (other.domains[domain].sequence if domain in other.domains else 0))
            for domain, gtid in self.domains.items()
        )

    def __str__(self) -> str:
        return ",".join(str(self.domains[domain]) for domain in sorted(self.domains))


Interval = tuple[int, int]
_TAG = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,31}", re.ASCII)


@dataclass(frozen=True, slots=True)
class MySQLPosition:
    """A GTID set: per source its closed intervals, ascending and apart. The empty text is the beginning."""

    sources: Mapping[str, tuple[Interval, ...]] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``uuid:1-5:7,uuid:tag:1-3``; a tag holds for the intervals after it.

        :raises ValueError: for anything that is not a GTID set.
        """
        found: dict[str, list[Interval]] = {}
        for part in filter(None, ("".join(part.split()) for part in text.split(","))):
            uuid, *pieces = part.split(":")
            try:
                source = base = str(UUID(uuid))
            except ValueError:
                raise ValueError(f"{part!r} is not a MySQL GTID set: it has to begin with a UUID") from None
            if not pieces:
                raise ValueError(f"{part!r} is not a MySQL GTID set: no interval after the UUID")
            for piece in pieces:
                if _TAG.fullmatch(piece):
                    source = f"{base}:{piece.lower()}"
                    continue
                low, _, high = piece.partition("-")
                if not (low.isascii() and low.isdigit() and (not high or (high.isascii() and high.isdigit()))):
                    raise ValueError(f"{piece!r} in {part!r} is not an interval")
                interval = (int(low), int(high or low))
                if not 0 < interval[0] <= interval[1]:
                    raise ValueError(f"{piece!r} in {part!r} is not an interval")
                found.setdefault(source, []).append(interval)
        return cls(MappingProxyType({source: _united(intervals) for source, intervals in found.items()}))

    def advanced(self, gtids: Iterable[Gtid]) -> MySQLPosition:
        """The set with these transactions added."""
        changed: dict[str, list[Interval]] = {}
        for gtid in gtids:
            if not isinstance(gtid, MySQLGtid):
                raise TypeError(f"{gtid} is not a MySQL GTID")
            source, number = gtid
            intervals = changed.get(source)
            if intervals is None:
                intervals = changed[source] = list(self.sources.get(source, ()))
            if intervals and intervals[-1][1] + 1 == number:
                intervals[-1] = (intervals[-1][0], number)
            else:
                intervals.append((number, number))
                changed[source] = list(_united(intervals))
        merged = dict(self.sources)
        merged.update({source: tuple(intervals) for source, intervals in changed.items()})
        return MySQLPosition(MappingProxyType(merged))

    def covers(self, other: Position) -> bool:
        """Whether every transaction of ``other`` is in this set."""
        if not isinstance(other, MySQLPosition):
            return False
        return all(
            self._holds(source, interval) for source, intervals in other.sources.items() for interval in intervals
        )

    def _holds(self, source: str, interval: Interval) -> bool:
        mine = self.sources.get(source, ())
        index = bisect_left(mine, interval[1] + 1, key=lambda each: each[0]) - 1
        return index >= 0 and mine[index][0] <= interval[0] and interval[1] <= mine[index][1]

    def ahead_of(self, other: Position) -> int:
        """How many transactions of this set are not in ``other``."""
        if not isinstance(other, MySQLPosition):
            raise TypeError("positions of different server families cannot be compared")
        missing = 0
        for source, intervals in self.sources.items():
            theirs = other.sources.get(source, ())
            total = sum(high - low + 1 for low, high in intervals)
            common = sum(max(0, min(a[1], b[1]) - max(a[0], b[0]) + 1) for a in intervals for b in theirs)
            missing += total - common
        return missing

    def encoded(self) -> bytes:
        """The set as COM_BINLOG_DUMP_GTID carries it (``Gtid_set::encode`` in sql/rpl_gtid_set.cc).

        Sets with tags, known since MySQL 8.3, use the tagged layout: a format byte at both ends of the count, and
        a tag after each UUID.
        """
        tagged = any(":" in source for source in self.sources)
        count = len(self.sources)
        out = [struct.pack("<Q", (1 << 56) | (count << 8) | 1 if tagged else count)]
        for source in sorted(self.sources):
            uuid, _, tag = source.partition(":")
            out.append(UUID(uuid).bytes)
            if tagged:
                out.append(bytes([len(tag) << 1]) + tag.encode("ascii"))
            intervals = self.sources[source]
            out.append(struct.pack("<Q", len(intervals)))
            out.extend(struct.pack("<QQ", low, high + 1) for low, high in intervals)
        return b"".join(out)

    def __str__(self) -> str:
        return ",".join(
            ":".join([source, *(str(low) if low == high else f"{low}-{high}" for low, high in self.sources[source])])
            for source in sorted(self.sources)
        )


Position = MariaDBPosition | MySQLPosition


def _united(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """Sort the intervals and join those that touch or overlap."""
    united: list[Interval] = []
    for low, high in sorted(intervals):
        if united and low <= united[-1][1] + 1:
            united[-1] = (united[-1][0], max(united[-1][1], high))
        else:
            united.append((low, high))
    return tuple(united)


def parse_position(flavour: Flavour, text: str) -> Position:
    """Read a position as the server family writes it.

    :raises ValueError: when it is none.
    """
    return MariaDBPosition.parse(text) if flavour is Flavour.MARIADB else MySQLPosition.parse(text)


def family_of(position: str) -> Flavour:
    """Which server family wrote a position, by its look: relays carry them to servers of the other one, too."""
    return Flavour.MYSQL if ":" in position else Flavour.MARIADB


def parse_gtid(flavour: Flavour, text: str) -> Gtid:
    """Read one transaction's id: ``0-1-100``, or ``uuid:100``.

    :raises ValueError: when it is none, or more than one.
    """
    position = parse_position(flavour, text)
    if isinstance(position, MariaDBPosition):
        found: list[Gtid] = list(position.domains.values())
    else:
        found = [
            MySQLGtid(source, low)
            for source, intervals in position.sources.items()
            for low, high in intervals
            if low == high
        ]
    if len(found) != 1 or str(position) != str(found[0]):
        raise ValueError(f"{text!r} is not the id of one transaction")
    return found[0]
