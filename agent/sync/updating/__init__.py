"""From a release that is wanted to one that serves, or is refused.

update      the machine: what may follow what. Pure
updater, worker    drive one model through it, in a thread
model       what all phases share
preparing, joining, shadowing, canarying, switching    the phases
states, quarantine, holds, approvals, journal          what is remembered, each on disk
retention   what may be deleted from the store
"""
