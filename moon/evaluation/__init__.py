"""Metrics, out-of-distribution evaluation and the report page."""
