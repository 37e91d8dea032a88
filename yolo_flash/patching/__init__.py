"""Swap the class of an attention block for one of ours, and back."""
