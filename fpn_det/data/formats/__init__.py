"""Data sets of other formats: `voc`, `yolo`, `csv_file` and `labelme` read them, `yolo` writes one.

Readers give `labels.LabelledData`, which becomes COCO-format files; `records` and `split` work on such files.
"""
