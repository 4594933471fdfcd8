"""The HTTP service: ``moon serve`` and what answers behind it.

Only `moon.serve.service` touches BentoML; the rest is plain ASGI around a Predictor.
"""
