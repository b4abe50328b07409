"""Answers of an interrupted evaluation, kept in a file, so that they are not asked for again.

lm-eval's own cache (CachingLM) pickles into SQLite and writes from a thread whose errors nobody sees. Here an answer is
a line of JSON, [key, answer, token counts], and a full disk stops the run with all that was answered until then.
"""

import json
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM, hash_args

from finlora.core.errors import UserError
from finlora.core.paths import shown


class CachedLM(LM):
    """`lm` for lm-eval, with its answers kept in the file `path`; a context manager that closes the file.

    `tokens` is lm's: it maps a prompt to the token counts of prompt and answer and whether the answer ended. `reasons`
    is an endpoint's, for answers without text.
    """

    def __init__(self, lm: LM, path: Path):
        super().__init__()
        self.lm, self.tokens, self.path, self.lock = lm, lm.tokens, path, threading.Lock()
        self.reasons: dict[str, str] = getattr(lm, "reasons", {})
        self.answers: dict[str, tuple[Any, Any]] = {}  # by key: the answer, and the model's token counts for it
        if path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    key, answer, counts = json.loads(line)
                    self.answers[key] = tuple(answer) if isinstance(answer, list) else answer, counts
                except ValueError:
                    continue  # the line that a killed run was writing
            print(f"resuming after {len(self.answers)} answers", flush=True)
        self.file = path.open("a", encoding="utf-8")
        self.file.write("\n" if self.answers else "")  # ends a line that was cut
        lm.set_cache_hook(self)

    def __enter__(self) -> "CachedLM":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # a full disk, which add_partial reported
            self.file.close()

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """lm-eval's hook: called with every new answer as it comes, from any thread."""
        line = json.dumps([hash_args(kind, request), answer, self.tokens.get(request[0])], ensure_ascii=False)
        with self.lock:
            try:
                self.file.write(line + "\n")
                self.file.flush()
            except OSError as error:
                raise UserError(
                    f"{shown(str(self.path))}: cannot be written ({error.strerror}); free some space and run the "
                    "same command again: it resumes from there"
                ) from error

    def keep(self, rows: list[dict[str, Any]], options: dict[str, Any]) -> None:
        """Take rows of answers.jsonl for the answers to their prompts under lm-eval's generation options."""
        for row in rows:
            key = hash_args("generate_until", (row["prompt"], options))
            counts = row["prompt_tokens"], row["answer_tokens"], row["stopped"]
            self.answers.setdefault(key, (row["answer"], counts))

    def generate_until(self, requests: list) -> list[str]:
        return self._answer("generate_until", self.lm.generate_until, requests)

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        return self._answer("loglikelihood", self.lm.loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list) -> list[float]:
        return self.lm.loglikelihood_rolling(requests)

    def _answer(self, kind: str, ask, requests: list) -> list:
        keys = [hash_args(kind, request.args) for request in requests]
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in self.answers}
        if new:
            for (key, request), answer in zip(new.items(), ask(list(new.values())), strict=True):
                self.answers[key] = answer, self.tokens.get(request.args[0])
        for key, request in zip(keys, requests, strict=True):
            self.tokens[request.args[0]] = self.answers[key][1]
        return [self.answers[key][0] for key in keys]

    @property
    def tokenizer_name(self) -> str:
        return self.lm.tokenizer_name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.lm.chat_template(chat_template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.lm.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)
