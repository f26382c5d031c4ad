"""`python -m fleet_server.cli`."""

from fleet_server.cli import main

main()
