"""Inspect (inspect_ai): the provider `acd` that answers, the tasks that ask and the scorers that judge."""
