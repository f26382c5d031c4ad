"""The models in memory.

host        versions, which one answers, and how one gives way to another
loading     from a file to a warm version
residency   who is in memory, who is put out, and how it comes back
budget      who leaves memory for others. Pure
swapping    one version in place of another where both do not fit
"""
