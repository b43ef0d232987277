"""lm-evaluation-harness: a loaded model as one of its models, and the paper's seven zero-shot tasks as records.

The harness's own HFLM calls a transformers model whose weights lie in memory. The model here goes through `LoadedModel`
instead, so that a streamed model and every condition can be measured, and gives the numbers of HFLM. Tasks run on files of
your own, without network, or on the data that the harness fetches.

Everything here needs the extra `eval`; without it the file can be imported, and says so when it is used. The harness's command
line takes no models from other packages: `python -m superweights.integrations.lm_eval` makes ours known and starts it.
"""

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import torch

from superweights.coordinates import Coordinate
from superweights.errors import HubError, SuperweightsError, UnknownNameError, UsageError
from superweights.experiments.evaluation import TOKENS_PER_PASS, measurement
from superweights.interventions.conditions import ORIGINAL, Condition, ScaleWeights
from superweights.interventions.rows import applied
from superweights.measurements.generation import end_tokens
from superweights.measurements.intervals import Interval, mean_interval, perplexity, proportion_interval
from superweights.measurements.model_windows import longest_sequence
from superweights.measurements.windows import DEFAULT_LENGTH
from superweights.model.loading import LoadedModel, load
from superweights.progress import NO_PROGRESS, Progress, RichProgress
from superweights.results.records import MeasurementRecord

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError:  # said by `_require_harness` to whoever uses what is here
    TemplateLM, register_model = object, None

_log = logging.getLogger(__name__)

TASKS = ("arc_challenge", "arc_easy", "hellaswag", "lambada_openai", "piqa", "sciq", "winogrande")
"""The zero-shot tasks of the paper's table 1."""

_DEFINITIONS = Path(__file__).with_name("tasks")
_LOGITS_AT_ONCE = 1 << 25
"""Elements of one piece of logits: 128 MB."""
_GREEDY = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}
"""Generation settings that have a meaning, or none, where the most likely token is taken."""
_LOADING = {"revision", "residency", "nonfinite", "compute", "trust_remote_code"}
_ARGUMENTS = {"pretrained", "weights", "scale", "batch_tokens", *_LOADING}


def headline(task: str) -> str:
    """The metric of a task that goes into the paper's average: "acc" for all of them.

    Raises:
        UnknownNameError: there is no such task.

    Source:
        arXiv 2411.07191, table 1: its 41.81 on ARC-challenge and 56.93 on HellaSwag are the "acc" of Llama-7B, whose "acc_norm"
        are 44.7 and 76.2 (lm-evaluation-harness #1294).
    """
    if task not in TASKS:
        raise UnknownNameError.among("task", task, TASKS)
    return "acc"


