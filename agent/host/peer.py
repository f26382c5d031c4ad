"""Who is at the other end of a Unix socket, as the kernel says it."""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass

SO_PEERGROUPS = 59  # socket(7) since Linux 4.13; Python has no constant for it
_CREDENTIALS = struct.Struct("iII")
MAX_GROUPS = 256  # NGROUPS_MAX is 65536, but a peer in more groups than this is matched by uid or primary group


@dataclass(frozen=True, slots=True)
class Peer:
    """The process that called connect(), with its effective ids at that moment. `gids` has its supplementary groups too."""

    pid: int
    uid: int
    gids: frozenset[int]


def peer_of(connection: socket.socket) -> Peer:
    """Raises: OSError when the socket is not a connected Unix socket."""
    pid, uid, gid = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return Peer(pid, uid, frozenset((gid, *_groups(connection))))


def own() -> Peer:
    return Peer(os.getpid(), os.geteuid(), frozenset((os.getegid(), *os.getgroups())))


def _groups(connection: socket.socket) -> tuple[int, ...]:
    for room in (64, MAX_GROUPS):  # Python refuses to ask for more than 1 KiB
        try:
            packed = connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, room * 4)
        except OverflowError:
            return ()
        except OSError as error:
            if error.errno == 34:  # ERANGE: more groups than fit
                continue
            return ()  # an older kernel: only the primary group counts
        return struct.unpack(f"{len(packed) // 4}I", packed)
    return ()
