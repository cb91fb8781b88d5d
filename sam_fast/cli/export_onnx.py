"""`sam-fast export-onnx`: prompt encoder and mask decoder as ONNX, with the flags of segment_anything's script."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sam_fast.cli.console import escaped, out
from sam_fast.cli.model import Checkpoint, ModelType, load_trained_model


def export_onnx(
    output: Annotated[Path, typer.Option("--output", help="The ONNX file to write.")],
    model_type: ModelType,
    checkpoint: Checkpoint = None,
    return_single_mask: Annotated[
        bool, typer.Option("--return-single-mask", help="The model returns the best mask only.")
    ] = False,
    opset: Annotated[int, typer.Option("--opset", help="Version of the ONNX operators, 17 or newer.")] = 17,
    quantize_out: Annotated[
        Path | None, typer.Option("--quantize-out", help="Also write a model with 8-bit weights to this file.")
    ] = None,
    gelu_approximate: Annotated[
        bool, typer.Option("--gelu-approximate", help="GELU by tanh, for runtimes without a quick erf.")
    ] = False,
    use_stability_score: Annotated[
        bool, typer.Option("--use-stability-score", help="Scores are stability scores, not predicted IoUs.")
    ] = False,
    return_extra_metrics: Annotated[
        bool, typer.Option("--return-extra-metrics", help="Also return stability scores and areas at full size.")
    ] = False,
) -> None:
    """Export the part of the model behind the image encoder to ONNX; needs the extra packages of sam_fast\\[onnx]."""
    from sam_fast.utils.onnx import export_onnx_model, quantize_onnx_model

    if quantize_out is not None and quantize_out.resolve() == output.resolve():
        raise typer.BadParameter(f"--quantize-out would replace the model of --output {output}; give another name")
    model = load_trained_model(model_type, checkpoint, "cpu")
    output.parent.mkdir(parents=True, exist_ok=True)
    export_onnx_model(
        model,
        output,
        return_single_mask=return_single_mask,
        opset=opset,
        gelu_approximate=gelu_approximate,
        use_stability_score=use_stability_score,
        return_extra_metrics=return_extra_metrics,
    )
    out().print(escaped(output))
    if quantize_out is not None:
        quantize_out.parent.mkdir(parents=True, exist_ok=True)
        quantize_onnx_model(output, quantize_out)
        out().print(escaped(quantize_out))
