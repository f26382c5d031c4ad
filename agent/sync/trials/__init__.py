"""A release is run for the first time in a process that may die.

trial        the parent's side: starts it, listens, stops it in time
turns        whose trial is next
keeping      what a child starts and writes, looked at and cleared away
protocol     what the two sides say to each other
child        the throw-away process
containment  what that process gives up before it touches the model
"""
