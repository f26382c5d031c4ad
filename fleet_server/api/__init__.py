"""The HTTP side: the operators' REST and page, and what devices fetch."""
