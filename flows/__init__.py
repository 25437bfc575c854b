"""Prefect flows: `full` makes, judges and promotes candidates; `promote` lets a person promote a version."""
