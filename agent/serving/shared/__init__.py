"""Tensors in memory that clients share, in place of bytes on the socket.

memory          sealed memfds of one connection
systemmemory    POSIX shared memory by name, as Triton has it
regions         either, as a request names it
"""
