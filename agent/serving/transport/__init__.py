"""HTTP/1.1 over sockets. It knows no model: requests go to a `loop.Service`, and answers come back.

sockets           where to listen
admission         who comes in, and who has to go
loop, spinning    leader/followers: which thread does what, and how the one that polls waits
control_thread    the thread for what changes models
connection        one client: bytes in, whole requests out; answers in, bytes out
http, chunked     heads and bodies
"""
