"""Survivors of automatic generation, and the generator on a GPU that is emulated from the logits on."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from copies import Copies
from cuda_emulation.build import emulated_module
from pycocotools import mask as coco
from records import assert_same_records
from torch.utils._python_dispatch import TorchDispatchMode

from sam_fast import SamAutomaticMaskGenerator, native
from sam_fast.ops.packed_masks import pack_masks
from sam_fast.runtime import streams
from sam_fast.runtime.inference import Frame
from sam_fast.runtime.streams import Download
from sam_fast.survivors import Crop, MaskLogits, Segmentations
from sam_fast.utils.amg import rle_to_mask

FRAME = Frame((4, 6), (4, 6), 8)
CROPS = [Crop((0, 0, 6, 4), FRAME), Crop((1, 0, 6, 3), FRAME)]
MODES = ["binary_mask", "uncompressed_rle", "coco_rle"]
LOOSE = {"points_per_side": 3, "pred_iou_thresh": 0.5, "stability_score_thresh": 0.2, "box_nms_thresh": 0.9}
SETTINGS = {
    "plain": {},
    "small regions": {"min_mask_region_area": 60},
    "crops": {"crop_n_layers": 1},
    "small regions in crops": {"crop_n_layers": 1, "min_mask_region_area": 60},
}


def numbered(first: int, count: int) -> torch.Tensor:
    """Logits that say which row they are."""
    return torch.arange(first, first + count).float()[:, None, None].expand(-1, 2, 2).clone()


@pytest.mark.parametrize("sizes", [(5,), (3, 0, 4), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_rows_are_found_again(sizes, share):
    logits, total = MaskLogits(), sum(sizes)
    for i, size in enumerate(sizes):
        logits.add(CROPS[i // 2], numbered(len(logits), size))
    rows = torch.randperm(total, generator=torch.Generator().manual_seed(0))[: round(share * total)]
    with Copies(2, 2) as copies:
        places = logits.keep(rows)
    assert copies.nbytes == 16 * len(rows)  # each of them once
    assert len(logits) == len(rows)
    taken = list(logits.take(2))
    assert all(0 < len(some) <= 2 for _, some in taken) and len(logits) == 0
    assert len({id(crop) for crop, _ in taken}) <= len(sizes)
    values = torch.cat([some[:, 0, 0] for _, some in taken]) if taken else torch.empty(0)
    assert torch.equal(values[places], rows.float())


@pytest.mark.parametrize("sizes", [(5,), (3, 0, 4), (2, 2)], ids=str)
def test_rows_that_are_not_meant_are_dropped(sizes):
    logits, meant = MaskLogits(), []
    for i, size in enumerate(sizes):
        rows = torch.arange(size)[1::2].flip(0)
        logits.add(CROPS[i // 2], numbered(10 * i, size), rows)
        meant.append(10 * i + rows)
        assert len(logits) == sum(map(len, meant))
    values = torch.cat(meant).float()
    rows = torch.arange(len(values)).flip(0)[:-1]
    with Copies(2, 2) as copies:
        places = logits.keep(rows)
    # Those of the last part alone, or, of several, of those that are meant once more.
    assert copies.nbytes == 16 * (len(rows) + (len(sizes) > 1) * len(meant[-1]))
    taken = torch.cat([some[:, 0, 0] for _, some in logits.take(2)])
    assert len(taken) == len(rows) and torch.equal(taken[places], values[rows])


def test_rows_of_another_that_are_not_meant_are_dropped():
    logits, other = MaskLogits(), MaskLogits()
    logits.add(CROPS[0], numbered(0, 3), torch.tensor([2]))
    other.add(CROPS[1], numbered(10, 3), torch.tensor([1, 0]))
    logits.extend(other)
    assert len(logits) == 3
    assert torch.cat([some[:, 0, 0] for _, some in logits.take(9)]).tolist() == [2, 11, 10]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cleaned", [False, True], ids=["as they are", "cleaned"])
def test_segmentations(mode, cleaned):
    """Of masks in crops; of a single pixel nothing is cleaned, as the largest island stays."""
    download = Download(torch.device("cpu"))
    done = Segmentations(mode, (4, 6), download, "auto")
    expected = []
    for crop in CROPS:
        x0, y0, x1, y1 = crop.box
        masks = torch.zeros(2, y1 - y0, x1 - x0, dtype=torch.bool)
        masks[0, -1, -1] = True
        expected += torch.nn.functional.pad(masks, (x0, 6 - x1, y0, 4 - y1)).numpy().astype(bool).tolist()
        if cleaned:
            result = done.add_cleaned(pack_masks(masks), crop, 2)
            assert result.areas.tolist() == [1, 0]
            assert result.boxes.tolist() == [[x1 - 1, y1 - 1, x1 - 1, y1 - 1], [0, 0, 0, 0]]
        else:
            done.add(pack_masks(masks), crop)
    download.finish()
    decode = {"binary_mask": np.asarray, "uncompressed_rle": rle_to_mask, "coco_rle": coco.decode}[mode]
    np.testing.assert_array_equal([decode(one) for one in done.finished], expected)


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.listening = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        waits = name in ("nonzero", "_local_scalar_dense", "masked_select", "unique_dim", "_unique2")
        if name in ("index", "index_put_", "index_put"):
            waits = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name == "repeat_interleave":
            waits = (kwargs or {}).get("output_size") is None
        if waits and self.listening:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def emulated(monkeypatch) -> Waits:
    """From the logits on, masks are on an emulated GPU, and packed for their way to the host."""
    module, cpu_module = emulated_module(), native.module()
    waits = Waits()

    class Both:
        def __getattr__(self, name):
            return getattr(module if hasattr(module, name) else cpu_module, name)

    monkeypatch.setattr(native, "module", Both)
    monkeypatch.setattr(native, "uses_cuda", lambda tensor: waits.listening)
    monkeypatch.setattr(native, "cuda_stream", lambda tensor: 0)
    start, finish, tolist = Download.__init__, Download.finish, torch.Tensor.tolist

    def begin(self, device):
        start(self, device)
        self._copies = True

    def end(self):
        waits.listening = False  # from here on everything is on the host
        finish(self)

    def watched(self):
        if waits.listening:
            waits.found.append("tolist")
        return tolist(self)

    monkeypatch.setattr(Download, "__init__", begin)
    monkeypatch.setattr(Download, "finish", end)
    monkeypatch.setattr(torch.Tensor, "tolist", watched)
    return waits


def generate(generator: SamAutomaticMaskGenerator, image: np.ndarray, waits: Waits, monkeypatch) -> list[dict]:
    """Generate, without counting what the model does."""
    runtime, predictor = generator.predictor.runtime, generator.predictor

    def on_cpu(function):
        def call(*args, **kwargs):
            waits.listening = False
            try:
                return function(*args, **kwargs)
            finally:
                waits.listening = True

        return call

    monkeypatch.setattr(runtime, "decode_filtered", on_cpu(runtime.decode_filtered))
    monkeypatch.setattr(predictor, "encode_images", on_cpu(predictor.encode_images))
    with waits:
        return generator.generate(image)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_emulated_gpu_waits_for_counts_and_one_copy(tiny, photo, settings, mode, emulated, monkeypatch):
    image, settings = np.ascontiguousarray(photo[60:110, 100:170]), {**LOOSE, **settings}
    emulated.listening = False
    expected = SamAutomaticMaskGenerator(tiny, **settings).generate(image)
    emulated.listening = True
    copies = []
    monkeypatch.setattr(streams, "_pack", lambda tensors, pack=streams._pack: copies.append(1) or pack(tensors))
    records = generate(SamAutomaticMaskGenerator(tiny, **settings, output_mode=mode), image, emulated, monkeypatch)
    decode = {"binary_mask": np.asarray, "uncompressed_rle": rle_to_mask, "coco_rle": coco.decode}[mode]
    for record in records:
        record["segmentation"] = decode(record["segmentation"]).astype(bool)
        assert record["area"] == record["segmentation"].sum()
    assert_same_records(records, expected)

    crops = 5 if settings.get("crop_n_layers") else 1
    # Per crop the candidates and what NMS leaves of them; between crops what NMS leaves, and how much of each crop.
    numbers = {"nonzero": crops, "_local_scalar_dense": crops, "tolist": 0}
    if crops > 1:
        numbers["_local_scalar_dense"] += 1
        numbers["tolist"] += 1
    coded = len({tuple(record["crop_box"]) for record in records})
    if mode != "binary_mask" or "min_mask_region_area" in settings:
        numbers["_local_scalar_dense"] += coded
    if "min_mask_region_area" in settings:
        numbers["_local_scalar_dense"] += 1
    assert {name: emulated.found.count(name) for name in numbers} == numbers and len(copies) == 1
    assert len(emulated.found) == sum(numbers.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MODES)
def test_gpu_waits_for_few_numbers(tiny, photo, mode):
    model = copy.deepcopy(tiny).cuda()
    generator = SamAutomaticMaskGenerator(model, **LOOSE, output_mode=mode)
    for _ in range(3):  # compile, record, replay
        generator.generate(photo)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            assert len(generator.generate(photo)) > 3
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in found if "synchroniz" in str(w.message)]
    assert len(waits) <= 6, [str(w.filename) + f":{w.lineno}" for w in waits]
