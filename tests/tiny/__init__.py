"""Pipelines of real classes with random weights, in the layout of the Hub, for the tests."""
