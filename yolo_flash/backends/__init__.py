"""Every way to compute one attention problem, and what each cannot do."""
