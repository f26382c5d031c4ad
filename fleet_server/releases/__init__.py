"""Releases: the signed repository, how a release gets into it, and who may sign.

delegations      which publisher may sign which models
publication      what a publication must be before it is trusted. Pure
publisher        what a publisher's machine signs
builder          RELEASE.yaml → a manifest, on the publisher's machine
blocks           cuts a file into blocks
metadata_files   the metadata files, and what of them is trusted
target_files     the manifests and assignments that the metadata lists
online_roles     what the server signs itself
repository       all of it, as devices fetch it
catalogue        the index of published releases
keys             signing keys in files and behind URIs
signing_process  signs through a URI, in a process of its own
online_keys      the keys that the server itself signs with
key_change       a change of keys as a file
key_rules        what such a change must be. Pure
key_draft        what is in force, being changed
key_changes      applies what the offline keys signed
trust            shows who is trusted, and proposes changes of it
"""
