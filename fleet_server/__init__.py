"""The fleet server: releases, rollouts, devices, and the broker they talk through. `edge-fleet serve` runs all of it on one
box.
"""
