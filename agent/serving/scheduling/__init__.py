"""Who runs when.

scheduler    the rules, and the one lock
lanes        the lane of each version, and the jobs that wait in it
batching     many requests, one run
sequences    requests that share state, one after another
threads      how many there are, and what for
demand       what a request asks for besides its tensors
"""
