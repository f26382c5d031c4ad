"""Rollouts: from what devices say of a release to the assignment that all of them are told.

service   asks, decides, writes down, signs
machine   the life of a rollout as a table. Pure
gates     what the devices of a wave answered, and what follows. Pure
heard     what each device says of a release
reading   what the rows mean: for devices, for the next decision, in words
classes   releases that are stopped for one kind of hardware
teams     releases that switch together
"""
