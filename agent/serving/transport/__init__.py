"""HTTP/1.1 over sockets. It knows no model: requests go to a `loop.Service`, and answers come back.

sockets, doors   who listens, who comes in, who has to go
loop             leader/followers: which thread does what
chores           the control thread
connection       one client: bytes in, whole requests out; answers in, bytes out
http, chunked, compression    heads and bodies
buffers          memory for large bodies
"""
