"""From a problem, a machine and what was measured there to the backend that runs."""
