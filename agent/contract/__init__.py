"""What devices and the fleet server agree on: names, manifests, assignments, reports, topics, enrolment.

Values here are frozen and checked when they are decoded: an invalid one cannot exist. Nothing here does I/O.
"""
