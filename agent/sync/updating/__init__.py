"""From a release that is wanted to one that serves, or is refused.

update      the machine: what may follow what. Pure
machine     makes the phases, and gives each what it needs
updater, worker    step one model through its phases, in a thread
model       one model's update: its state, and what is told of it
team        releases that switch together
resting, preparing, trialing, waiting, shadowing, canarying, switching, watching, rollingback    the phases, a class each
stopping    a lease that ended, in any phase in which nothing switches
wanted, admission, endings, selected, manifests    what phases share: what is wanted, what may serve, how an update ends early,
            what is selected on disk, the store's manifests
records     what is remembered on disk: states, quarantine, holds, approvals, journal
retention   what may be deleted from the store
device      the machine that updates happen on
renamed     the words of records that version 0.1.0 wrote
"""
