"""The detector and its stages."""
