"""Detect in an image with an exported detector. Needs numpy, Pillow and onnxruntime, and nothing of fpn_det.

python export_example.py model.onnx photo.jpg found.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

MIN_SCORE = 0.5


def main(model_path: str, image_path: str, output_path: str) -> None:
    session = onnxruntime.InferenceSession(model_path, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    names = [category["name"] for category in json.loads(metadata["categories"])]

    image = ImageOps.exif_transpose(Image.open(image_path)).convert("RGB")
    images = np.asarray(image).transpose(2, 0, 1)[None]  # (1, 3, H, W) uint8: resizing and the rest are in the file
    boxes, scores, labels = session.run(["boxes", "scores", "labels"], {"images": images})

    draw = ImageDraw.Draw(image)
    for box, score, label in zip(boxes[0].tolist(), scores[0].tolist(), labels[0].tolist(), strict=True):
        if score < MIN_SCORE:  # descending, and 0 where there are no more
            break
        draw.rectangle(box, outline="red", width=2)
        draw.text(box[:2], f"{names[label]} {score:.2f}", fill="white", stroke_width=1, stroke_fill="black")
        print(names[label], f"{score:.4f}", *(f"{value:.2f}" for value in box))
    image.save(output_path)


if __name__ == "__main__":
    main(*sys.argv[1:4])
