"""The command line: one small file per verb. Data on stdout, everything else on stderr."""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status.

    Args:
        arguments: the words after the program's name; None takes them from the process.

    Returns:
        0 done, 1 the answer is no, 2 usage, 3 cannot, 130 interrupted, 141 the reader of stdout has gone.
    """
    try:
        from superweights.cli.app import run

        return run(arguments)
    except KeyboardInterrupt:
        # Here and not in the app: Ctrl-C also comes while modules are still being imported.
        import sys

        sys.stderr.write("superweights: interrupted\n")
        return 130
