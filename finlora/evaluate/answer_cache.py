"""Answers that are there already are not asked for again."""

import json
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finlora.core.errors import UserError
from finlora.core.paths import shown


@contextmanager
def remembering(lm, path: Path):
    """Within the block lm answers from `path` what it has answered before, and appends every new answer to it.

    lm-eval's own cache pickles, and writes from a thread whose errors nobody sees; this one is JSON, a line an answer,
    and a full disk stops the run with all that was answered until then.
    """
    import threading

    from lm_eval.api.model import hash_args

    known, lock, asked = {}, threading.Lock(), {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                key, answer, tokens = json.loads(line)
                known[key] = tuple(answer) if isinstance(answer, list) else answer, tokens
            except ValueError:
                continue  # the line that a killed run was writing
        print(f"going on after {len(known)} answers", flush=True)
    file = path.open("a", encoding="utf-8")
    file.write("\n" if known else "")

    class Hook:
        def add_partial(self, kind: str, request: Any, answer: Any) -> None:
            with lock:
                line = [hash_args(kind, request), answer, lm.tokens.get(request[0])]
                try:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()
                except OSError as error:
                    raise UserError(
                        f"{shown(str(path))}: cannot be written ({error.strerror}); free some space and run the "
                        "same command again: it goes on from there"
                    ) from error

    def answering(kind: str):
        def respond(requests: list, **options: Any) -> list:
            keys = [hash_args(kind, request.args) for request in requests]
            left = {key: request for key, request in zip(keys, requests, strict=True) if key not in known}
            if left:
                for key, answer in zip(left, asked[kind](list(left.values()), **options), strict=True):
                    known[key] = answer, lm.tokens.get(left[key].args[0])
            for key, request in zip(keys, requests, strict=True):
                lm.tokens[request.args[0]] = known[key][1]
            return [known[key][0] for key in keys]

        return respond

    lm.set_cache_hook(Hook())
    for kind in "generate_until", "loglikelihood":
        asked[kind] = getattr(lm, kind)
        setattr(lm, kind, answering(kind))
    try:
        yield
    finally:
        with suppress(OSError):  # of a disk that is full: said already
            file.close()
