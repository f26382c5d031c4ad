"""The process that talks to the fleet: verifies, downloads, tries, activates, watches, reports. It never answers a prediction.

This file imports nothing: the trial's throw-away process lives in this package and must stay small.
"""
