"""The machine under the agent: peer credentials, hardware, memory, clock, signals."""
