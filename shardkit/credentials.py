"""Users and passwords: each process brings its own; the shard map holds none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from shardkit.errors import PreconditionFailed
from shardkit.topology import Endpoint


@dataclass(frozen=True, slots=True)
class Credentials:
    """How to log on to one server. The password never shows in ``repr``."""

    user: str
    password: str = field(default="", repr=False)


#: Given an endpoint, the credentials to use there. An application with one account per shard passes its own.
CredentialSource = Callable[[Endpoint], Credentials]


class CredentialSettings(BaseSettings):
    """``SHARDKIT_USER`` and ``SHARDKIT_PASSWORD``, or a file with the password named by ``SHARDKIT_PASSWORD_FILE``."""

    model_config = SettingsConfigDict(env_prefix="SHARDKIT_", extra="ignore")

    user: str | None = None
    password: SecretStr = SecretStr("")
    password_file: str | None = None


def from_environment() -> CredentialSource:
    """Credentials from the process environment, read now, the same for every endpoint.

    :raises PreconditionFailed: when a server endpoint is asked for and ``SHARDKIT_USER`` is not set, or the password
        file cannot be read.
    """
    settings = CredentialSettings()

    def credentials(endpoint: Endpoint) -> Credentials:
        if endpoint.dialect == "sqlite":
            return Credentials("")
        if settings.user is None:
            raise PreconditionFailed(
                f"no user is set for {endpoint.address}",
                hint="set SHARDKIT_USER and SHARDKIT_PASSWORD (or SHARDKIT_PASSWORD_FILE), or pass credentials=",
            )
        return Credentials(settings.user, _password(settings))

    return credentials


def _password(settings: CredentialSettings) -> str:
    if settings.password_file is None:
        return settings.password.get_secret_value()
    try:
        return Path(settings.password_file).read_text(encoding="utf-8").rstrip("\n")
    except OSError as error:
        raise PreconditionFailed(
            f"the password file {settings.password_file} cannot be read: {error.strerror}",
            hint="mend SHARDKIT_PASSWORD_FILE or its permissions",
        ) from None


def fixed(user: str, password: str = "") -> CredentialSource:
    """The same credentials for every endpoint."""
    credentials = Credentials(user, password)
    return lambda _endpoint: credentials
