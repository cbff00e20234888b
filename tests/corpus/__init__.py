"""Statements that nobody here wrote, from any directory of .sql and .test files, through the relay.

``python -m tests.corpus DIRECTORY`` runs them on a master, relays them to staging and a replica, and compares the
three.
"""
