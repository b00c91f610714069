"""Vocabularies that come with the package; build.py makes them, git ignores them."""
