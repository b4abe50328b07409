"""Chat templates: which tokens end an answer, and whether training's prompt is the one that will be served."""

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from fastdora.plugin.errors import first_line
from fastdora.plugin.keys import RecipeError

# Axolotl (0.19.0) looks for the end of a turn among the token after the answer and the three that follow it.
END_WITHIN = 4
ROWS = 32  # of each file are rendered, spread over it evenly: seconds, however long the file is
SHOWN = 12  # tokens of a prompt that an error shows
# Axolotl's templates that pass `check` with a tokenizer that has the token, which begins their turns.
FITTING = {"<|start_header_id|>": "llama3", "<|im_start|>": "chatml"}


class _Place(NamedTuple):
    """A row of a data file: what an error begins with."""

    source: str
    name: str  # datasets.0
    entry: dict[str, Any]
    template: Any  # the recipe's chat_template
    line: int

    def of(self, key: str) -> str:
        """As `recipe: key 'chat_template': file:line`; the key is the entry's where that has it."""
        # Axolotl (0.19.0) gives an entry without a template the tokenizer's, which is the recipe's by now.
        same = key == "chat_template" and self.entry.get(key) in ("tokenizer_default", self.template)
        own = key in ("roles_to_train", "field_messages") or (self.entry.get(key) and not same)
        inside = f"{self.name}." if own else ""
        return f"{self.source}: key '{inside}{key}': {self.entry['path']}:{self.line}"


def end_of_turn_tokens(tokenizer, eot_tokens: Sequence[str] = ()) -> list[int]:
    """The token ids at which an answer ends: what the chat template writes after it, and the end of sequence.

    eot_tokens: axolotl's key of a recipe, which may name more. A model's generation_config.json may list others still.
    """
    vocabulary = tokenizer.get_vocab()
    ends = {vocabulary.get(token) for token in eot_tokens} | {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        try:
            ends.add(end_of_turn(tokenizer))
        except (TemplateError, TypeError):  # a template that has no place for an answer can still ask for one
            pass
    return sorted(ends - {None})


def end_of_turn(tokenizer, chat_template: str | None = None, **arguments: Any) -> int | None:
    """The id of the token that a chat template writes after an answer; None where it is not one token of its own.

    chat_template: another than the tokenizer's. arguments: the template's. Raises TemplateError or TypeError where it
    cannot be rendered.
    """
    answer = "positive"
    turns = [{"role": "user", "content": "Sales rose."}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, chat_template=chat_template, **arguments)
    after = tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    own = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    return next((token for token in after[:END_WITHIN] if token in own), None)


def check(cfg, tokenizer, source: str) -> None:
    """Raise RecipeError where training has another prompt than serving, or does not teach an answer's end.

    cfg: axolotl's configuration, with the paths of `datasets` and `test_datasets` as they can be opened from here.
    tokenizer: axolotl's for this recipe, whose chat template is the served one. source: what an error begins with.

    Some rows of each file go through axolotl's own prompt strategy. What stands before an answer's first label must be,
    token for token, what `add_generation_prompt` renders, and the token that ends the answer must have a label.
    """
    # Imported here: it takes as long as transformers does, which what only generates does not need.
    from axolotl.prompt_strategies.chat_template import load

    for key in ("datasets", "test_datasets"):
        for number, entry in enumerate(cfg.get(key) or []):
            file = Path(entry["path"])
            if entry.get("type") != "chat_template" or not file.is_file():
                continue  # others are refused, or read, by who loads them
            name = f"{key}.{number}"
            try:
                strategy = load(tokenizer, cfg, ds_cfg=dict(entry))
            except ValueError as error:  # its own checks of eot_tokens, train_on_eos and train_on_eot
                fault = first_line(error)
                where = "eot_tokens" if fault.startswith("EOT token") else name
                raise RecipeError(f"{source}: key '{where}': {fault}") from error
            for line, row in _some_rows(file):
                _check_row(strategy, tokenizer, row, _Place(source, name, entry, cfg.get("chat_template"), line))


def _some_rows(file: Path):
    """(line, row) of at most ROWS rows, spread evenly over a file of JSON lines."""
    with file.open("rb") as lines:
        count = sum(1 for _ in lines)
    with file.open("rb") as lines:
        for line, text in islice(enumerate(lines, 1), 0, None, -(-count // ROWS) or 1):
            try:
                yield line, json.loads(text)
            except ValueError:  # an empty line, or another format; axolotl says so when it loads the file
                continue


def _check_row(strategy, tokenizer, row: dict[str, Any], place: _Place) -> None:
    template = place.of("chat_template")
    prompter = strategy.prompter
    field = place.entry.get("field_messages") or "messages"
    if not isinstance(row, dict) or not row.get(field):
        raise RecipeError(
            f"{place.of('field_messages')}: the row has no '{field}'; write the turns there, as a list of "
            "{role, content}, or name the key that has them"
        )
    try:
        trained = strategy.tokenize_prompt(dict(row))
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise RecipeError(
            f"{template}: cannot be rendered ({first_line(error)}); set the token that it needs "
            "under special_tokens, to one that the tokenizer has, or choose another template"
        ) from error
    ids, labels = trained["input_ids"], trained["labels"]
    turns, tools = strategy.get_conversation_thread(row), row.get(prompter.field_tools)
    if not str(turns[-1].get("content") or "").strip():
        return  # fastdora/plugin/rows.py counts rows without an answer
    earlier = _tokens(tokenizer, turns[:-1], tools=tools, chat_template=prompter.chat_template)
    begins = _common(ids, earlier)  # the last turn does; labels before it are other turns'
    start = next((i for i in range(begins, len(ids)) if labels[i] != -100), None)
    if start is None:
        raise RecipeError(
            f"{place.of('roles_to_train')}: no token of the last message trains; make it the assistant's, and "
            "roles_to_train too"
        )
    served = _tokens(tokenizer, turns[:-1], tools=tools, add_generation_prompt=True)
    if ids[:start] != served:
        same = max(0, _common(ids[:start], served) - 3)
        before, asked = (tokenizer.decode(tokens[same : same + SHOWN]) for tokens in (ids[:start], served))
        raise RecipeError(
            f"{template}: trains an answer after ...{before!r}, and will be asked for one after "
            f"...{asked!r}; {_choose(tokenizer)}"
        )
    end = end_of_turn(tokenizer, prompter.chat_template, **prompter.chat_template_kwargs)
    if end is None:
        raise RecipeError(
            f"{template}: after an answer it writes no token of this tokenizer's own, so that no answer would end; "
            f"{_choose(tokenizer)}"
        )
    if end not in labels[start:]:
        name = tokenizer.convert_ids_to_tokens(end)
        key = next((key for key in ("train_on_eos", "train_on_eot") if place.entry.get(key)), "eot_tokens")
        raise RecipeError(
            f"{place.of(key)}: {name} ends an answer and has no label, so that no answer would end; set "
            f"eot_tokens: ['{name}'], and leave train_on_eos and train_on_eot out"
        )


def _choose(tokenizer) -> str:
    """What to do about a template that does not fit this tokenizer."""
    name = next((name for token, name in FITTING.items() if token in tokenizer.get_vocab()), None)
    return f"choose a template of this base model's{f', {name}' if name else ''}, or write one (jinja)"


def _tokens(tokenizer, turns: list[dict[str, Any]], **arguments: Any) -> list[int]:
    return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, **arguments) if turns else []


def _common(some: list[int], others: list[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(some, others, strict=False))
    return next((number for number, (one, other) in pairs if one != other), min(len(some), len(others)))
