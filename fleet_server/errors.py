"""What can go wrong, by whose fault it is. `code` is a stable word for programs; the text says what to do.

The web layer maps each class to one HTTP status; nothing else here knows of HTTP.
"""

from __future__ import annotations


class FleetError(Exception):
    """Base of every refusal and failure that a caller is told about."""

    code = "failed"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code:
            self.code = code


class Invalid(FleetError):
    """What was sent cannot be understood or breaks a rule; sending it again will not help."""

    code = "invalid"


class Denied(FleetError):
    """The caller is not known: no token, a wrong one, an expired one."""

    code = "denied"


class Refused(FleetError):
    """The caller is known and may not do this, or the thing itself is not trusted."""

    code = "refused"


class NotFound(FleetError):
    """There is no such thing."""

    code = "not_found"


class Conflict(FleetError):
    """It does not fit what is already so. The message says what to do first."""

    code = "conflict"


class TooLarge(FleetError):
    """More bytes than there may be."""

    code = "too_large"


class TooOften(FleetError):
    """The caller tries too often; `after_s` seconds later it may again."""

    code = "too_often"

    def __init__(self, message: str, *, after_s: float) -> None:
        super().__init__(message)
        self.after_s = after_s


class Unavailable(FleetError):
    """Something this server needs does not answer now; trying later may help."""

    code = "unavailable"


class ServerRefused(FleetError):
    """Seen by the command line: the server understood and said no. Exit code 3."""

    def __init__(self, message: str, code: str, status: int) -> None:
        super().__init__(message, code=code)
        self.status = status
