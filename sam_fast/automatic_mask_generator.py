"""SamAutomaticMaskGenerator: masks for everything in an image.

The way of the data: crops -> per crop `_process_crop` {encode, `_candidates` (decode in batches, filter), NMS} -> NMS
between crops -> `_finish` {bits, small regions, the form that records have} -> host -> records. Filters run in an order
that keeps full-size work for the masks that are returned; each filter looks at one mask alone and NMS sees the same
set, so the records equal those of the official order.

On a GPU all of it stays there until the end, when one copy brings what records need. The host waits for that copy, and
before it for numbers that say how large tensors are: per batch of points those of the masks above the IoU threshold and
of the candidates among them, per crop that of the candidates which NMS leaves; with several crops, how many of these
remain in each; with RLE or `min_mask_region_area`, the length of the codes; with the latter, how many masks remain.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from sam_fast.embedding import ImageEmbedding
from sam_fast.modeling import Sam
from sam_fast.ops.nms import nms
from sam_fast.ops.rle import decode_rle, encode_runs, measure_runs, split_runs
from sam_fast.predictor import SamPredictor
from sam_fast.preprocess import ImageLike, read_image
from sam_fast.runtime.inference import Frame, Prompts
from sam_fast.runtime.streams import Download, upload
from sam_fast.survivors import Cleaned, Crop, MaskLogits, Segmentations, clean
from sam_fast.utils.amg import (
    MaskData,
    box_xyxy_to_xywh,
    build_all_layer_point_grids,
    generate_crop_boxes,
    is_box_near_crop_edge,
    uncrop_boxes_xyxy,
    uncrop_points,
)

_OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")
# Masks whose bits at full size exist at a time: memory is bounded by it, not by the number of masks found.
_FULL_SIZE_BATCH = {"cpu": 32, "cuda": 256}
# Points whose masks are judged together at least, whatever points_per_batch says: the host waits for each batch, and
# while it waits a GPU has nothing to do. Few of them go through the decoder at a time.
_FEWEST_POINTS = {"cuda": 1024}


class SamAutomaticMaskGenerator:
    """Prompt a grid of points over an image and its crops, keep the good masks, drop the duplicates.

    The interface and the results are those of `segment_anything.SamAutomaticMaskGenerator`.
    """

    def __init__(
        self,
        model: Sam,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: list[np.ndarray] | None = None,
        min_mask_region_area: int = 0,
        output_mode: str = "binary_mask",
        *,
        precision: str = "auto",
        backend: str = "auto",
    ) -> None:
        """
        Args:
            model: the Sam to run.
            points_per_side: side of the grid of point prompts; exclusive with `point_grids`.
            points_per_batch: prompts decoded together. On a GPU at least 1024 are taken, or fewer when memory runs out.
            pred_iou_thresh: keep masks whose predicted IoU is above it; 0 or less keeps all.
            stability_score_thresh: keep masks whose stability score reaches it; 0 or less keeps all.
            stability_score_offset: shift of the threshold, in logits, with which stability is measured.
            box_nms_thresh: box IoU above which the mask of lower predicted IoU is a duplicate.
            crop_n_layers: also run on 2^i x 2^i crops of the image for i up to it.
            crop_nms_thresh: the same threshold between masks of different crops.
            crop_overlap_ratio: overlap of the crops of layer 1, as a fraction of the image's shorter side.
            crop_n_points_downscale_factor: the grid of layer i has points_per_side / factor^i points a side.
            point_grids: one array [K, 2] of points in [0, 1]^2 per layer, instead of `points_per_side`.
            min_mask_region_area: fill holes and remove islands smaller than this, in pixels.
            output_mode: form of `segmentation`: binary_mask, uncompressed_rle or coco_rle.
            precision, backend: see `SamPredictor`.

        Raises:
            ValueError: not exactly one of the two grids is given, output_mode is unknown, or a number is out of range.
        """
        if (points_per_side is None) == (point_grids is None):
            raise ValueError("Exactly one of points_per_side or point_grids must be provided.")
        if output_mode not in _OUTPUT_MODES:
            raise ValueError(f"output_mode must be one of {', '.join(_OUTPUT_MODES)}, got {output_mode!r}")
        if points_per_batch < 1:
            raise ValueError(f"points_per_batch must be positive, got {points_per_batch}")
        if not 0 <= crop_overlap_ratio <= 1:
            raise ValueError(f"crop_overlap_ratio must be from 0 to 1, got {crop_overlap_ratio}")
        thresholds = {
            "pred_iou_thresh": pred_iou_thresh,
            "stability_score_thresh": stability_score_thresh,
            "stability_score_offset": stability_score_offset,
            "box_nms_thresh": box_nms_thresh,
            "crop_nms_thresh": crop_nms_thresh,
        }
        for name, value in thresholds.items():
            if math.isnan(value):  # above which nothing is, or everything, as it happens
                raise ValueError(f"{name} must be a number, got {value}")
        if points_per_side is not None:
            point_grids = build_all_layer_point_grids(points_per_side, crop_n_layers, crop_n_points_downscale_factor)
        assert point_grids is not None
        if len(point_grids) <= crop_n_layers:
            raise ValueError(
                f"crop_n_layers={crop_n_layers} needs {crop_n_layers + 1} point_grids, got {len(point_grids)}"
            )

        self.point_grids = point_grids
        self.predictor = SamPredictor(model, precision=precision, backend=backend)
        self.points_per_batch = points_per_batch
        self.pred_iou_thresh = pred_iou_thresh
        self.stability_score_thresh = stability_score_thresh
        self.stability_score_offset = stability_score_offset
        self.box_nms_thresh = box_nms_thresh
        self.crop_n_layers = crop_n_layers
        self.crop_nms_thresh = crop_nms_thresh
        self.crop_overlap_ratio = crop_overlap_ratio
        self.crop_n_points_downscale_factor = crop_n_points_downscale_factor
        self.min_mask_region_area = min_mask_region_area
        self.output_mode = output_mode

    def generate(self, image: ImageLike) -> list[dict[str, Any]]:
        """Generate masks for an image.

        Args:
            image: uint8 RGB array [H, W, 3], or anything else that `SamPredictor.set_image` takes.

        Returns:
            Records, best first within a crop: `segmentation` (bool [H, W] or an RLE dict), `area` (int, pixels),
            `bbox` (XYWH, ints), `predicted_iou`, `point_coords` ([[x, y]], the prompt), `stability_score`,
            `crop_box` (XYWH).
        """
        return self.begin(image)()

    def begin(self, image: ImageLike) -> Callable[[], list[dict[str, Any]]]:
        """Begin to generate masks, and return what waits for them: `begin(image)()` is `generate(image)`.

        What is returned may be called later, in any thread. On a GPU the records' masks are then still packed bits on
        their way to the host, so that the next image can be begun, and keep the GPU busy, before they are unpacked. On
        a CPU they are finished.
        """
        image = read_image(image)
        return self._finish(*self._generate_masks(image), image.shape[:2])

    def generate_batch(self, images: Sequence[ImageLike]) -> list[list[dict[str, Any]]]:
        """Generate masks for several images; entry i is what `generate(images[i])` returns.

        Of an image the host makes the records while a GPU works on the next one.
        """
        if getattr(self.generate, "__func__", None) is not _GENERATE:  # somebody's own
            return [self.generate(image) for image in images]
        finished: list[list[dict[str, Any]]] = []
        coming: Future[list[dict[str, Any]]] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="records") as pool:
            for image in images:
                finish = self.begin(image)
                if coming is not None:
                    finished.append(coming.result())
                coming = pool.submit(finish)
        return finished if coming is None else [*finished, coming.result()]

    # -- image -> masks that are kept

    def _generate_masks(self, image: np.ndarray) -> tuple[MaskData, MaskLogits]:
        """What is known about the masks, `place` among it, the row in which each one's logits are."""
        size = image.shape[:2]
        crop_boxes, layers = generate_crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio)
        data, logits = MaskData(), MaskLogits()
        for crop_box, layer in zip(crop_boxes, layers, strict=True):
            found, logits_of_found = self._process_crop(image, crop_box, layer)
            found["place"] = found["place"] + len(logits)
            data.cat(found)
            logits.extend(logits_of_found)
        if len(crop_boxes) > 1 and len(logits) > 0:
            # Masks of small crops are the finer ones: prefer them.
            crops = data["crop_boxes"].float()
            scores = 1 / ((crops[:, 2] - crops[:, 0]) * (crops[:, 3] - crops[:, 1]))
            data.filter(self._nms(data["boxes"], scores, self.crop_nms_thresh))
            data["place"] = logits.keep(data["place"])
        return data, logits

    def _process_crop(self, image: np.ndarray, crop_box: list[int], layer: int) -> tuple[MaskData, MaskLogits]:
        """Masks of one crop, duplicates removed, in the frame of the whole image."""
        x0, y0, x1, y1 = crop_box
        height, width = image.shape[:2]
        pixels = image if (x1 - x0, y1 - y0) == (width, height) else np.ascontiguousarray(image[y0:y1, x0:x1])
        device = self.predictor.device
        grid = self.point_grids[layer] * np.array([[x1 - x0, y1 - y0]])
        points = upload(grid, device)
        coords = upload(self.predictor.transform.apply_coords(grid, pixels.shape[:2]), device)
        edges = upload([crop_box, [0, 0, width, height]], device)

        embedding = self.predictor.encode_images([pixels])[0]
        crop = Crop((x0, y0, x1, y1), Frame(embedding.original_size, embedding.input_size, embedding.image_size))
        data, logits = _no_candidates(device), MaskLogits()
        for found, low_res, rows in self._in_batches(embedding, points, coords, edges):
            logits.add(crop, low_res, rows)
            data.cat(found)
        keep = self._nms(data["boxes"], data["iou_preds"], self.box_nms_thresh)
        data.filter(keep)
        data["place"] = logits.keep(keep)
        data["boxes"] = uncrop_boxes_xyxy(data["boxes"], edges[0])
        data["points"] = uncrop_points(data["points"], edges[0])
        data["crop_boxes"] = edges[0].expand(len(keep), 4)
        return data, logits

    def _in_batches(
        self, embedding: ImageEmbedding, points: torch.Tensor, coords: torch.Tensor, edges: torch.Tensor
    ) -> Iterator[tuple[MaskData, torch.Tensor, torch.Tensor | None]]:
        """`_candidates` of batch after batch; where memory runs out, of smaller batches from then on."""
        most = max(self.points_per_batch, _FEWEST_POINTS.get(embedding.device.type, 1))
        start, count = 0, most
        while start < len(points):
            some = slice(start, start + count)
            try:
                candidates = self._candidates(embedding, points[some], coords[some], edges, alone=count >= len(points))
            except torch.OutOfMemoryError:
                if count == 1:
                    raise
                if count == most:
                    warnings.warn(f"out of memory with points_per_batch={count}; going on with less", stacklevel=2)
                count //= 2
                continue
            yield candidates
            del candidates
            start += count

    def _candidates(
        self, embedding: ImageEmbedding, points: torch.Tensor, coords: torch.Tensor, edges: torch.Tensor, alone: bool
    ) -> tuple[MaskData, torch.Tensor, torch.Tensor | None]:
        """Decode one prompt per point and keep the masks that pass every filter of their own.

        Args:
            embedding: of the crop.
            points: [N, 2] float64, XY, pixels of the crop.
            coords: [N, 2] float64, the same in the frame of the model's input.
            edges: [2, 4] int64, XYXY, boxes of the crop and of the image.
            alone: there are no other points, for which candidates must wait and should take no more than they need.

        Returns:
            what is known of K masks, and their logits; where they are alone, of others, too, and the rows of theirs.
        """
        labels = torch.ones(len(points), 1, dtype=torch.int, device=points.device)
        threshold = self.pred_iou_thresh if self.pred_iou_thresh > 0.0 else None
        low_res, iou, prompt = self.predictor.runtime.decode_filtered(
            embedding, Prompts(coords[:, None, :], labels), threshold
        )
        measured = self.predictor.runtime.postprocess(
            embedding, low_res, stability_offset=self.stability_score_offset, return_bits=False
        )
        keep = ~is_box_near_crop_edge(measured.boxes, edges[0], edges[1])
        if self.stability_score_thresh > 0.0:
            keep &= measured.stability_score >= self.stability_score_thresh
        rows = keep.nonzero()[:, 0]
        data = MaskData(
            iou_preds=iou,
            points=points[prompt],
            stability_score=measured.stability_score,
            boxes=measured.boxes,
            area=measured.area,
        )
        data.filter(rows)
        return (data, low_res, rows) if alone else (data, low_res[rows], None)

    def _nms(self, boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
        return nms(boxes.float(), scores, threshold, backend=self._backend)

    @property
    def _backend(self) -> str:
        return self.predictor.runtime.backend

    @staticmethod
    def postprocess_small_regions(mask_data: MaskData, min_area: int, nms_thresh: float) -> MaskData:
        """Remove small islands and holes from masks, then duplicates that this made; edits `mask_data` in place.

        Args:
            mask_data: with `rles` and `boxes` [N, 4] XYXY, and any other fields.
            min_area: regions smaller than this, in pixels, go.
            nms_thresh: box IoU above which one of two masks goes, a changed one rather than an unchanged one.
        """
        rles = list(mask_data["rles"])
        if not rles:
            return mask_data
        boxes = mask_data["boxes"]
        boxes = boxes.clone() if isinstance(boxes, torch.Tensor) else torch.tensor(boxes, device="cpu")
        unchanged = torch.ones(len(rles), dtype=torch.float32, device="cpu")
        for start in range(0, len(rles), _FULL_SIZE_BATCH["cpu"]):
            chunk = rles[start : start + _FULL_SIZE_BATCH["cpu"]]
            height, width = chunk[0]["size"]
            bits, changed = clean(decode_rle(chunk), width, min_area)
            rows = changed.nonzero()[:, 0]
            runs = encode_runs(bits[rows], width)
            unchanged[rows + start] = 0.0
            boxes[(rows + start).to(boxes.device)] = measure_runs(*runs, height)[1].to(boxes)
            for i, rle in zip((rows + start).tolist(), split_runs(*runs, (height, width)), strict=True):
                rles[i] = rle
        mask_data["rles"] = rles
        mask_data["boxes"] = boxes
        mask_data.filter(nms(boxes.float().cpu(), unchanged, nms_thresh))
        return mask_data

    # -- masks that are kept -> records

    def _finish(self, data: MaskData, logits: MaskLogits, size: tuple[int, ...]) -> Callable[[], list[dict[str, Any]]]:
        """Send what records need on its way to the host, and return what waits for it and makes the records."""
        download = Download(self.predictor.device)
        masks = Segmentations(self.output_mode, (size[0], size[1]), download, self._backend)
        cleaned = self._segment(logits, masks)
        if cleaned is not None:
            self._update(data, Cleaned(*(column[data["place"]] for column in cleaned)))

        records: list[dict[str, Any]] = []

        def receive(*fields: torch.Tensor) -> None:
            for place, area, box, iou, point, stability, crop_box in zip(*(f.tolist() for f in fields), strict=True):
                records.append(
                    {
                        "segmentation": masks.finished[place],
                        "area": area,
                        "bbox": box,
                        "predicted_iou": iou,
                        "point_coords": [point],
                        "stability_score": stability,
                        "crop_box": crop_box,
                    }
                )

        for name in ("boxes", "crop_boxes"):
            data[name] = box_xyxy_to_xywh(data[name])
        fields = ("place", "area", "boxes", "iou_preds", "points", "stability_score", "crop_boxes")
        download.add([data[name] for name in fields], receive)
        download.start()

        def finish() -> list[dict[str, Any]]:
            download.finish()
            return records

        return finish

    def _segment(self, logits: MaskLogits, masks: Segmentations) -> Cleaned | None:
        """Make masks of logits, a few at a time; returns what the removal of small regions did, if it is wanted."""
        cleaned = []
        for crop, some in logits.take(_FULL_SIZE_BATCH.get(self.predictor.device.type, 32)):
            bits = self.predictor.runtime.postprocess(crop.frame, some).bits
            assert bits is not None
            if self.min_mask_region_area > 0:
                cleaned.append(masks.add_cleaned(bits, crop, self.min_mask_region_area))
            else:
                masks.add(bits, crop)
        return Cleaned(*(torch.cat(column) for column in zip(*cleaned, strict=True))) if cleaned else None

    def _update(self, data: MaskData, cleaned: Cleaned) -> None:
        """Take over what small regions changed, and remove duplicates that this made; changed masks go first."""
        data["area"] = cleaned.areas
        data["boxes"] = torch.where(cleaned.changed[:, None], cleaned.boxes, data["boxes"])
        threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
        data.filter(self._nms(data["boxes"], (~cleaned.changed).float(), threshold))


_GENERATE = SamAutomaticMaskGenerator.generate


def _no_candidates(device: torch.device) -> MaskData:
    return MaskData(
        iou_preds=torch.zeros(0, dtype=torch.float32, device=device),
        points=torch.zeros(0, 2, dtype=torch.float64, device=device),
        stability_score=torch.zeros(0, dtype=torch.float32, device=device),
        boxes=torch.zeros(0, 4, dtype=torch.int64, device=device),
        area=torch.zeros(0, dtype=torch.int64, device=device),
    )
