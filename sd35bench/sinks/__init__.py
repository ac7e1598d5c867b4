"""Experiment trackers that a study's summary is sent to: `base.py`, and a module for each."""
