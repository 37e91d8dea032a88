"""Models and data where nothing can be downloaded."""
