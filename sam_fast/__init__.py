"""The Segment Anything Model made fast: a drop-in replacement for `segment_anything`."""

__version__ = "0.1.0"
