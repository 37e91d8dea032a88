"""The proof: ours against stock and float64."""
