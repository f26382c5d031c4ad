"""The models in memory.

host            which versions there are, which one answers, and how one gives way to another
canary          a share of one version's requests that another one answers
stats           counts and times of one version
loading         from a file to a warm version
loading_note    which one is being loaded, for whoever comes after a crash
rehearsal       a model loaded in a copy of this process before it is in this one
residency       who is in memory, who is put out, and how it comes back
budget          who leaves memory for others. Pure
swapping        one version in place of another where both do not fit
"""
