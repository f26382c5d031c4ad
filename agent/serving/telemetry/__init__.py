"""What is told about predictions.

stats       counts and times of one version
metrics     all of them as Prometheus text
observing   who wants to see every request
accesslog, tracing    who does
"""
