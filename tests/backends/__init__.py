"""Tests of yolo_flash.backends."""
