"""A version that is tried on copies of live requests beside the one that answers them.

shadowing    takes the copies, whose answers nobody gets, and runs them
comparing    two versions' answers to the same inputs, as numbers. Pure
"""
