"""Freezes a model and serves it: programs, the engines that run them, and bundles of both."""
