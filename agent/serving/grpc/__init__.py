"""The same protocol over gRPC, on a Unix socket of its own. Needs the `grpc` extra, and loads it only when such a socket is
asked for.

gRPC hides who connects, so everyone on this socket has one class of access; the socket's mode decides who that is.
"""
