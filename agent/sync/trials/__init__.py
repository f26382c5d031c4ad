"""A release is run for the first time in a process that may die.

trial        the parent's side: starts it, listens, stops it in time
queue        whose trial is next
supervision  what a child starts and writes, checked while it runs and cleared away
protocol     what the two sides say to each other
child        the throw-away process
containment  what that process gives up before it touches the model
"""
