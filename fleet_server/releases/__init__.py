"""The signed repository, and how a release gets into it."""
