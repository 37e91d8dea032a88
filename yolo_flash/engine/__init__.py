"""The seam into ultralytics.engine: trainer, model, predictor, and what a run tells."""
