"""Measuring for the reader: stock against ours, in fresh processes."""
