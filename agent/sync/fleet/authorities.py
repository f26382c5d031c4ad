"""Follows a fleet server that replaces its certificate authority (CA): keeps the CAs that the signed assignment names, and says
when this device's certificate is to be renewed under the newest. What is believed is decided in `agent/sync/authorities.py`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from agent.common import files
from agent.contract.authorities import Authorities
from agent.sync import authorities
from agent.sync.authorities import NotBelieved
from agent.sync.identity import Identity, IdentityError
from agent.sync.ports import Clock
from agent.sync.trust.desired import Desired

log = logging.getLogger(__name__)

LONGEST_SPREAD_S = 7 * 86400.0


class AuthorityFollower:
    """For any thread."""

    def __init__(
        self, who: Callable[[], Identity], clock: Clock, place: float, look_by: Callable[[float], None], changed: Callable[[str, bool], None]
    ) -> None:  # fmt: skip
        """`who` is the present identity. `place`, from 0 to 1, is this device's moment when a whole fleet renews. `look_by` gets the
        moment (monotonic) at which to look at the fleet at the latest. `changed` is told, after it was made durable that other CAs
        are believed, in words, and whether one is not any more.
        """
        self._who, self._clock, self._place, self._look_by, self._changed = who, clock, place, look_by, changed
        self._lock = threading.Lock()
        self._said: Authorities | None = None
        self._renew_from = float("-inf")

    def told(self, desired: Desired | None) -> None:
        """What the fleet wants, as it is signed: it names the CAs."""
        said = desired.assignment.authorities if desired is not None else None
        if said is None:
            return
        with self._lock:
            if said == self._said:
                return
            try:
                change = self._keep(said)
            except OSError as error:  # tried again when it is said again, which is after each look
                log.warning("the CAs that the fleet names could not be kept: %s", error)
                return
            self._said = said
            if self._is_superseded(self._who()):
                spread_s = min(LONGEST_SPREAD_S, max(0.0, said.spread_s))
                self._renew_from = self._clock.monotonic() + spread_s * self._place
                self._look_by(self._renew_from)
        if change is not None:
            self._changed(*change)

    def wants_renewal(self, who: Identity) -> bool:
        """Whether the certificate is of an older CA than the newest, and this device's moment has come."""
        return self._clock.monotonic() >= self._renew_from and self._is_superseded(who)

    def _keep(self, said: Authorities) -> tuple[str, bool] | None:
        """What changed, in words, and whether a CA is believed no more.  Raises: OSError."""
        who = self._who()
        try:
            known = who.authorities()
            found = authorities.believed(known, said)
            if found == known:
                return None
            files.write(who.ca_file, authorities.pem(found))
        except (NotBelieved, IdentityError) as error:
            log.warning("the fleet's CAs stay as they are: %s", error)
            return None
        names = ", ".join(authorities.fingerprint(one)[:16] for one in found)
        dropped = [authorities.fingerprint(one)[:16] for one in known if one not in found]
        words = f"this device believes the CAs {names} of its fleet now" + (
            f", and no more {', '.join(dropped)}" if dropped else ""
        )
        return words, bool(dropped)

    def _is_superseded(self, who: Identity) -> bool:
        try:
            return authorities.issuer_of(who.certificate, who.authorities()) != 0
        except IdentityError:
            return False
