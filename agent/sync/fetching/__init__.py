"""How the files of a release come into the store: which bytes are missing, who is asked for them, and how fast.

layout      what a file is made of, and which stretches to ask for. Pure
staged      a file that is being put together on disk
local       blocks that this store holds already
sources     who may have blobs, in which order, and who is left alone for a while
https, folders, mqtt    the sources
budget      the bytes per second and the hours that all downloads share
downloader  all of it together
"""
