"""Lets code that imports `segment_anything` run on sam_fast unchanged."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_OFFICIAL = "segment_anything"
_OURS = "sam_fast"
_PUBLISHED_MODULES = (
    "",
    ".build_sam",
    ".predictor",
    ".automatic_mask_generator",
    ".modeling",
    ".modeling.common",
    ".modeling.sam",
    ".modeling.image_encoder",
    ".modeling.mask_decoder",
    ".modeling.prompt_encoder",
    ".modeling.transformer",
    ".utils",
    ".utils.amg",
    ".utils.transforms",
    ".utils.onnx",
)
_RENAMED = {"sam_fast.modeling.common": "sam_fast.modeling.layers"}


def _our_name(official_name: str) -> str:
    name = _OURS + official_name[len(_OFFICIAL) :]
    return _RENAMED.get(name, name)


class _Alias(MetaPathFinder, Loader):
    """Resolves `segment_anything.x` to the very module object of `sam_fast.x`.

    A finder, rather than entries in `sys.modules` alone: without it, importing a submodule that nobody registered would
    search the `__path__` of sam_fast and execute the file a second time under the other name, with classes of its own.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _OFFICIAL and not fullname.startswith(_OFFICIAL + "."):
            return None
        return ModuleSpec(fullname, self) if importlib.util.find_spec(_our_name(fullname)) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(_our_name(spec.name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just written the alias's spec into the module, which was executed long before.
        alias_spec = module.__spec__
        if alias_spec is not None and alias_spec.loader is self:
            module.__spec__ = alias_spec.loader_state


def install_as_segment_anything() -> None:
    """Make `import segment_anything` and its submodules mean sam_fast in this process.

    Call it once, before the code that imports `segment_anything`; further calls change nothing. A `segment_anything`
    that is installed is hidden by it.

    Raises:
        RuntimeError: the other `segment_anything` is imported already, and code that did so holds its classes.
    """
    imported = sys.modules.get(_OFFICIAL)
    if imported is not None and imported is not sys.modules[_OURS]:
        raise RuntimeError(
            f"segment_anything is imported already, from {getattr(imported, '__file__', None) or 'somewhere else'}; "
            "call sam_fast.install_as_segment_anything() before anything imports it"
        )
    if not any(isinstance(finder, _Alias) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Alias())
    for suffix in _PUBLISHED_MODULES:
        # Not by the import system, which would put the module build_sam where sam_fast has the function of that name.
        name = _OFFICIAL + suffix
        module = sys.modules[name] = importlib.import_module(_our_name(name))
        parent, _, child = name.rpartition(".")
        if parent and not hasattr(sys.modules[parent], child):
            setattr(sys.modules[parent], child, module)
