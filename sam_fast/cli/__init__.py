"""The `sam-fast` command: one file per subcommand, put together here."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
import typer.core

from sam_fast.cli import amg, convert, demo, doctor, download, eval, export_onnx, predict, pretrain, train
from sam_fast.cli.console import report_error


class _Commands(typer.core.TyperGroup):
    """A group whose commands end with one line on standard error where the input or the machine is at fault."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except (ValueError, RuntimeError, OSError) as error:
            if ctx.params.get("traceback"):
                raise
            report_error(str(error))
            raise typer.Exit(1) from error


app = typer.Typer(
    name="sam-fast",
    cls=_Commands,
    help="The Segment Anything Model made fast.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from sam_fast import __version__

        typer.echo(f"sam_fast {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False,
) -> None:
    """The Segment Anything Model made fast."""


app.command("amg")(amg.amg)
app.command("predict")(predict.predict)
app.command("train")(train.train)
app.command("pretrain")(pretrain.pretrain)
app.command("download")(download.download)
app.command("convert")(convert.convert)
app.command("export-onnx")(export_onnx.export_onnx)
app.command("eval")(eval.evaluate_command)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)


def main() -> None:
    """Entry point of the console script."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    app()
