"""Who may do what: four roles, access tokens, browser sessions. Tokens are kept as hashes only."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from enum import Enum

import msgspec
from sqlalchemy import delete, select

from fleet_server.errors import Conflict, Denied, Invalid, NotFound
from fleet_server.storage.database import Database
from fleet_server.storage.models import AccessToken, BrowserSession

PREFIX = "ef_"  # so that secret scanners and people recognise one
MAX_TOKEN_CHARS = 256
BAD_TOKEN = "bad_token"  # noqa: S105 - the code of a refusal


class Role(str, Enum):
    """Each may do what the ones before it may."""

    VIEWER = "viewer"
    PUBLISHER = "publisher"
    OPERATOR = "operator"
    ADMIN = "admin"

    @property
    def rank(self) -> int:
        return list(Role).index(self)


class Actor(msgspec.Struct, frozen=True):
    """Who asks. `token` is the id of the access token, None for the server itself."""

    name: str
    role: Role
    token: str | None = None
    by_cookie: bool = False


SERVER = Actor("edge-fleet", Role.ADMIN)


def digest(token: str) -> str:
    """What is stored of a token. Tokens are random, so a plain hash cannot be guessed back."""
    return hashlib.sha256(token.encode()).hexdigest()


class AccessTokenView(msgspec.Struct, frozen=True, kw_only=True):
    """An access token as operators see it, without the token itself."""

    id: str
    name: str
    role: Role
    created: float
    revoked: bool


class AccessTokenMade(AccessTokenView, frozen=True, kw_only=True):
    """A new access token with the token itself, which is shown this once."""

    token: str


class Access:
    def __init__(self, database: Database, clock: Callable[[], float], *, session_s: float) -> None:
        self._database, self._clock, self._session_s = database, clock, session_s

    def create(self, name: str, role: Role) -> AccessTokenMade:
        """A new access token.  Raises: Invalid."""
        if not name or len(name) > 128 or not name.isprintable():
            raise Invalid("the name of an access token is 1 to 128 printable characters")
        token = PREFIX + secrets.token_urlsafe(32)
        row = AccessToken(
            id=secrets.token_hex(4), name=name, role=role.value, hash=digest(token), created=self._clock(), revoked=False
        )
        with self._database.session() as session:
            session.add(row)
        return AccessTokenMade(**msgspec.structs.asdict(_view(row)), token=token)

    def tokens(self) -> list[AccessTokenView]:
        with self._database.reading() as session:
            return [_view(row) for row in session.scalars(select(AccessToken).order_by(AccessToken.created))]

    def revoke(self, token_id: str) -> AccessTokenView:
        """Makes the token useless.  Raises: NotFound; Conflict for the last admin's token, without which nobody could make
        another.
        """
        with self._database.session() as session:
            row = session.get(AccessToken, token_id)
            if row is None:
                raise NotFound(f"there is no access token {token_id!r}; `edge-fleet access list` shows them")
            admins = session.scalars(
                select(AccessToken).where(AccessToken.role == Role.ADMIN.value, AccessToken.revoked.is_(False))
            )
            if not row.revoked and [admin.id for admin in admins] == [row.id]:
                raise Conflict("this is the last admin token; create another one first", code="last_admin")
            row.revoked = True
            session.execute(delete(BrowserSession).where(BrowserSession.token == token_id))
            return _view(row)

    def by_token(self, token: str) -> Actor:
        """Whoever the access token was made for.  Raises: Denied, in the same words for one that never was and one that was revoked.

        What is looked up is a hash, so how long that takes says nothing of the token.
        """
        if len(token) <= MAX_TOKEN_CHARS:
            with self._database.reading() as session:
                shown = digest(token)
                row = session.scalar(select(AccessToken).where(AccessToken.hash == shown))
            known = hmac.compare_digest(row.hash if row is not None else digest(""), shown)
            if row is not None and known and not row.revoked:
                return Actor(row.name, Role(row.role), row.id)
        raise Denied("this access token is not known or was revoked", code=BAD_TOKEN)

    def open_session(self, actor: Actor) -> str:
        """A browser session for whoever showed a token: the cookie's value."""
        assert actor.token is not None
        cookie = secrets.token_urlsafe(32)
        with self._database.session() as session:
            session.execute(delete(BrowserSession).where(BrowserSession.expires < self._clock()))
            session.add(BrowserSession(hash=digest(cookie), token=actor.token, expires=self._clock() + self._session_s))
        return cookie

    def by_session(self, cookie: str) -> Actor:
        """Whoever opened the browser session.  Raises: Denied."""
        if len(cookie) <= MAX_TOKEN_CHARS:
            with self._database.reading() as session:
                row = session.get(BrowserSession, digest(cookie))
                token = session.get(AccessToken, row.token) if row is not None and row.expires > self._clock() else None
            if token is not None and not token.revoked:
                return Actor(token.name, Role(token.role), token.id, by_cookie=True)
        raise Denied("the session has ended; sign in again", code="session_ended")

    def close_session(self, cookie: str) -> None:
        with self._database.session() as session:
            session.execute(delete(BrowserSession).where(BrowserSession.hash == digest(cookie)))


def _view(row: AccessToken) -> AccessTokenView:
    return AccessTokenView(id=row.id, name=row.name, role=Role(row.role), created=row.created, revoked=row.revoked)
