"""The server as several processes, on one database: `edge-fleet api`, `ingest` and `decide`.

common       what each of them has: the database, signals, a row that says that it lives
others       what a process knows of the others
decide       one leads: it decides, signs, certifies
ingest       stores what devices send
api          answers operators and devices, and hands on what the leader must do
aside        health and metrics of those that answer nobody else
"""
