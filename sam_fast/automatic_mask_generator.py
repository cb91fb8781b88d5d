"""SamAutomaticMaskGenerator: masks for everything in an image.

The way of the data: crops -> per crop `_process_crop` {encode, `_candidates` (decode in batches, filter), NMS, bits
and RLE of the survivors} -> NMS between crops -> small regions -> records. Filters run in an order that keeps
full-size work for the masks that are returned; each filter looks at one mask alone and NMS sees the same set, so the
records equal those of the official order.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from sam_fast.embedding import ImageEmbedding
from sam_fast.modeling import Sam
from sam_fast.ops.connected_components import remove_small_regions
from sam_fast.ops.nms import nms
from sam_fast.ops.rle import compress_counts, decode_rle, encode_rle, rle_box
from sam_fast.predictor import SamPredictor
from sam_fast.preprocess import ImageLike, read_image
from sam_fast.runtime.inference import Prompts
from sam_fast.utils.amg import (
    MaskData,
    area_from_rle,
    box_xyxy_to_xywh,
    build_all_layer_point_grids,
    generate_crop_boxes,
    is_box_near_crop_edge,
    rle_to_mask,
    uncrop_boxes_xyxy,
    uncrop_points,
)

_OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")
# Masks whose bits at full size exist at a time: memory is bounded by it, not by the number of masks found. Each batch
# is copied to the host by itself.
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
            ValueError: not exactly one of the two grids is given, or output_mode is unknown.
        """
        if (points_per_side is None) == (point_grids is None):
            raise ValueError("Exactly one of points_per_side or point_grids must be provided.")
        if output_mode not in _OUTPUT_MODES:
            raise ValueError(f"output_mode must be one of {', '.join(_OUTPUT_MODES)}, got {output_mode!r}")
        if points_per_batch < 1:
            raise ValueError(f"points_per_batch must be positive, got {points_per_batch}")
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
        return self._records(self._generate_masks(read_image(image)))

    def generate_batch(self, images: Sequence[ImageLike]) -> list[list[dict[str, Any]]]:
        """Generate masks for several images; entry i is what `generate(images[i])` returns."""
        return [self.generate(image) for image in images]

    # -- image -> data of the masks that are kept

    def _generate_masks(self, image: np.ndarray) -> MaskData:
        size = image.shape[:2]
        crop_boxes, layers = generate_crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio)
        data = MaskData()
        for crop_box, layer in zip(crop_boxes, layers, strict=True):
            data.cat(self._process_crop(image, crop_box, layer))
        if len(crop_boxes) > 1 and len(data["rles"]) > 0:
            # Masks of small crops are the finer ones: prefer them.
            crops = data["crop_boxes"].float()
            scores = 1 / ((crops[:, 2] - crops[:, 0]) * (crops[:, 3] - crops[:, 1]))
            data.filter(self._nms(data["boxes"], scores, self.crop_nms_thresh))
        if self.min_mask_region_area > 0:
            threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
            data = self.postprocess_small_regions(data, self.min_mask_region_area, threshold)
        data.to_numpy()
        return data

    def _process_crop(self, image: np.ndarray, crop_box: list[int], layer: int) -> MaskData:
        """Masks of one crop, duplicates removed, in the frame of the whole image."""
        x0, y0, x1, y1 = crop_box
        height, width = image.shape[:2]
        crop = image if (x1 - x0, y1 - y0) == (width, height) else np.ascontiguousarray(image[y0:y1, x0:x1])
        embedding = self.predictor.encode_images([crop])[0]
        points = self.point_grids[layer] * np.array([[x1 - x0, y1 - y0]])

        data = _no_candidates(embedding.device)
        low_res = []
        for found, logits in self._in_batches(embedding, points, crop_box, (height, width)):
            data.cat(found)
            low_res.append(logits)
        keep = self._nms(data["boxes"], data["iou_preds"], self.box_nms_thresh)
        data.filter(keep)

        data["rles"] = []
        for rows in keep.split(_FULL_SIZE_BATCH.get(keep.device.type, 32)):
            bits = self.predictor.runtime.postprocess(embedding, _select(low_res, rows, embedding)).bits
            assert bits is not None
            data["rles"] += encode_rle(
                bits, x1 - x0, canvas_size=(height, width), offset=(x0, y0), backend=self._backend
            )
        data["boxes"] = uncrop_boxes_xyxy(data["boxes"], crop_box)
        data["points"] = uncrop_points(data["points"], crop_box)
        data["crop_boxes"] = torch.tensor(crop_box, device=data["boxes"].device).expand(len(keep), 4)
        return data

    def _in_batches(
        self, embedding: ImageEmbedding, points: np.ndarray, crop_box: list[int], size: tuple[int, int]
    ) -> Iterator[tuple[MaskData, torch.Tensor]]:
        """`_candidates` of batch after batch; where memory runs out, of smaller batches from then on."""
        most = max(self.points_per_batch, _FEWEST_POINTS.get(embedding.device.type, 1))
        start, count = 0, most
        while start < len(points):
            try:
                found = self._candidates(embedding, points[start : start + count], crop_box, size)
            except torch.OutOfMemoryError:
                if count == 1:
                    raise
                if count == most:
                    warnings.warn(f"out of memory with points_per_batch={count}; going on with less", stacklevel=2)
                count //= 2
                continue
            yield found
            start += count

    def _candidates(
        self, embedding: ImageEmbedding, points: np.ndarray, crop_box: list[int], size: tuple[int, int]
    ) -> tuple[MaskData, torch.Tensor]:
        """Decode one prompt per point and keep the masks that pass every filter of their own, with their logits."""
        coords = self.predictor.transform.apply_coords(points, embedding.original_size)
        coords_torch = torch.as_tensor(coords, device=self.predictor.device)[:, None, :]
        labels = torch.ones(len(points), 1, dtype=torch.int, device=self.predictor.device)
        threshold = self.pred_iou_thresh if self.pred_iou_thresh > 0.0 else None
        low_res, iou, prompt = self.predictor.runtime.decode_filtered(
            embedding, Prompts(coords_torch, labels), threshold
        )
        data = MaskData(low_res=low_res, iou_preds=iou, points=torch.as_tensor(points, device=low_res.device)[prompt])
        measured = self.predictor.runtime.postprocess(
            embedding, data["low_res"], stability_offset=self.stability_score_offset, return_bits=False
        )
        data["stability_score"] = measured.stability_score
        data["boxes"] = measured.boxes
        keep = ~is_box_near_crop_edge(data["boxes"], crop_box, [0, 0, size[1], size[0]])
        if self.stability_score_thresh > 0.0:
            keep &= data["stability_score"] >= self.stability_score_thresh
        data.filter(keep)
        logits = data["low_res"]
        del data["low_res"]
        return data, logits

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
        boxes = torch.as_tensor(mask_data["boxes"]).clone()
        unchanged = torch.ones(len(rles))
        for start in range(0, len(rles), _FULL_SIZE_BATCH["cpu"]):
            chunk = rles[start : start + _FULL_SIZE_BATCH["cpu"]]
            width = chunk[0]["size"][1]
            bits, filled = remove_small_regions(decode_rle(chunk), width, min_area, "holes")
            bits, cleared = remove_small_regions(bits, width, min_area, "islands")
            changed = (filled | cleared).nonzero()[:, 0]
            for i, rle in zip((changed + start).tolist(), encode_rle(bits[changed], width), strict=True):
                unchanged[i] = 0.0
                rles[i] = rle
                boxes[i] = torch.tensor(rle_box(rle))
        mask_data["rles"] = rles
        mask_data["boxes"] = boxes
        mask_data.filter(nms(boxes.float().cpu(), unchanged, nms_thresh))
        return mask_data

    # -- data -> records

    def _records(self, data: MaskData) -> list[dict[str, Any]]:
        records = []
        for i, rle in enumerate(data["rles"]):
            records.append(
                {
                    "segmentation": self._segmentation(rle),
                    "area": area_from_rle(rle),
                    "bbox": box_xyxy_to_xywh(data["boxes"][i]).tolist(),
                    "predicted_iou": data["iou_preds"][i].item(),
                    "point_coords": [data["points"][i].tolist()],
                    "stability_score": data["stability_score"][i].item(),
                    "crop_box": box_xyxy_to_xywh(data["crop_boxes"][i]).tolist(),
                }
            )
        return records

    def _segmentation(self, rle: dict[str, Any]) -> np.ndarray | dict[str, Any]:
        if self.output_mode == "binary_mask":
            return rle_to_mask(rle)
        if self.output_mode == "coco_rle":
            return {"size": rle["size"], "counts": compress_counts(rle["counts"])}
        return rle


def _no_candidates(device: torch.device) -> MaskData:
    return MaskData(
        iou_preds=torch.zeros(0, device=device),
        points=torch.zeros(0, 2, dtype=torch.float64, device=device),
        stability_score=torch.zeros(0, device=device),
        boxes=torch.zeros(0, 4, dtype=torch.int64, device=device),
    )


def _select(chunks: list[torch.Tensor], rows: torch.Tensor, embedding: ImageEmbedding) -> torch.Tensor:
    """Rows of the concatenation of `chunks`, without concatenating them."""
    if len(chunks) == 1:
        return chunks[0][rows]
    side = 4 * embedding.features.shape[-1]
    out = torch.empty(len(rows), side, side, device=embedding.device)
    start = 0
    for chunk in chunks:
        here = (rows >= start) & (rows < start + len(chunk))
        out[here] = chunk[rows[here] - start]
        start += len(chunk)
    return out
