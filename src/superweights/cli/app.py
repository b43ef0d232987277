"""The verbs, and what is the same for all of them: options, errors and exit status.

A verb is imported only when it is asked for, so help and the light verbs never wait for torch. Its one-line purpose and its
examples stand here for that reason; its docstring and its settings are the rest of its help.
"""

import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from superweights import __version__
from superweights.errors import SuperweightsError, UnknownNameError

USAGE, CANNOT, READER_GONE = 2, 3, 141


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb, described without importing it."""

    name: str
    """The word on the command line, and the function in the module of the same name."""
    purpose: str
    """One line for the list of verbs."""
    examples: tuple[str, ...]
    """Command lines that end the verb's help."""


VERBS = (
    Verb(
        "find",
        "Find the super weights of a model: which scalars, how sure, and the evidence for each.",
        (
            "superweights find ./model",
            "superweights find allenai/OLMo-1B-0724-hf --layers 0:4 --out run.jsonl",
            "superweights find ./model --method paper --plot peaks.svg",
        ),
    ),
    Verb(
        "trace",
        "Follow the largest residual value through the layers, with and without the super weights.",
        (
            "superweights trace ./model",
            "superweights trace ./model --edit scale=0 --edit scale=0+restore-sa --plot trace.html",
        ),
    ),
    Verb(
        "verify",
        "Say which weights the model needs, alone or together, against a null, with intervals.",
        (
            "superweights verify ./model",
            "superweights verify ./model --weights 2:3968:7003 --text wikitext2 --plot verdicts.svg",
            "superweights verify ./model --weights found.jsonl --minutes 10 --out verdicts.jsonl",
        ),
    ),
    Verb(
        "ablate",
        "Measure the model without its super weights, without other large weights, and with the super activation put back.",
        (
            "superweights ablate ./model",
            "superweights ablate ./model --text wikitext2 --tasks all --plot table1.svg",
            "superweights ablate ./model --others 1e-5 --windows 64 --length 512 --format csv",
        ),
    ),
    Verb(
        "scale",
        "Multiply the super weights by factors from 0 to 3: which is best, and is the gain real?",
        (
            "superweights scale ./model --plot scaling.svg",
            "superweights scale ./model --weights 2:3968:7003 --factors 0,0.5,1,1.2,2 --text wikitext2",
        ),
    ),
    Verb(
        "stopwords",
        "Compare next-token probabilities with and without the super weights: do stop words take over?",
        (
            "superweights stopwords ./model",
            "superweights stopwords ./model --text lambada --plot stopwords.svg",
        ),
    ),
    Verb(
        "sinks",
        "Measure the attention to the first token with and without the super weights: do attention sinks survive?",
        ("superweights sinks ./model", "superweights sinks ./model --weights 2:3968:7003 --plot sinks.svg"),
    ),
    Verb(
        "compare",
        "Compare the super weights of two models: base and tuned, merged or rounded.",
        (
            "superweights compare ./base ./tuned",
            "superweights compare ./base ./tuned --weights 2:3968:7003 --plot compare.svg",
        ),
    ),
    Verb(
        "repair",
        "Destroy the super weights and derive them again from a short text: how much comes back?",
        ("superweights repair ./model", "superweights repair ./model --weights 2:3968:7003 --text wikitext2"),
    ),
    Verb(
        "quantize",
        "Quantize a model without losing its super weights; compare schemes, clips and SmoothQuant.",
        (
            "superweights quantize ./model --scheme int4-g128 --to ./model-int4",
            "superweights quantize ./model --scheme q4_0 --to ./model-q4_0.gguf",
            "superweights quantize ./model --scheme int4-g128 --clip z=9 --keep 2:3968:7003 --measure",
            "superweights quantize ./model --compare --plot figure7.png",
            "superweights quantize ./model --activations --scales tensor --plot w8a8.png",
            "superweights quantize ./model --budget 4.25bits --to ./model-mixed",
        ),
    ),
    Verb(
        "adapter",
        "Restore super weights on top of a quantized model, by a LoRA of a few kilobytes.",
        (
            "superweights adapter ./model-int4 --original ./model --to ./model-int4-lora",
            "superweights adapter ./model-q4_0.gguf --original ./model --weights 2:3968:7003 --to ./model-q4_0-lora",
        ),
    ),
    Verb(
        "audit",
        "Ask of any quantized model: was the super weight kept, bent or lost, and what does that cost?",
        (
            "superweights audit ./model-gptq --original ./model",
            "superweights audit TheBloke/Llama-2-7B-GPTQ --weights 1:2533:7890",
        ),
    ),
    Verb(
        "show",
        "Show single weights from the file's bytes: value, bits, rank, neighbours.",
        (
            "superweights show ./model 2:3968:7003",
            "superweights show mistralai/Mixtral-8x7B-v0.1 1/3:2070:7310 --format json",
            "superweights show ./model 0:5:20 --tensor blocks.0.out.weight --transposed",
        ),
    ),
    Verb(
        "index",
        "List the published super weights, with sources, errata and contradictions.",
        (
            "superweights index",
            "superweights index allenai/OLMo-1B-0724-hf",
            "superweights index llama-7b --format jsonl",
        ),
    ),
    Verb(
        "demo",
        "Find, trace and verify super weights in a small trained model and in a synthetic one.",
        ("superweights demo",),
    ),
)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status; see `main`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    names = [verb.name for verb in VERBS]
    if (asked := _asked_verb(words)) not in {None, *names}:
        return _refuse(UnknownNameError.among("verb", str(asked), names), USAGE)
    try:
        status = build_app(words).meta(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except SystemExit as error:
        # Rich, which prints the help, makes a closed pipe an exit with 1: our status for "no".
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        return READER_GONE
    except CycloptsError as error:
        return _refuse(error, USAGE, text=f"{error}{_of_files(words)}")
    return status if isinstance(status, int) else 0


def build_app(words: Sequence[str]) -> App:
    """The command line's parser.

    Args:
        words: the command line. The verb in it is shown with its own docstring, all others with their purpose.
    """
    app = App(
        name="superweights",
        help="Find the super weights of large language models.",
        help_epilogue="`superweights VERB --help` explains a verb and ends with examples.",
        help_format="markdown",
        version=__version__,
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
    )
    app.meta.suppress_keyboard_interrupt = False
    asked = _asked_verb(words)
    for place, verb in enumerate(VERBS):
        examples = "\n".join(f"    {example}" for example in verb.examples)
        app.command(
            f"superweights.cli.{verb.name}:{verb.name}",
            name=verb.name,
            help=None if verb.name == asked else verb.purpose,
            help_epilogue=f"Examples:\n\n{examples}",
            sort_key=place,
        )

    @app.meta.default
    def launch(
        *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        verbose: Annotated[bool, Parameter(("--verbose", "-v"), negative="")] = False,
    ) -> int:
        """Runs a verb.

        Args:
            words: the verb and what belongs to it.
            verbose: Say more on stderr, and give the traceback of an error.
        """
        with _log_on_stderr(logging.INFO if verbose else logging.WARNING):
            return _launch(app, words, verbose=verbose)

    return app


def _launch(app: App, words: Sequence[str], *, verbose: bool) -> int:
    try:
        status = app(words)
        return status if isinstance(status, int) else 0
    except (CycloptsError, BrokenPipeError):
        raise
    except SuperweightsError as error:
        return _refuse(error, error.exit_status, verbose=verbose)
    except Exception as error:
        named = error if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        hint = "" if verbose else " (-v gives the traceback)"
        return _refuse(error, CANNOT, verbose=verbose, text=f"{named}{hint}")


def _asked_verb(words: Sequence[str]) -> str | None:
    return next((word for word in words if not word.startswith("-")), None)


def _of_files(words: Sequence[str]) -> str:
    """What to say to somebody who takes --format for that of files."""
    if "quantize" not in words or not {"gguf", "compressed-tensors"} & {
        word.rpartition("=")[2].lower() for word in words
    }:
        return ""
    return " --format is how the answer is printed; files follow --to: NAME.gguf is one for llama.cpp, else compressed-tensors."


def _refuse(error: Exception, status: int, *, verbose: bool = False, text: str | None = None) -> int:
    """Says on one line why it cannot go on."""
    if verbose:
        traceback.print_exception(error, file=sys.stderr)
    line = " ".join((text or str(error)).split())
    sys.stderr.write(f"superweights: error: {line}\n")
    return status


@contextmanager
def _log_on_stderr(level: int) -> Iterator[None]:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("superweights: %(levelname)s: %(message)s"))
    logger = logging.getLogger("superweights")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
