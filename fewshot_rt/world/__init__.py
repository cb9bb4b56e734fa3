"""A procedural world: textured scenes with objects, camera and light, in which events happen."""

from .clips import VOCABULARY, Clips, make_clips

__all__ = ["VOCABULARY", "Clips", "make_clips"]
