"""Helpers that know nothing of attention: times, numbers, memory, profiles, files, plots, errors."""
