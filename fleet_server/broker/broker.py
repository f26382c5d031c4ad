"""The broker as the server's processes see it, whichever it is."""

from __future__ import annotations

from typing import Protocol

from starlette.types import ASGIApp

from fleet_server.ingest.broker_views import BrokerView
from fleet_server.ingest.links import Link


class Broker(Protocol):
    """Methods are for any thread, but for coroutines, which belong to one event loop."""

    questions: ASGIApp | None
    """Answers what the nodes of a cluster ask of this server; None where the broker asks nothing."""

    @property
    def link(self) -> Link: ...

    async def run(self) -> None:
        """Runs what there is to run, until `end`."""

    async def end(self) -> None: ...

    def start(self) -> None:
        """Connects, and lets devices in and out."""

    def stop(self) -> None: ...

    def hopeless(self) -> bool:
        """Whether it will not come up."""

    def missing(self) -> str:
        """Why it is not ready, in words; empty when it is."""

    def shut_out(self, device: str) -> None:
        """Throws the device off for good. It is revoked or deleted by now."""

    def admit(self, device: str) -> None:
        """Lets a device in that was enrolled."""

    def keep_out(self, device: str, seconds: float) -> None:
        """Lets a device not in for a while that another process has paused and thrown off."""

    def paused(self) -> list[str]:
        """The devices that are shut out for a while."""

    def warnings(self) -> list[str]:
        """What a person must do something about, and what."""

    def restart(self) -> None:
        """A CA is believed no more: everybody has to connect anew."""

    def renew(self) -> None:
        """The server's own certificates are new."""

    def reload(self) -> None:
        """The list of revoked certificates is another one."""

    def view(self) -> BrokerView: ...
