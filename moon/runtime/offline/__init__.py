"""Deciding whole sources of images into a Parquet table, here or with Ray, and going on later."""

from moon.runtime.offline.score import Summary, score_source

__all__ = ["Summary", "score_source"]
