"""The results of an evaluation, with all that is needed to repeat it, as JSON."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

FORMAT_VERSION = 1
_DIGITS = 5


@dataclass
class Results:
    """How one method did.

    Attributes:
        method: its name.
        method_settings: what its results depend on.
        protocol: settings of the evaluation, the data, and the number of images.
        digest: hash of the images and of the objects that were prompted; results of one digest can be compared.
        counts: number of images and of objects.
        summary: the figures of the table.
        objects: the values of each object; means of them are in the summary.
        seconds: time of each kind of prompts, the encoding of images included.
        provenance: date, versions, machine and command.
    """

    method: str
    method_settings: dict[str, Any]
    protocol: dict[str, Any]
    digest: str
    counts: dict[str, int]
    summary: dict[str, float]
    objects: list[dict[str, Any]]
    seconds: dict[str, float]
    provenance: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write the results as JSON: one line per object, numbers with 5 decimals, null for NaN."""
        document = _rounded({"format": FORMAT_VERSION, **asdict(self)})
        lines = [json.dumps(row, allow_nan=False) for row in document.pop("objects")]
        head = json.dumps(document, indent=1, allow_nan=False).removesuffix("\n}")
        Path(path).write_text(head + ',\n "objects": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds something else, or a format that this release does not know.
        """
        try:
            document = json.loads(Path(path).read_text())
            version = document.pop("format")
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} does not hold results of an evaluation ({error!r})") from error
        if version != FORMAT_VERSION or document.keys() != {field.name for field in fields(cls)}:
            raise ValueError(f"{path} has format {version} of results, this release reads {FORMAT_VERSION}")
        document["summary"] = {k: math.nan if v is None else v for k, v in document["summary"].items()}
        return cls(**document)

    def answers(self, method_settings: dict[str, Any], protocol: dict[str, Any]) -> bool:
        """Whether these are the results of a method and a protocol with those settings."""
        return (self.method_settings, self.protocol) == (_rounded(method_settings), _rounded(protocol))


def provenance(command: str) -> dict[str, Any]:
    """Where and when results are made, without anything that names the machine."""
    import sam_fast

    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "sam_fast": sam_fast.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DIGITS) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
