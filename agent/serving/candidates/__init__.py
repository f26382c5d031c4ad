"""A version that is tried on live requests beside the one that answers them.

shadowing   on copies, whose answers nobody gets
canary      on a share of them
comparing   two versions' answers to the same inputs, as numbers. Pure
"""
