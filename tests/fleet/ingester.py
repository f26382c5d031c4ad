"""A process that stores what devices report through a RabbitMQ cluster, and does nothing else: `python -m tests.fleet.ingester FOLDER`.

Prints a line each time when it has stored something: the queues it works on, and how many messages it stored so far.
"""

import os
import sys
import threading
import time
from pathlib import Path

from fleet_server.app import Fleet
from fleet_server.config import Folder, load
from fleet_server.ingest.amqp_link import AmqpLink


def main(folder):
    where = Folder(Path(folder))
    config = load(where)
    fleet = Fleet(where, config)
    link = AmqpLink(config.broker.rabbitmq, fleet.authority, fleet.intake, lambda _models: None)
    link.start()
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()  # it ends with whoever started it
    said = None
    while True:
        threading.Event().wait(0.05)
        now = (sorted(link.partitions.worked_on), fleet.intake.accepted)
        if now != said:
            print(f"{time.time():.3f}", ",".join(map(str, now[0])) or "-", now[1], flush=True)
            said = now


if __name__ == "__main__":
    main(*sys.argv[1:])
