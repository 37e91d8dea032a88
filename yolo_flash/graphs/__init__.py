"""CUDA graphs of a training step and of a prediction, for any model of Ultralytics."""
