"""How the files of a release come into the store: which bytes are missing, who is asked for them, and how fast.

pieces      what a file is made of, and which stretches to ask for. Pure
staged      a file that is being put together on disk
reuse       blocks that this store holds already
sources     who may have blobs, in which order, and who is left alone for a while
https, folders, mqtt    the sources
factory     the sources and the downloader that agent.yaml asks for
budget      the bytes per second and the hours that all downloads share; `speed`: a download that is too slow
downloader  all of it together
sharing     what this device lends to its neighbours
imports, spool    bundles that somebody brought, verified and used
"""
