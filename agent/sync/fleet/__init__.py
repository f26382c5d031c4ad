"""Between this device and its fleet server: who it is, how it joined, and what is said between them.

identity    the folder that says who this device is and what it trusted when it joined
enrol       joining
renewal     a new certificate before the old one ends, by either way
http, link  the two ways to the fleet: HTTPS, and MQTT for pokes and reports
outbox      what is still to be told, on disk until the broker has it
reports, stages, counters    what a report says
delivery    which report has arrived
"""
