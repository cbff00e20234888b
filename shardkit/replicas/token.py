"""Tokens: what a client has written and seen, so that no replica shows it an older state. Pure values.

A token holds, for each shard, a position in the log of the shard's master. A replica may answer where it has applied
that position. Tokens travel: in a cookie, a header, a message.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Self

from itsdangerous import BadSignature, Signer

from shardkit.errors import InvalidToken
from shardkit.gtid import Flavour, MariaDBPosition, MySQLPosition, Position, parse_position

#: Bytes of a written token: a cookie holds 4096 (RFC 6265, section 6.1) with its name and attributes.
LONGEST: Final = 3072
_FORMAT = "1"
_SALT = "shardkit.token"
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Mark:
    """How far one shard has been written or seen.

    :param epoch: of the shard: which master's log the position is of.
    :param position: None where it is not known: only the master will do.
    """

    epoch: int
    position: Position | None

    def covered_by(self, epoch: int, applied: Position | None) -> bool:
        """Whether a replica that has applied this position of that epoch's log shows nothing older."""
        return (
            self.position is not None and applied is not None and self.epoch == epoch and applied.covers(self.position)
        )

    def union(self, other: Mark) -> Mark:
        """Both. A shard's later master has what was left of the earlier one's log from its first day on."""
        if self.epoch != other.epoch:
            return max(self, other, key=lambda mark: mark.epoch)
        if self.position is None or other.position is None:
            return Mark(self.epoch, None)
        if self.position.covers(other.position):
            return self
        if other.position.covers(self.position):
            return other
        return Mark(self.epoch, _united(self.position, other.position))


def _with_other_domains(after: Position | None, before: Position | None) -> Position | None:
    if not isinstance(after, MariaDBPosition) or not isinstance(before, MariaDBPosition):
        return after
    return MariaDBPosition(MappingProxyType({**before.domains, **after.domains}))


def _united(one: Position, other: Position) -> Position | None:
    if isinstance(one, MariaDBPosition) and isinstance(other, MariaDBPosition):
        domains = dict(one.domains)
        for domain, gtid in other.domains.items():
            if domain not in domains or domains[domain].sequence < gtid.sequence:
                domains[domain] = gtid
        return MariaDBPosition(MappingProxyType(domains))
    if isinstance(one, MySQLPosition) and isinstance(other, MySQLPosition):
        return MySQLPosition.parse(f"{one},{other}")
    return None  # of different server families: only the master can tell


@dataclass(frozen=True)
class Token:
    """What a session has written and seen, as positions by shard. Immutable.

    :param marks: by shard.
    :param others_on_master: whether shards that have no mark are to be read on their masters, because the token had
        grown too long to name them.
    """

    marks: Mapping[str, Mark] = field(default_factory=lambda: MappingProxyType({}))
    others_on_master: bool = False

    def __bool__(self) -> bool:
        return bool(self.marks) or self.others_on_master

    def mark(self, shard: str) -> Mark | None:
        """What a read of this shard has to show; None: anything will do."""
        found = self.marks.get(shard)
        return _NOWHERE if found is None and self.others_on_master else found

    def raised(self, shard: str, mark: Mark) -> Token:
        """The token that also holds this."""
        before = self.marks.get(shard)
        if before is None and self.others_on_master:
            mark = Mark(mark.epoch, None)  # what was left out of the token is not known
        after = mark if before is None else before.union(mark)
        if after is before:
            return self
        rest = {name: known for name, known in self.marks.items() if name != shard}
        return Token(MappingProxyType({**rest, shard: after}), self.others_on_master)

    def replaced(self, shard: str, mark: Mark) -> Token:
        """The token that holds this and nothing else of the shard: what its master had after all that was seen.

        MariaDB orders transactions within a replication domain only: of other domains, what was known stays.
        """
        before = self.marks.get(shard)
        if before is not None and before.epoch > mark.epoch:
            return self
        if before is not None and before.epoch == mark.epoch:
            mark = Mark(mark.epoch, _with_other_domains(mark.position, before.position))
        rest = {name: known for name, known in self.marks.items() if name != shard}
        return Token(MappingProxyType({**rest, shard: mark}), self.others_on_master)

    def merged(self, other: Token) -> Token:
        """What both hold."""
        token = self
        for shard, mark in other.marks.items():
            token = token.raised(shard, mark)
        if not other.others_on_master:
            return token
        for shard in self.marks.keys() - other.marks.keys():
            token = token.raised(shard, Mark(self.marks[shard].epoch, None))
        return Token(token.marks, True)

    # --- written

    def dumps(self, secret: str | bytes | None = None, *, longest: int = LONGEST) -> str:
        """The token as text, of letters, digits and ``-_.=``.

        :param secret: sign it, so that `loads` takes it only from who knows the secret.
        :param longest: bytes; of a longer token only the shards named last are kept, and the others are read on their
            masters.
        """
        kept = list(self.marks.items())
        others = self.others_on_master
        while True:
            text = self._written(kept, others=others)
            signed = text if secret is None else Signer(secret, salt=_SALT).sign(text).decode()
            if len(signed) <= longest or not kept:
                return signed
            kept, others = kept[len(kept) // 4 + 1 :], True

    @staticmethod
    def _written(marks: Iterable[tuple[str, Mark]], *, others: bool) -> str:
        plain = [[shard, mark.epoch, None if mark.position is None else str(mark.position)] for shard, mark in marks]
        packed = zlib.compress(json.dumps([plain, int(others)], separators=(",", ":")).encode(), 9)
        return _FORMAT + base64.urlsafe_b64encode(packed).decode().rstrip("=")

    @classmethod
    def loads(cls, text: str, secret: str | bytes | None = None) -> Self:
        """Read what `dumps` wrote. Shards that the map does not have do no harm.

        :raises InvalidToken: for anything else, and for a signature that does not fit.
        """
        if secret is not None:
            text = _unsigned(text, secret)
        try:
            plain, others = json.loads(_unpacked(text))
            marks = {str(shard): Mark(int(epoch), _position(position)) for shard, epoch, position in plain}
        except (ValueError, TypeError, binascii.Error, zlib.error, RecursionError):
            raise InvalidToken("this is no token of shardkit", hint="go on without it") from None
        return cls(MappingProxyType(marks), bool(others))


_NOWHERE = Mark(-1, None)


def _unpacked(text: str) -> bytes:
    if not text.startswith(_FORMAT) or len(text) > _MOST_BYTES:
        raise ValueError("of another format")
    packed = base64.b64decode(text[1:] + "=" * (-len(text[1:]) % 4), altchars=b"-_", validate=True)
    unpacker = zlib.decompressobj()
    found = unpacker.decompress(packed, _MOST_BYTES)
    if unpacker.unconsumed_tail or not unpacker.eof:
        raise ValueError("cut off, or far too long")
    return found


def _position(text: Any) -> Position | None:
    if text is None:
        return None
    if not isinstance(text, str):
        raise TypeError("a position is a text")
    return parse_position(Flavour.MYSQL if ":" in text else Flavour.MARIADB, text)


def _unsigned(text: str, secret: str | bytes) -> str:
    try:
        return Signer(secret, salt=_SALT).unsign(text).decode()
    except (BadSignature, UnicodeDecodeError):
        raise InvalidToken("the token's signature does not fit", hint="go on without it") from None
