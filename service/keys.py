"""Who calls: API keys, known by their hashes. `python -m service.keys NAME` makes one.

A key has 256 random bits, so that its plain SHA-256 cannot be searched: a slow hash is for passwords.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import ipaddress
import re
import secrets
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends
from starlette.requests import Request  # noqa: TC002 (fastapi reads the annotations at run time)

from service.errors import UnauthorizedError
from service.settings import ANYONE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from service.settings import ListenSettings

KEY_BYTES = 32
_NAME = re.compile(r"(?!-)[A-Za-z0-9._@-]{1,64}")
_NAMES = "1 to 64 of A-Z a-z 0-9 . _ @ -, not - at the start"


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom jobs, media and idempotency keys belong to: the key's name, "" where no keys are configured."""

    owner: str


class ApiKeys:
    """The configured keys."""

    def __init__(self, lines: Iterable[str]) -> None:
        split = (line.partition(":") for line in lines)
        self._hashes = tuple((name, digest.encode()) for name, _, digest in split)

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def caller(self, authorization: str) -> Caller:
        """Whoever sent this `Authorization` header. Raises `UnauthorizedError`.

        Every hash is compared, each in constant time: how long it takes tells nothing of a key.
        """
        if not self._hashes:
            return Caller("")
        scheme, _, key = authorization.partition(" ")
        digest = key_hash(key.strip()).encode()
        owners = [name for name, known in self._hashes if hmac.compare_digest(known, digest)]
        if scheme.lower() != "bearer" or not owners:
            raise UnauthorizedError("Send a known key: Authorization: Bearer <key>.")
        return Caller(owners[0])


def key_hash(key: str) -> str:
    """What is configured in a key's place: its SHA-256 in hexadecimal."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def new_key(name: str) -> tuple[str, str]:
    """A new key, and the line to configure for it."""
    key = "prism_" + secrets.token_urlsafe(KEY_BYTES)
    return key, f"{name}:{key_hash(key)}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a listener on `host`; a name other than localhost may be anything."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def may_listen(settings: ListenSettings, host: str) -> bool:
    """Whether a listener on `host` is guarded by keys or by where it is, or is meant for everybody."""
    return bool(settings.key_lines) or is_loopback(host) or settings.allow_anonymous == ANYONE


WHY_NOT = (
    "Without API keys the server listens on loopback alone. Make a key with `python -m service.keys NAME`"
    f" and set PRISM_API_KEYS to the line that it prints, or set PRISM_ALLOW_ANONYMOUS={ANYONE}."
)


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller  # found by `service.middleware.KeyGuard`
    return caller


CallerHere = Annotated[Caller, Depends(_caller)]


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"a name has {_NAMES}")
    return text


def main(argv: list[str]) -> int:
    """Prints a new key, shown this once, and its line for `PRISM_API_KEYS`; exit code 2 for a bad name."""
    parser = argparse.ArgumentParser(
        prog="python -m service.keys",
        description="Makes an API key, and the line with its hash for PRISM_API_KEYS.",
        epilog="docs/settings.md has PRISM_API_KEYS and PRISM_API_KEYS_FILE.",
    )
    parser.add_argument("name", metavar="NAME", type=_name, help=f"whose key it is: {_NAMES}")
    key, line = new_key(parser.parse_args(argv).name)
    sys.stdout.write(f"key, for the caller alone:    {key}\nline, for PRISM_API_KEYS:     {line}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
