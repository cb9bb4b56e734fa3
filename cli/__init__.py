"""The command line: talks to people; people's text goes to stderr, one JSON document to stdout."""
