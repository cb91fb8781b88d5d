"""From what a user writes after `--data` to a source of samples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam_fast.data.combine import ConcatSource, first_samples, training_samples, validation_samples
from sam_fast.data.sample import SampleSource

DATA_FORMS = """\
  scenes                      procedural scenes; scenes:held-out, scenes:seed=3,size=512,length=1000
  photos                      the package's own photos with outlined objects
  FOLDER                      SA-1B: sa_1.jpg with sa_1.json beside it, in folders of any depth
  FOLDER                      images/cup.jpg with the label map masks/cup.png or the masks masks/cup/*.png
  ANNOTATIONS.json:FOLDER     COCO instances and the folder of their images
  ANNOTATIONS.json            the same, with the images in a usual place beside the file
each followed by #options if wanted: first=N, train=0.9, validation=0.1, upright, ignore=255"""

_SCENE_OPTIONS = {"seed": int, "size": int, "length": int}


def open_sources(specs: Sequence[str]) -> SampleSource:
    """The source of one or several specs (see `open_source`), one behind the other; a spec may occur repeatedly."""
    if not specs:
        raise ValueError(f"no data given; accepted are\n{DATA_FORMS}")
    sources = [open_source(spec) for spec in specs]
    return sources[0] if len(sources) == 1 else ConcatSource(sources)


def open_source(spec: str) -> SampleSource:
    """Open a source of samples by its spec.

    `DATA_FORMS` lists the forms. Options after a `#`, separated by commas: `first=N` takes the first N samples,
    `validation=S` and `train=S` a share by a hash of the names (disjoint when the shares add up to 1), in the order
    written; `upright` is for annotations that belong to images turned by their EXIF orientation; `ignore=V` is a value
    of label maps that is no object, and may be repeated. A name with a `#` in it works if it exists.

    Args:
        spec: e.g. "scenes:held-out", "photos", "sa1b/", "instances_val2017.json:val2017#first=500".

    Raises:
        ValueError: no accepted form, an unknown option, malformed data, or no sample left.
        FileNotFoundError: a file or folder that the spec names does not exist.
    """
    place, _, options = spec.rpartition("#") if "#" in spec and not _exists(spec) else (spec, "", "")
    selections: list[tuple[str, str]] = []
    ignore: list[int] = []
    upright = False
    for option in filter(None, options.split(",")):
        name, value = _divide(option, "=")
        if name in ("first", "train", "validation"):
            selections.append((name, value))
        elif name == "ignore":
            ignore.append(_number(int, value, option, spec))
        elif option == "upright":
            upright = True
        else:
            raise ValueError(f"unknown option {option!r} in {spec!r}; accepted are\n{DATA_FORMS}")
    source = _open_place(place, spec, ignore, upright)
    for name, value in selections:
        if name == "first":
            source = first_samples(source, _number(int, value, name, spec))
        else:
            select = training_samples if name == "train" else validation_samples
            source = select(source, _number(float, value, name, spec))
    if not len(source):
        raise ValueError(f"{spec!r} leaves no samples")
    return source


def _open_place(place: str, spec: str, ignore: list[int], upright: bool) -> SampleSource:
    """The source of a spec without its options."""
    from sam_fast.data.coco import CocoSource
    from sam_fast.data.folder import MaskFolderSource
    from sam_fast.data.sa1b import Sa1bSource

    if not place:
        raise ValueError(f"no data at {spec!r}; accepted are\n{DATA_FORMS}")
    path = Path(place)
    is_mask_folder = (path / "images").is_dir() and (path / "masks").is_dir()
    if ignore and not is_mask_folder:
        raise ValueError(f"the option ignore in {spec!r} applies to folders of label maps only")
    name, details = _divide(place, ":")
    if name in ("scenes", "photos") and upright:
        raise ValueError(f"the option upright in {spec!r} applies to files only")
    if name == "scenes":
        return _open_scenes(details, spec)
    if place == "photos":
        photos = Path(__file__).parents[1] / "assets" / "photos"
        return CocoSource(photos / "objects.json", photos)
    if is_mask_folder:
        return MaskFolderSource(path, ignore=ignore, upright=upright)
    if path.is_dir():
        try:
            return Sa1bSource(path, upright=upright)
        except ValueError as error:
            raise ValueError(f"{error}; accepted are\n{DATA_FORMS}") from error
    annotations, images = _divide_pair(place)
    if annotations.endswith(".json"):
        if not os.path.exists(annotations):
            raise FileNotFoundError(f"no such file: {annotations}")
        return CocoSource(annotations, images or None, upright=upright)
    raise ValueError(f"no data at {spec!r}; accepted are\n{DATA_FORMS}")


def _open_scenes(details: str, spec: str) -> SampleSource:
    """Procedural scenes by "held-out,seed=3,..."."""
    from sam_fast.data.scenes import SceneSource

    arguments: dict[str, int] = {}
    held_out = False
    for option in filter(None, details.split(",")):
        name, value = _divide(option, "=")
        if option == "held-out":
            held_out = True
        elif name in _SCENE_OPTIONS:
            arguments[name] = _number(int, value, option, spec)
        else:
            raise ValueError(f"unknown option {option!r} of scenes in {spec!r}; accepted are\n{DATA_FORMS}")
    return SceneSource(held_out=held_out, **arguments)


def _exists(place: str) -> bool:
    """Whether there is such a file or folder, or both of annotations.json:images."""
    annotations, images = _divide_pair(place)
    return Path(annotations).exists() and (not images or Path(images).exists())


def _divide_pair(place: str) -> tuple[str, str]:
    """annotations.json:images as two paths; either may hold colons."""
    if Path(place).exists():
        return place, ""
    at = place.find(".json:")
    return (place, "") if at < 0 else (place[: at + len(".json")], place[at + len(".json:") :])


def _divide(text: str, separator: str) -> tuple[str, str]:
    """What is before the first separator and what is behind it."""
    before, _, after = text.partition(separator)
    return before, after


def _number(kind: type, value: str, option: str, spec: str) -> Any:
    """`value` as an int or float."""
    try:
        return kind(value)
    except ValueError as error:
        raise ValueError(f"{option!r} in {spec!r} needs a number; accepted are\n{DATA_FORMS}") from error
