"""Which certificate authorities (CAs) vouch for the fleet server. A server that replaces its CA says so in the signed assignment,
so that devices follow without a visit.

Being told a CA makes no device believe it: one that it believes already has to have certified the new one's key
(`agent.sync.authorities`). So whoever has the online keys alone, or the CA's key alone, puts no CA of his own into any device.
"""

from __future__ import annotations

from agent.contract.codec import Document

MAX_CERTIFICATES = 4
MAX_CROSS_CERTIFICATES = 8
MAX_PEM_CHARS = 4096


class Authorities(Document, frozen=True, kw_only=True):
    """`certificates` (PEM) are the CAs to believe, and no others; the first is the newest, of which a device's own certificate is
    to be. `cross_certificates` (PEM) certify the keys of newer CAs, each by the CA before it, also those of earlier replacements:
    so a device that was away for several can follow. Devices renew their certificates within `spread_s` seconds, each at a
    moment of its own.
    """

    certificates: tuple[str, ...]
    cross_certificates: tuple[str, ...] = ()
    spread_s: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= len(self.certificates) <= MAX_CERTIFICATES or len(self.cross_certificates) > MAX_CROSS_CERTIFICATES:
            raise ValueError(
                f"authorities are 1 to {MAX_CERTIFICATES} certificates and at most {MAX_CROSS_CERTIFICATES} cross certificates"
            )
        if max(map(len, (*self.certificates, *self.cross_certificates))) > MAX_PEM_CHARS:
            raise ValueError(f"a CA's certificate has at most {MAX_PEM_CHARS} characters")
