"""Who runs when. `scheduler` has the rules; the rest are its parts: jobs, the lane of each version, batches, sequences."""
