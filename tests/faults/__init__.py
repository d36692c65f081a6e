"""The fault suite: networks, clients, views and signals that misbehave, on real servers.

README.rst has the table of all scenarios, and says which test proves each.
"""
