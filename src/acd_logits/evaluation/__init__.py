"""Measuring what a prompt pair does: refusals of harmful requests, and of harmless ones."""
