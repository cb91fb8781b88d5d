"""`python -m sam_fast` is the `sam-fast` command, for launchers such as torchrun."""

from sam_fast.cli import main

main()
