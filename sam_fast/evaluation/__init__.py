"""How good the masks are: clicks, boxes, automatic masks, on any source of data."""
