"""Suites: what a model is asked or scored on, each one file behind one small protocol (`protocol.py`)."""
