"""Sources of training and evaluation data: procedural scenes, SA-1B, COCO, folders of masks."""
