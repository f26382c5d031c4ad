"""Rollouts: from what devices say of a release to the assignment that all of them are told.

machine      the life of a rollout as a table. Pure
gates        what the devices of a wave answered, and what follows. Pure
health       whether devices do worse with a release than with the one before. Pure
growth       how many devices of a wave may be told by now. Pure
sequential   tests of shares that may be looked at after every report. Pure
wording      rollouts in words
rows         what the rows of the database mean for the next decision
tally        how many devices stand how, kept up by change. Pure
facts        what each device says of a release
ledger       a tally that follows the database
teams        releases that switch together
pasts        what a device did with each release, and its samples of health. Pure
exclusions   releases that a hardware class does not run
steps        one step of a rollout, written down
assignment   what devices are told: made from the database, signed, poked
decisions    one decision at a time: transaction, signing, poke, words
beginning    when a rollout may begin, and with which waves
vitals       the health of the devices of each rollout, kept up by its samples
evidence     what a rollout was judged by, and judging it again
judging      the gates of running rollouts, and what their verdicts do
commands     what operators ask for
views        what operators are shown
bundles      what some devices should run, in one file for a stick
"""
