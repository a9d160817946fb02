"""Configurations of other tools as ours. Pure: text in, text and findings out; files and PATH are the caller's."""
