"""Two-stage object detection: Faster R-CNN on a Feature Pyramid Network."""
