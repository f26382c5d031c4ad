"""The operators' REST API, the page, and the two routes by which a device joins: a module for each subject, `app` for all of
them.
"""
