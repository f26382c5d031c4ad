"""A copy of a whole fleet server in one file, and a fleet server made from it."""
