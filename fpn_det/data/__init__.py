"""From COCO-format files to batches on the device."""
