import json
import logging
import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from superweights import __version__, errors
from superweights.cli import main
from superweights.cli.app import VERBS

from .conftest import Ask

HEAVY = {"torch", "transformers"}


def python(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A stand-in for the module of the verb `demo`, so that a test can make it do anything."""
    module = types.ModuleType("superweights.cli.demo")
    monkeypatch.setitem(sys.modules, "superweights.cli.demo", module)
    yield module


def test_help_lists_all_verbs_with_their_purpose(ask: Ask) -> None:
    answer = ask("--help")
    words = answer.out.replace("│", " ").split()
    assert answer.status == 0
    assert answer.err == ""
    for verb in VERBS:
        assert " ".join([verb.name, *verb.purpose.split()]) in " ".join(words)


def test_verbs_are_listed_in_reading_order(ask: Ask) -> None:
    lines = [line.strip("│ ").split(" ")[0] for line in ask("--help").out.splitlines()]
    assert [line for line in lines if line in {verb.name for verb in VERBS}] == [verb.name for verb in VERBS]


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb.name in ("show", "index")], ids=lambda verb: verb.name)
def test_the_help_of_a_verb_ends_with_its_examples(verb: Any, ask: Ask) -> None:
    lines = [line.strip() for line in ask(verb.name, "--help").out.splitlines()]
    assert lines[-len(verb.examples) :] == list(verb.examples)


def test_settings_are_explained_by_their_docstrings(ask: Ask) -> None:
    words = " ".join(ask("show", "--help").out.replace("│", " ").split())
    assert "--tensor STR Look in this tensor, for a model whose down projections are not recognised." in words
    assert "--format CHOICE" in words and "[choices: table, json, jsonl, csv]" in words


def test_no_arguments_give_the_help(ask: Ask) -> None:
    assert ask().out == ask("--help").out


def test_version(ask: Ask) -> None:
    assert ask("--version").out == f"{__version__}\n"


@pytest.mark.parametrize("words", [("fnd",), ("fnd", "--help"), ("-v", "fnd", "./model")])
def test_an_unknown_verb_names_the_near_one(words: tuple[str, ...], ask: Ask) -> None:
    answer = ask(*words)
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.splitlines()[-1] == "superweights: error: There is no verb 'fnd'. Did you mean 'find'?"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("show", "m", "--formt", "json"), "--format"),
        (("show",), "MODEL"),
        (("index", "--format", "yaml"), '"table", "json", "jsonl", "csv"'),
        (("index", "a", "b"), "b"),
    ],
)
def test_a_command_line_that_does_not_parse_is_usage(words: tuple[str, ...], says: str, ask: Ask) -> None:
    answer = ask(*words)
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith("superweights: error: ") and says in answer.err
    assert answer.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (errors.CoordinateError("no such row"), 2, "no such row"),
        (errors.HubError("line one\nline two"), 3, "line one line two"),
        (errors.RecordError("torn"), 3, "torn"),
        (
            FileNotFoundError(2, "No such file", "x.json"),
            3,
            "[Errno 2] No such file: 'x.json' (-v gives the traceback)",
        ),
        (ZeroDivisionError("by zero"), 3, "ZeroDivisionError: by zero (-v gives the traceback)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_is_one_line_and_its_status(
    error: Exception, status: int, line: str, ask: Ask, demo: types.ModuleType
) -> None:
    def fail() -> None:
        raise error

    demo.demo = fail  # type: ignore[attr-defined]
    answer = ask("demo")
    assert (answer.status, answer.out, answer.err) == (status, "", f"superweights: error: {line}\n")


@pytest.mark.parametrize("words", [("-v", "demo"), ("demo", "--verbose")])
def test_verbose_gives_the_traceback(words: tuple[str, ...], ask: Ask, demo: types.ModuleType) -> None:
    def fail() -> None:
        raise errors.ModelError("does not run")

    demo.demo = fail  # type: ignore[attr-defined]
    answer = ask(*words)
    assert answer.status == 3
    assert answer.err.startswith("Traceback") and "in fail" in answer.err
    assert answer.err.endswith("superweights: error: does not run\n")


@pytest.mark.parametrize(("given", "status"), [(0, 0), (1, 1), (None, 0)])
def test_a_verb_returns_the_exit_status(given: int | None, status: int, ask: Ask, demo: types.ModuleType) -> None:
    demo.demo = lambda: given  # type: ignore[attr-defined]
    assert ask("demo").status == status


def test_an_interrupt_is_one_line(ask: Ask, demo: types.ModuleType) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    demo.demo = interrupt  # type: ignore[attr-defined]
    answer = ask("demo")
    assert (answer.status, answer.err) == (130, "superweights: interrupted\n")


@pytest.mark.parametrize(("words", "seen"), [(("demo",), "WARNING: careful"), (("demo", "-v"), "INFO: reading")])
def test_the_log_goes_to_stderr(words: tuple[str, ...], seen: str, ask: Ask, demo: types.ModuleType) -> None:
    def log() -> None:
        logging.getLogger("superweights.anything").info("reading")
        logging.getLogger("superweights.anything").warning("careful")

    demo.demo = log  # type: ignore[attr-defined]
    answer = ask(*words)
    assert answer.out == ""
    assert answer.err.splitlines()[0] == f"superweights: {seen}"
    assert logging.getLogger("superweights").handlers == []


def test_light_verbs_import_no_torch(tmp_path: Path) -> None:
    header = json.dumps({"layers.0.fc2.weight": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    (tmp_path / "config.json").write_text('{"model_type": "opt", "hidden_size": 2}')
    code = (
        "import sys; from superweights.cli import main\n"
        "for words in ['--help'], ['show', '--help'], ['index'], ['index', 'llama-7b'], ['show', sys.argv[1], '0:0:0']:\n"
        "    assert main(words) == 0, words\n"
        "assert main(['fnd']) == 2\n"
        f"assert not {HEAVY} & sys.modules.keys(), {HEAVY} & sys.modules.keys()"
    )
    result = python("-c", code, str(tmp_path))
    assert result.returncode == 0, result.stderr


def test_the_module_runs_as_the_command() -> None:
    result = python("-m", "superweights", "--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{__version__}\n", "")


def test_the_status_reaches_the_shell() -> None:
    result = python("-m", "superweights", "fnd")
    assert (result.returncode, result.stdout) == (2, "")


@pytest.mark.skipif(os.name != "posix", reason="closes a POSIX pipe")
@pytest.mark.parametrize("words", ["index --format json", "--help"])
def test_a_closed_pipe_is_quiet(words: str) -> None:
    command = f"{sys.executable} -m superweights {words} | true; exit ${{PIPESTATUS[0]}}"
    # `true` ends long before the interpreter has started.
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_in_the_shell_is_130() -> None:
    code = (
        "import os, signal, sys, types\n"
        "verb = types.ModuleType('superweights.cli.demo')\n"
        "verb.demo = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.modules['superweights.cli.demo'] = verb\n"
        "from superweights.cli import main; sys.exit(main(['demo']))"
    )
    result = python("-c", code)
    assert (result.returncode, result.stderr) == (130, "superweights: interrupted\n")
    assert result.returncode == 128 + signal.SIGINT


def test_main_takes_the_words_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["superweights", "--version"])
    assert main() == 0
    assert capsys.readouterr().out == f"{__version__}\n"
