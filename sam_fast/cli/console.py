"""What the commands print to: results on standard output, progress and errors on standard error."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn


def out() -> Console:
    """The console of results. Lines are not wrapped: they hold paths that people copy."""
    return Console(soft_wrap=True, highlight=False, emoji=False)


def err() -> Console:
    """The console of errors and progress."""
    return Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)


def report_error(message: str) -> None:
    """Print one red line."""
    err().print(f"[bold red]error:[/] {escaped(message)}")


def report_note(message: str) -> None:
    """Print one yellow line."""
    err().print(f"[yellow]note:[/] {escaped(message)}")


def item_progress(*columns: ProgressColumn) -> Progress:
    """A progress bar over items; it vanishes when done, and prints nothing where there is no terminal."""
    console = err()
    standard = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*(columns or standard), console=console, transient=True, disable=not console.is_terminal)


def escaped(text: object) -> str:
    """A path, name or message for the consoles, which take words in brackets for markup."""
    from rich.markup import escape

    return escape(str(text))
