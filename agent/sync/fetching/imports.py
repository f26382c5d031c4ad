"""What `sync` does with bundles: verifies them as it verifies its server, then uses their documents and files as one more way
and source.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable

from agent.contract.names import ReleaseRef
from agent.contract.reasons import Reason
from agent.store import Store
from agent.sync.fetching.folders import FolderBlobs
from agent.sync.fetching.sources import Sources
from agent.sync.fetching.spool import BundleDocuments, Spool, Told
from agent.sync.problems import Problem
from agent.sync.trust.desired import Desired
from agent.sync.trust.metadata import Documents

log = logging.getLogger(__name__)

IMPORT_PLACE = 0
"""Asked before every other source: it lies beside the store."""


class Imports:
    """Used by the follower's thread; `news` by any."""

    def __init__(self, store: Store, device: str, sources: Sources, say: Callable[[str, str], None]) -> None:
        self._store = store
        self._device = device
        self._sources = sources
        self._say = say
        self._noticed: set[str] = set()
        self.spool = Spool(store)
        self.spool.sweep()
        for id_ in self.spool.ids():
            if self.spool.accepted(id_):
                self._use(id_)

    def news(self) -> bool:
        """Whether there is a bundle that was not here when this was asked last."""
        found = {id_ for id_ in self.spool.ids() if not self.spool.accepted(id_)}
        fresh = found - self._noticed
        self._noticed = found
        return bool(fresh)

    def ways(self) -> list[Documents]:
        """The documents of accepted bundles, newest first."""
        return [
            BundleDocuments(self.spool.path(id_), self._device)
            for id_ in reversed(self.spool.ids())
            if self.spool.accepted(id_)
        ]

    def accept(self, refresh: Callable[[Documents], Desired]) -> Desired | None:
        """Verifies what waits; what the fleet says in the last one that was accepted. What is refused is removed. Never
        raises.
        """
        said = None
        for id_ in self.spool.ids():
            if not self.spool.accepted(id_):
                try:
                    said = self._verify(id_, refresh) or said
                except OSError as error:
                    log.warning("a bundle cannot be read: %s; it is tried again", error)
                except Exception as error:  # whatever a stranger wrote into it, the follower must live
                    log.exception("a bundle failed in a way that was not foreseen")
                    self._refuse(id_, Problem(Reason.UNREADABLE, f"the bundle cannot be read: {type(error).__name__}: {error}"))
        return said

    def _verify(self, id_: str, refresh: Callable[[Documents], Desired]) -> Desired | None:
        try:
            releases = sorted(map(ReleaseRef.parse, self.spool.about(id_).releases))  # a label that nobody signed
            desired = refresh(BundleDocuments(self.spool.path(id_), self._device))
        except Problem as problem:
            if problem.reason in {Reason.STORE_FAILED, Reason.NO_SPACE}:
                log.warning("a bundle cannot be verified now: %s; it is tried again", problem)
                return None
            self._refuse(id_, problem)
            return None
        except ValueError as error:
            self._refuse(id_, Problem(Reason.UNREADABLE, str(error)))
            return None
        for other in self.spool.ids():
            if other != id_ and self.spool.accepted(other):
                self._sources.remove(_name(other))
                self.spool.remove(other)
        self.spool.accept(id_)
        self._use(id_)
        self._link(id_)
        wanted = {ref.model: ref.version for ref in releases if desired.wanted(ref.model).release == ref.version}
        self.spool.tell(id_, Told(accepted=True, wanted=wanted, message=f"assignment {desired.assignment.version}"))
        self._say("bundle-imported", f"a bundle with {', '.join(map(str, releases)) or 'no release'}")
        return desired

    def _refuse(self, id_: str, problem: Problem) -> None:
        self.spool.tell(id_, Told(accepted=False, reason=problem.reason, message=problem.message))
        self.spool.remove(id_)
        self._say("bundle-refused", f"{problem.reason.value}: {problem.message}")

    def _use(self, id_: str) -> None:
        self._sources.add(FolderBlobs(self.spool.path(id_), name=_name(id_), place=IMPORT_PLACE))

    def _link(self, id_: str) -> None:
        """Puts the blobs where downloads look for what they began, so that nothing is copied twice; they are hashed there as
        ever.
        """
        for path in (self.spool.path(id_) / "blobs").glob("[!.]*"):
            if not self._store.has_blob(path.name):
                with contextlib.suppress(OSError):
                    os.link(path, self._store.staging / path.name)

    def tidy(self, needed: Callable[[str, int], bool]) -> None:
        """Removes the files of bundles whose releases are all done with; their documents stay, for what has to be fetched anew
        offline.
        """
        for id_ in self.spool.ids():
            told = self.spool.told(id_)
            if self.spool.accepted(id_) and told is not None and not any(needed(*wanted) for wanted in told.wanted.items()):
                self.spool.remove_blobs(id_)


def _name(id_: str) -> str:
    return f"the bundle {id_[:8]}"
