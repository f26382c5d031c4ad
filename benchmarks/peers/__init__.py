"""The same two models behind the servers that people would pick instead, measured in one run with ours."""