class LoadedModelLM(TemplateLM):  # type: ignore[misc]
    """A loaded model, resident or streamed, as a model of lm-evaluation-harness, under one condition.

    Special tokens are those that the tokenizer puts by itself, as in HFLM: a model whose tokenizer puts a beginning-of-sequence
    token first reads it, except where the text starts with it. Text that stands alone is conditioned on that token, or on the
    end-of-sequence token where there is none; `loglikelihood_rolling`, like HFLM's, puts it before what the tokenizer made,
    so that it may come twice. What is too long for the model loses its left end, with a warning in the log. Nothing is cached.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        batch_tokens: int = TOKENS_PER_PASS,
        condition: Condition = ORIGINAL,
        title: str = "requests",
        progress: Progress = NO_PROGRESS,
    ) -> None:
        """Wraps the model, which stays open and unedited between requests.

        Args:
            model: the model.
            batch_tokens: most tokens of one pass, padding included. A streamed model reads all its weights in every pass, so
                that more is faster as long as the activations fit in memory.
            condition: the state of the model in which requests are answered.
            title: what the progress is called.
            progress: hears about requests.

        Raises:
            UsageError: lm-eval is not installed, there is no tokenizer, or no token fits in a pass.
        """
        _require_harness()
        super().__init__()
        if model.tokenizer is None:
            raise UsageError(
                f"Running tasks on {model.name} needs a tokenizer, and the model has none. Put its tokenizer.json beside "
                "config.json."
            )
        if not isinstance(batch_tokens, int) or batch_tokens < 1:
            raise UsageError(f"A pass cannot have {batch_tokens} tokens: batch_tokens must be a number, 1 or more.")
        self.model = model
        self.tokenizer = model.tokenizer
        self.batch_tokens = batch_tokens
        self.condition = condition
        self.title = title
        self.progress = progress
        self.max_length = longest_sequence(model) or DEFAULT_LENGTH

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        """Loads the model that `KEY=VALUE,KEY=VALUE` describes; see `create_from_arg_obj`."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Self:
        """Loads the model that the harness's `--model_args` describe.

        Args:
            arg_dict: `pretrained`, a directory or a Hub name; `weights`, coordinates joined by "+" or ";" that are multiplied
                by `scale` (0 when not given); `batch_tokens`; and `revision`, `residency`, `nonfinite`, `compute` and
                `trust_remote_code` as `load` takes them.
            additional_config: batch size and device of the harness, which mean nothing here.

        Raises:
            UsageError: an argument is missing, unknown or wrong.
            CheckpointError: the files cannot be used.
            ModelError: the model cannot be built.
        """
        for name in arg_dict:
            if name not in _ARGUMENTS:
                raise UnknownNameError.among("model argument", name, _ARGUMENTS)
        if "pretrained" not in arg_dict:
            raise UsageError(
                "There is no model to load: --model_args needs pretrained=DIRECTORY or pretrained=HUB_NAME."
            )
        edit = _scaling(arg_dict)
        model = load(str(arg_dict["pretrained"]), **{name: arg_dict[name] for name in _LOADING & arg_dict.keys()})
        for weight in edit.weights if edit else ():
            model.architecture.locate(weight)  # before any task is built
        condition = Condition(f"scale={edit.factor:g}", (edit,)) if edit else ORIGINAL
        batch_tokens = arg_dict.get("batch_tokens", TOKENS_PER_PASS)
        return cls(model, batch_tokens=batch_tokens, condition=condition, progress=RichProgress())

    @property
    def eot_token_id(self) -> int | None:
        """The end-of-sequence token, or None."""
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that stands alone.

        Raises:
            UsageError: the tokenizer has none.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise UsageError(
            f"Scoring a text that stands alone with {self.model.name} needs a token to start from, and its tokenizer has no "
            "beginning-of-sequence or end-of-sequence token. Give the request a context."
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; None leaves special tokens to the tokenizer, unless the text starts with the first one."""
        start = self.tokenizer.bos_token or self.tokenizer.eos_token
        if add_special_tokens is None and start and string.startswith(start):
            add_special_tokens = False
        chosen = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer(string, verbose=False, **chosen)["input_ids"]  # verbose warns of long sequences
        return ids

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of continuations behind their contexts, and whether each is the greedy choice.

        Raises:
            UsageError: a continuation is empty or longer than the model takes, or an edit changes nothing.
        """
        for context, continuation in (each.args for each in requests):
            if not continuation:
                raise UsageError(_nothing_to_score(context[-40:]))
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of whole texts, each token behind as much of its text as the model takes.

        Raises:
            UsageError: there is no token to start from, or an edit changes nothing.
        """
        texts = [list(self._windows(text)) for (text,) in (each.args for each in requests)]
        answers = iter(self._loglikelihood_tokens([("", *window) for text in texts for window in text]))
        return [sum(next(answers)[0] for _ in text) for text in texts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Continues contexts with the most likely token each time, up to a stop text; recomputes the prefix in every step.

        Raises:
            UsageError: anything else than greedy decoding is asked for, no room is left for a context, or an edit changes
                nothing.
        """
        found = [self._continuation(*each.args) for each in requests]
        self._warn_of_cuts(sum(each.cut for each in found), len(found))
        with self._answering(len(found)):
            for batch in _batches([len(each.ids) + each.limit for each in found], self.batch_tokens):
                self._generate([found[number] for number in batch])
                self.progress.advance(len(batch))
        return [each.text for each in found]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        rows = [self._row(*each) for each in requests]
        self._warn_of_cuts(sum(len(each[1]) + len(each[2]) > self.max_length + 1 for each in requests), len(rows))
        answers: dict[int, tuple[float, bool]] = {}
        with self._answering(len(rows)):
            for batch in _batches([len(ids) for ids, _ in rows], self.batch_tokens):
                answers.update(zip(batch, self._score([rows[number] for number in batch]), strict=True))
                self.progress.advance(len(batch))
        return [answers[number] for number in range(len(rows))]

    @contextmanager
    def _answering(self, requests: int) -> Iterator[None]:
        self.progress.start(self.title, total=requests, unit="requests")
        try:
            with applied(self.model, self.condition):
                yield
        finally:
            self.progress.finish()

    def _warn_of_cuts(self, cut: int, requests: int) -> None:
        if cut:
            _log.warning(
                "%d of %d requests are longer than the %d tokens that %s takes: they lose their left end.",
                cut,
                requests,
                self.max_length,
                self.model.name,
            )

    def _row(self, texts: Any, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """What the model reads, and what it is to predict at the last tokens of that."""
        if not continuation:
            raise UsageError(_nothing_to_score(str(texts)[-40:]))
        if len(continuation) > self.max_length:
            raise UsageError(
                f"Scoring a continuation of {len(continuation)} tokens: {self.model.name} takes at most {self.max_length}. "
                "Shorten it, or use a task that scores whole texts in windows."
            )
        whole = [*(context or [self.prefix_token_id]), *continuation]
        return whole[-(self.max_length + 1) : -1], continuation

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        yield from map(
            make_disjoint_window,
            get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ),
        )

    def _states(self, rows: Sequence[list[int]]) -> torch.Tensor:
        """Last states [rows, tokens, hidden], padded on the right, where attention of real tokens does not reach."""
        width = max(map(len, rows))
        ids = torch.tensor([[*each, *[0] * (width - len(each))] for each in rows])
        real = torch.arange(width) < torch.tensor([[len(each)] for each in rows])
        device = self.model.model.get_input_embeddings().weight.device
        mask = None if bool(real.all()) else real.long().to(device)
        return self.model.states(ids.to(device), attention_mask=mask)

    def _reduced(self, states: torch.Tensor, reduce: Callable[[torch.Tensor, slice], torch.Tensor]) -> torch.Tensor:
        """What is left of the logits of states [positions, hidden], which do not all fit in memory."""
        vocabulary = self.model.model.get_output_embeddings().weight.shape[0]
        step = max(1, _LOGITS_AT_ONCE // vocabulary)
        pieces = (slice(first, first + step) for first in range(0, len(states), step))
        return torch.cat([reduce(self.model.logits(states[None, piece])[0], piece) for piece in pieces])

    def _score(self, rows: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        states = self._states([ids for ids, _ in rows])
        ends = [state[len(ids) - len(wanted) : len(ids)] for state, (ids, wanted) in zip(states, rows, strict=True)]
        targets = torch.tensor([each for _, wanted in rows for each in wanted], device=states.device)

        def compare(logits: torch.Tensor, piece: slice) -> torch.Tensor:
            found, wanted = logits.log_softmax(-1), targets[piece]
            greedy = found.argmax(-1) == wanted
            return torch.stack([found.gather(-1, wanted[:, None])[:, 0], greedy.float()], dim=1).cpu().double()

        scores = self._reduced(torch.cat(ends), compare)  # [positions, 2]
        for each in torch.split_with_sizes(scores, [len(wanted) for _, wanted in rows]):
            yield each[:, 0].sum().item(), bool(each[:, 1].all())

    def _continuation(self, context: str, settings: Mapping[str, Any]) -> "_Continuation":
        from lm_eval.models.utils import normalize_gen_kwargs

        chosen = normalize_gen_kwargs(settings)
        strange = sorted(chosen.keys() - _GREEDY)
        if strange or chosen["do_sample"]:
            raise UsageError(
                f"Generating with {', '.join(strange) or 'do_sample'}: {type(self).__name__} takes the most likely token each "
                "time. Set do_sample=false and leave such settings out."
            )
        room = self.max_length - chosen["max_gen_toks"]
        if room < 1 or chosen["max_gen_toks"] < 1:
            raise UsageError(
                f"Generating {chosen['max_gen_toks']} tokens: {self.model.name} takes at most {self.max_length}, its context "
                f"included. Set max_gen_toks to 1 to {self.max_length - 1}."
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        until = [each for each in chosen["until"] if each]
        return _Continuation(ids[-room:], [], chosen["max_gen_toks"], until, cut=len(ids) > room)

    def _generate(self, running: Sequence["_Continuation"]) -> None:
        ends = end_tokens(self.model)
        while running:
            rows = [each.ids + each.tokens for each in running]
            states = self._states(rows)
            last = states[torch.arange(len(rows)), [len(each) - 1 for each in rows]]  # [rows, hidden]
            chosen = self._reduced(last, lambda logits, _: logits.argmax(-1)).tolist()
            running = [
                each
                for each, token in zip(running, chosen, strict=True)
                if token not in ends and each.goes_on(token, self.tokenizer)
            ]


@dataclass(slots=True)
class _Continuation:
    """A context that is being continued."""

    ids: list[int]
    """Token ids of the context."""
    tokens: list[int]
    """Token ids that were generated."""
    limit: int
    """Most tokens to generate."""
    until: list[str]
    """Texts that end it and are left out."""
    cut: bool
    """Whether the context lost its left end."""
    text: str = ""
    """What was generated, up to the first of those."""

    def goes_on(self, token: int, tokenizer: Any) -> bool:
        """Takes another token; False when it is the last one."""
        self.tokens.append(token)
        whole = tokenizer.decode(self.tokens, skip_special_tokens=True)
        self.text = min((whole.split(each)[0] for each in self.until), key=len, default=whole)
        return self.text == whole and len(self.tokens) < self.limit


def run_tasks(
    model: LoadedModel,
    tasks: Sequence[str] = TASKS,
    *,
    data: Path | None = None,
    limit: int | None = None,
    condition: Condition = ORIGINAL,
    batch_tokens: int = TOKENS_PER_PASS,
    progress: Progress = NO_PROGRESS,
) -> Iterator[MeasurementRecord]:
    """Measures a model on zero-shot tasks: one record for each metric of each task.

    Prompts, targets and metrics are those of lm-evaluation-harness. Proportions have the harness's standard error and the
    interval that goes 1.96 of it to both sides. The perplexity of lambada_openai has both from `intervals.perplexity`: the
    harness bootstraps it for minutes.

    Args:
        model: the model.
        tasks: which of `TASKS`.
        data: folder with the items of each task as NAME.jsonl, in the fields that the definitions in `integrations/tasks`
            name; nothing else is read and no network used. None lets the harness fetch its own data.
        limit: at most so many items of each task, the first ones; None takes all.
        condition: the state of the model.
        batch_tokens: most tokens of one pass, padding included.
        progress: hears about requests, a task at a time.

    Raises:
        UnknownNameError: there is no such task.
        UsageError: lm-eval is not installed, a file is missing or wrong, or an edit changes nothing.
        HubError: the data cannot be fetched.
    """
    _require_harness()
    if limit is not None and limit < 1:
        raise UsageError(f"The limit is {limit} items; it must be 1 or more.")
    for name in tasks:
        headline(name)
    for task in [_open_task(name, data, limit) for name in tasks]:
        lm = LoadedModelLM(model, batch_tokens=batch_tokens, condition=condition, title=task.name, progress=progress)
        scores = _score_items(lm, task)
        for metric in scores[0]:
            value = _summary(metric, [each[metric] for each in scores])
            yield measurement(
                metric,
                value,
                unit="1" if metric == "perplexity" else "proportion",
                condition=condition,
                subject=task.name,
                dataset=task.name,
                dataset_digest=task.digest,
            )


@dataclass(frozen=True, slots=True)
class _Task:
    """A task with its items."""

    name: str
    harness: Any
    """The task as the harness knows it."""
    items: list[tuple[Any, list[Any]]]
    """Each item with its requests."""
    digest: str
    """"sha256:" and the SHA-256 of the file, or of the items as JSON where the harness fetched them."""


def _open_task(name: str, data: Path | None, limit: int | None) -> _Task:
    return _fetched_task(name, limit) if data is None else _local_task(name, data, limit)


def _local_task(name: str, data: Path, limit: int | None) -> _Task:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    file = data / f"{name}.jsonl"
    if not file.is_file():
        held = ", ".join(sorted(each.name for each in data.glob("*.jsonl"))) or "no .jsonl file"
        found = f"the folder holds {held}" if data.is_dir() else f"{data} is no folder"
        raise UsageError(f"The items of {name} should be in {file}, but {found}. Put the file there.")
    content = file.read_bytes()
    rows = _parsed(content, file)

    class LocalTask(ConfigurableTask):  # type: ignore[misc]
        def download(self, *_: Any, **__: Any) -> None:
            self.dataset = {self.config.test_split: Dataset.from_list(rows)}

    try:
        made = LocalTask(config=_definitions(_DEFINITIONS).task_index[name].cfg)
        items = _items(name, made, limit)
    except Exception as error:  # whatever a template or a table makes of strange items
        raise UsageError(
            f"Reading {file} as items of {name}: {type(error).__name__}: {error}. {_DEFINITIONS / name}.yaml says which fields "
            "an item has."
        ) from error
    return _Task(name, made, items, f"sha256:{sha256(content).hexdigest()}")


def _parsed(content: bytes, file: Path) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            item = json.loads(line)
        except ValueError as error:
            raise UsageError(f"Reading {file}: line {number} is no JSON: {error}. Write one item a line.") from error
        first = items[0] if items else item
        if not isinstance(item, dict) or item.keys() != first.keys():
            raise UsageError(
                f"Reading {file}: line {number} is not an item with the fields of the first one. Give all items the same."
            )
        items.append(item)
    if not items:
        raise UsageError(f"Reading {file}: it is empty. Write one item a line.")
    return items


def _fetched_task(name: str, limit: int | None) -> _Task:
    import lm_eval.tasks

    # An index of all 14,000 definitions takes half a minute; those of one family lie in one folder.
    folder = Path(lm_eval.tasks.__file__).with_name(name.partition("_")[0])
    try:
        made = _definitions(folder).load([name])["tasks"][name]
    except Exception as error:  # of whatever kind that datasets, or the Hub's client below it, has for this
        raise HubError(
            f"Fetching the items of {name} through lm-eval: {type(error).__name__}: {error}. Go online, or give a folder with "
            f"{name}.jsonl."
        ) from error
    content = json.dumps(list(made.eval_docs), sort_keys=True).encode()
    return _Task(name, made, _items(name, made, limit), f"sha256:{sha256(content).hexdigest()}")


def _definitions(folder: Path) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False)


def _items(name: str, harness: Any, limit: int | None) -> list[tuple[Any, list[Any]]]:
    found = []
    for number, doc in harness.doc_iterator(limit=limit):
        context = harness.fewshot_context(doc=doc, num_fewshot=0)
        made = harness.construct_requests(doc=doc, ctx=context, metadata=(name, number, 1))
        found.append((doc, made if isinstance(made, list) else [made]))
    return found


def _score_items(lm: LoadedModelLM, task: _Task) -> list[dict[str, float]]:
    """What each item adds to each metric: 0 or 1, or the log-likelihood of the target for perplexity.

    The harness's `evaluate` would aggregate them itself, but it prints, forks and overflows on a model that an edit destroyed.
    """
    answers = iter(lm.loglikelihood([request for _, requests in task.items for request in requests]))
    return [task.harness.process_results(doc, [next(answers) for _ in requests]) for doc, requests in task.items]


def _summary(metric: str, values: Sequence[float]) -> Interval:
    if metric == "perplexity":
        return perplexity([-each for each in values])
    known = proportion_interval(round(sum(values)), len(values))
    return replace(known, standard_error=mean_interval(values).standard_error)  # the harness's, with n - 1


def _batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Numbers of rows, longest first, as many together as fit padded in the budget, and one at least."""
    order = sorted(range(len(lengths)), key=lambda each: -lengths[each])
    while order:
        count = max(1, budget // lengths[order[0]])
        yield order[:count]
        order = order[count:]


def _scaling(arguments: Mapping[str, Any]) -> ScaleWeights | None:
    """What `weights` and `scale` ask for."""
    if "weights" not in arguments:
        if "scale" in arguments:
            raise UsageError("scale says what weights are multiplied by: give weights=LAYER:ROW:COL as well.")
        return None
    weights = tuple(Coordinate.parse(each) for each in re.split("[+;]", str(arguments["weights"])))
    try:
        factor = float(arguments.get("scale", 0.0))
    except ValueError as error:
        raise UsageError(f"scale={arguments['scale']} is no number.") from error
    return ScaleWeights(weights, factor)


def _nothing_to_score(where: str) -> str:
    return f"Scoring a continuation behind {where!r}: it adds no token to its context. Give it some text."


def _require_harness() -> None:
    if register_model is None:
        raise UsageError(
            "Running tasks of lm-evaluation-harness needs lm-eval, which is not installed: `pip install superweights[eval]`."
        )


def main() -> int:
    """Runs the harness's command line, which then knows `--model superweights`; gives the exit status."""
    try:
        _require_harness()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except SuperweightsError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status
    return 0


if register_model is not None:
    register_model("superweights")(LoadedModelLM)

if __name__ == "__main__":
    sys.exit(main())
