"""Prefect flows: a handful of tasks, each one library call."""
