"""What is told of every request, and to whom.

observing     the service that tells, and what is told
accesslog     a line per request
tracing       a span per request
"""
