"""What comes before the first step: the problems of a run, trials of their backends, the memory they need."""
