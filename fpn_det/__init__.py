"""Two-stage object detection: Faster R-CNN on a Feature Pyramid Network."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fpn_det.detector import Detector, Prediction

__all__ = ["Detector", "Prediction"]


def __getattr__(name: str) -> Any:
    """Import what users take from here when they do: it needs torch, and every module of the package passes here."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fpn_det import detector

    return getattr(detector, name)
