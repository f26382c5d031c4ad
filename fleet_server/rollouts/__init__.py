"""Staged changes: a pure machine and pure gates, and the service that feeds them and signs what they decide."""
