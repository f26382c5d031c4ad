"""Between this device and its fleet server: how it joined, and what is said between them.

enrol       joining
renewal     a new certificate before the old one ends, by either way
link        MQTT, for pokes and reports
outbox      what is still to be told, on disk until the broker has it
reports, stages, counters    what a report says
deliveries  which report has arrived
takeovers   whether another device uses this identity
"""
