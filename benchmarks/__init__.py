"""Measures the server beside its floor: a socket that echoes, plus the engine called in the same process."""
