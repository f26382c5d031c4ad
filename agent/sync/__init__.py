"""`edge-agent sync`: everything about a device but serving. It follows the fleet, brings releases, and watches what they do.

cli             the commands
app             wires all of it. `operator`: for whoever stands before the device, whether `sync` runs or not
fleet           what is said between this device and its fleet server
updating        from a release that is wanted to one that serves, or is refused
trials          what nobody ran here yet runs in a throw-away process. `fetching`: files are brought
serving         the control routes of `serve`
gates           decide, without disk, network or clock. `trust`: from bytes to what may be believed
http, identity  the way to the fleet server, and who this device is; `refusals`: why one of the two is not let in
ports, problems, exclusive    what the parts ask of each other, what goes wrong, one process at a time

Each stands on a floor, in this order, and imports only from the floors below it (pyproject.toml).

This file imports nothing: the trial's throw-away process lives in this package and must stay small.
"""
