"""Simulated devices: they speak to a fleet server as devices do, with certificates of their own, and run no model.

`behaviours`, `members`, `device` and `expected` are pure: who the devices are, what each does, and how a rollout must end with them.
`crowd` connects thousands of them in one thread; `throwaway` and `borrowed` are the servers they connect to; `rehearsal` tells the
story from the first connection to the last commit.
"""
