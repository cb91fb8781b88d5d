"""`sam-fast eval`: how good masks from clicks, boxes and of everything are, on any data, beside classical tools."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sam_fast.cli.console import escaped, item_progress, out, report_note
from sam_fast.cli.model import (
    Backend,
    BackendOption,
    Device,
    Precision,
    PrecisionOption,
    choose_device,
    load_trained_model,
)

if TYPE_CHECKING:
    from rich.progress import Progress

    from sam_fast.data.sample import SampleSource
    from sam_fast.evaluation.evaluate import EvaluationSettings
    from sam_fast.evaluation.methods import Method
    from sam_fast.evaluation.results import Results

_METHODS = ("sam", "grabcut", "random_walker")
_GENERATOR = "Mask generator, for --amg"


class FirstClick(str, Enum):
    """Where the simulated user clicks first."""

    centre = "centre"
    random = "random"


def evaluate_command(
    context: typer.Context,
    results: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RESULTS.json]...", help="Results of earlier calls, put into the same table."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="What to measure on, such as scenes:held-out, photos, instances.json:images."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for <method>.json and table.md; made if it is missing.")
    ] = None,
    model_type: Annotated[
        str, typer.Option("--model-type", help="A model of the registry, such as nano or vit_b.")
    ] = "nano",
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Weights of that model; nano's are in the package.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="What the model is called in the table; --model-type by default.")
    ] = None,
    images: Annotated[int | None, typer.Option("--images", min=1, help="Only the first ones; all by default.")] = None,
    objects: Annotated[int, typer.Option("--objects", min=0, help="Objects prompted in each image; 0: all.")] = 1,
    clicks: Annotated[bool, typer.Option("--clicks/--no-clicks", help="1, 2, 3, 5 and 9 simulated clicks.")] = True,
    first_click: Annotated[
        FirstClick, typer.Option("--first-click", help="Where the first click lies on its object.")
    ] = FirstClick.centre,
    box: Annotated[bool, typer.Option("--box/--no-box", help="The tight box of the object.")] = True,
    amg: Annotated[
        bool, typer.Option("--amg/--no-amg", help="Average recall of automatic masks, on all objects of an image.")
    ] = False,
    methods: Annotated[
        str, typer.Option("--methods", help="Some of sam, grabcut and random_walker, separated by commas.")
    ] = "sam",
    classical: Annotated[
        bool, typer.Option("--classical", help="Also GrabCut from boxes and the random walker from clicks.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the draw of objects.")] = 0,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Measure again where --output holds results of the same settings.")
    ] = False,
    device: Device = None,
    precision: PrecisionOption = Precision.auto,
    backend: BackendOption = Backend.auto,
    points_per_side: Annotated[
        int, typer.Option(min=1, help="Side of the grid of point prompts.", rich_help_panel=_GENERATOR)
    ] = 32,
    pred_iou_thresh: Annotated[
        float, typer.Option(help="Keep masks whose predicted IoU is above it.", rich_help_panel=_GENERATOR)
    ] = 0.0,
    stability_score_thresh: Annotated[
        float, typer.Option(help="Keep masks whose stability score reaches it.", rich_help_panel=_GENERATOR)
    ] = 0.0,
    box_nms_thresh: Annotated[
        float, typer.Option(help="Box IoU above which masks are duplicates.", rich_help_panel=_GENERATOR)
    ] = 0.7,
) -> None:
    """Measure masks against the truth and print one table for all methods.

    Without --data, the table of RESULTS.json alone. Every method is shown the same objects with the same boxes, and
    clicks into its own errors; docs/evaluation.md has the protocol.
    """
    from sam_fast.data.open import open_source
    from sam_fast.evaluation.evaluate import EvaluationSettings
    from sam_fast.evaluation.results import Results
    from sam_fast.evaluation.tables import markdown_table, terminal_table

    chosen = parse_methods(methods, classical)
    if data is None and not results:
        raise typer.BadParameter("give --data to measure on, or results of earlier calls to print")
    table = [Results.load(path) for path in results or []]
    if data is not None:
        kinds = {"clicks": clicks, "box": box, "everything": amg}
        settings = EvaluationSettings(
            prompts=tuple(kind for kind, wanted in kinds.items() if wanted),
            first_click=first_click.value,
            objects_per_image=objects or None,
            max_images=images,
            seed=seed,
        )
        generator = {
            "points_per_side": points_per_side,
            "pred_iou_thresh": pred_iou_thresh,
            "stability_score_thresh": stability_score_thresh,
            "box_nms_thresh": box_nms_thresh,
        }

        def sam() -> Method:
            from sam_fast.evaluation.methods import SamMethod

            model = load_trained_model(model_type, checkpoint, choose_device(device))
            options = {"precision": precision.value, "backend": backend.value}
            return SamMethod(model, called, generator=generator if amg else None, **options)

        called = name or model_type
        if called in _METHODS[1:]:
            raise typer.BadParameter(f"--name {called} is the name of another method, whose results it would replace")
        source = open_source(data)
        built = [_build(method, sam) for method in chosen]
        measured = _measure(source, data, built, settings, output, recompute, _command_line(context))
        table = measured + _of_others(results or [], table, measured, output)
    if not table:
        raise ValueError("none of the methods answers the prompts asked for")
    out().print(terminal_table(table))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "table.md").write_text(markdown_table(table))
        out().print(f"written to {escaped(output)}")


def _of_others(paths: list[Path], given: list[Results], measured: list[Results], output: Path | None) -> list[Results]:
    """Of the results `given` in files those whose file is not that of `measured` ones, which the table has already."""
    own = set() if output is None else {(output / f"{result.method}.json").resolve() for result in measured}
    return [result for path, result in zip(paths, given, strict=True) if path.resolve() not in own]


def parse_methods(methods: str, classical: bool) -> list[str]:
    """The methods of `--methods` and `--classical`, each once, in the order of the table.

    Raises:
        typer.BadParameter: there is no such method.
    """
    wanted = {part.strip() for part in methods.split(",")} | (set(_METHODS[1:]) if classical else set())
    if not wanted <= set(_METHODS):
        raise typer.BadParameter(f"--methods takes {', '.join(_METHODS)} separated by commas, got {methods!r}")
    return [method for method in _METHODS if method in wanted]


def _build(method: str, sam: Callable[[], Method]) -> Method:
    from sam_fast.evaluation.classical import GrabCut, RandomWalker

    return {"sam": sam, "grabcut": GrabCut, "random_walker": RandomWalker}[method]()


def _measure(
    source: SampleSource,
    data: str,
    methods: list[Method],
    settings: EvaluationSettings,
    output: Path | None,
    recompute: bool,
    command: str,
) -> list[Results]:
    """Results of each method that answers one of the prompts, from `output` where they lie there already."""
    from sam_fast.evaluation.evaluate import digest_of, evaluate, protocol_of
    from sam_fast.evaluation.results import Results

    table = []
    digest: str | None = None  # of what `source` holds now
    for method in methods:
        protocol = protocol_of(source, method, settings, data)
        if not protocol["prompts"]:
            report_note(f"{method.name} answers {' and '.join(method.prompts)} only, and is left out")
            continue
        path = None if output is None else output / f"{method.name}.json"
        if path is not None and path.exists() and not recompute:
            earlier = Results.load(path)
            if earlier.answers(dict(method.settings), protocol):
                digest = digest or digest_of(source, settings)
                if earlier.digest == digest:
                    date = earlier.provenance["date"]
                    report_note(f"{method.name} is from {path}, {date}; --recompute measures again")
                    table.append(earlier)
                    continue
                report_note(f"{method.name} is measured again: {data} has changed since {path} was written")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)  # after the measurement an error would come late
        with item_progress() as progress:

            def track(indices: Iterable[int], bar: Progress = progress, label: str = method.name) -> Iterable[int]:
                return bar.track(indices, description=label)

            result = evaluate(source, method, settings, track=track, data=data, command=command)
        if path is not None:
            result.save(path)
        table.append(result)
    return table


def _command_line(context: typer.Context) -> str:
    """This call as a line that repeats it, without the results of earlier ones."""
    parts = ["sam-fast", "eval"]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.param_type_name != "option" or value == parameter.default or value is None:
            continue
        if isinstance(value, bool):
            parts.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            parts += [parameter.opts[0], str(getattr(value, "value", value))]
    return shlex.join(parts)
