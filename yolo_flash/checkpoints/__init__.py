"""Checkpoints of YOLOv12's authors in Ultralytics' layout and back, read without running what they hold."""
