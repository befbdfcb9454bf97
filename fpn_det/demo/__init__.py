"""A local page that shows what a detector finds in an image."""
