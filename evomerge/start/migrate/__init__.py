"""From a search of mergekit-evolve or mergenetic to a configuration with the nearest meaning.

migrate.py          `migrate`: reads a file, writes a configuration
draft.py            the configuration while it is written: lines, comments, problems
mergekit_evolve.py  what a file of mergekit-evolve means here
mergenetic.py       what a file of mergenetic means here
"""
