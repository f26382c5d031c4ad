"""Who the devices are, how they join, and what they said last."""
