"""Download COCO 2017, verify and unpack it.

    python tools/download_coco.py                                  # validation images and annotations: 1.1 GB to come
    python tools/download_coco.py --parts train val annotations    # all that training needs: 20.4 GB to come
        [--output data/coco] [--keep-zips] [--mirror URL]

Lays out data/coco/{train2017,val2017}/*.jpg and data/coco/annotations/instances_{train,val}2017.json, as the configs
have it. Run it again after an interruption of any kind: it goes on where it was, and says so when nothing is missing.

Comes over HTTPS from COCO's own server. Every archive must have the known SHA-256, so a mirror (--mirror: an https://
address with the same zips/ and annotations/ below) need not be trusted; an archive that you have is used if you put it
into the output folder. Archives are deleted once they are unpacked (--keep-zips: not), which for train2017 needs 40 GB
at the worst moment and 20 GB afterwards. Captions and keypoints are not unpacked.

At the end the annotations and the names of the images are read as for training. tools/check_data.py decodes every
image.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fpn_det.cli import say, user_errors
from fpn_det.config import dump_yaml
from fpn_det.data.coco import load_coco
from fpn_det.data.coco2017 import ARCHIVES, SERVER, check_room, get_archive
from fpn_det.structures import InputError

DEFAULT_OUTPUT = Path("data/coco")


def main() -> None:
    """Read the command line and download."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=list(ARCHIVES), default=["val", "annotations"], help="what to get"
    )
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder of the data set")
    parser.add_argument("--keep-zips", action="store_true", help="do not delete the archives")
    parser.add_argument("--mirror", metavar="URL", default=SERVER, help="another server (https) with the same files")
    args = parser.parse_args()
    with user_errors():
        run(args.parts, args.output, server=args.mirror, keep_zips=args.keep_zips)


def run(parts: list[str], folder: Path, *, server: str, keep_zips: bool) -> None:
    """Get what is missing of `parts`, smallest first, and say what `folder` then holds."""
    wanted = sorted((ARCHIVES[part] for part in set(parts)), key=lambda archive: archive.num_bytes)
    missing = [archive for archive in wanted if not archive.is_complete_in(folder)]
    check_room(missing, folder, keep_zips=keep_zips)
    for archive in missing:
        get_archive(archive, folder, server=server, keep_zip=keep_zips)
    for archive in wanted:
        say(f"complete: {folder / archive.pattern} ({archive.num_files_in(folder):,} files)")
        if not keep_zips and (folder / archive.name).exists():  # of an earlier run that was killed, or kept it
            say(f"  {folder / archive.name} is not needed any more")
    has_annotations = ARCHIVES["annotations"].is_complete_in(folder)
    usable = [split for split in ("train", "val") if has_annotations and ARCHIVES[split].is_complete_in(folder)]
    for split in usable:
        check_split(split, folder)
    say(next_step(usable, folder))


def split_paths(split: str, folder: Path) -> tuple[Path, Path]:
    """Annotation file and image folder."""
    return folder / f"annotations/instances_{split}2017.json", folder / f"{split}2017"


def check_split(split: str, folder: Path) -> None:
    """Read a split as training does, and say what is in it.

    Raises:
        InputError: an image of the annotations is not there.
    """
    annotations, images = split_paths(split, folder)
    data = load_coco(annotations, images)
    say(data.summary())
    if data.num_images_lost:
        raise InputError(
            f"{images}: {data.num_images_lost:,} images of {annotations} are not there, though there are as many files "
            "as COCO has. Delete the folder, and this command will get it again"
        )


def next_step(usable: list[str], folder: Path) -> str:
    """What to do with the splits that are there."""
    if not usable:
        return "to train and evaluate, add --parts train val annotations; to evaluate, --parts val annotations"
    if "train" not in usable:
        lines = ["to train, add --parts train. To evaluate:"]
        command = "tools/eval.py --config configs/r50_fpn.yaml --checkpoint FILE.pth"
    elif "val" not in usable:
        return "to train, add --parts val, which is what training evaluates on"
    else:
        lines = ["to train:"]
        command = "tools/train.py --config configs/r50_fpn.yaml"
    lines.append(f"  python {command}")
    if folder != DEFAULT_OUTPUT:
        splits = {}
        for split in usable:
            annotations, images = split_paths(split, folder.absolute())
            splits[split] = {"images": str(images), "annotations": str(annotations)}
        lines += [
            "with these lines in the config, as the data is not in data/coco:",
            dump_yaml({"data": splits}).rstrip(),
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
