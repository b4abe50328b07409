"""Models behind an OpenAI-compatible endpoint (vLLM, a hosted model), for lm-evaluation-harness.

Limits: the prompt is the server's own chat template, so it cannot be compared with the one in training; answers come
without logits, so tasks that compare likelihoods (MMLU) cannot run; a hosted model may change behind its name and
answer differently twice.

OpenAI's own client makes the requests and the retries. lm-eval 0.4.11's (local-chat-completions) does not suffice: it
needs tenacity, which axolotl does not bring; after its retries it raises tenacity's RetryError without the server's
reason; it takes an answer that it cannot parse for an empty one; and it drops the token counts and the finish reason,
which are kept with every answer here.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from openai.types.chat import ChatCompletion

from finlora.core.errors import UserError
from finlora.core.progress import progress

RETRIES = 8  # half a minute where the server does not say how long to wait
TIMEOUT = 120  # seconds: a busy server queues requests
CONNECT = 10  # seconds until a server that does not answer at all is called down
AT_ONCE = 32  # requests in flight; vLLM batches them
# What newer servers do not take, and what they take in its place (OpenAI's reasoning models).
REPLACED = {"max_tokens": "max_completion_tokens", "temperature": None, "stop": None}


class Endpoint(LM):
    """`url`: the server's base URL (http://localhost:8000/v1); `model`: the name it serves; key: OPENAI_API_KEY.

    `tokens` maps a prompt to what the server counted (prompt tokens, answer tokens) and whether the answer ended, which
    is None where it gives no finish reason. `reasons` maps a prompt to why its answer has no text; such an answer is
    empty. Answers 429 and 5xx are retried RETRIES times. Raises UserError for whatever keeps a request from being
    answered; at once where no server is there.
    """

    tokenizer_name = ""

    def __init__(self, url: str, model: str):
        super().__init__()
        self.model, self.key = model, os.environ.get("OPENAI_API_KEY")
        base = url.rstrip("/").removesuffix("/chat/completions")
        self.client = openai.OpenAI(
            base_url=base, api_key=self.key or "none", max_retries=RETRIES, timeout=httpx.Timeout(TIMEOUT)
        )
        self.tokens: dict[str, tuple[int, int, bool | None]] = {}
        self.reasons: dict[str, str] = {}
        self.replaced: set[str] = set()

    @property
    def url(self) -> str:
        base = str(self.client.base_url).rstrip("/")  # which ends with a stroke only where the address has a path
        return f"{base}/chat/completions"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return json.dumps(chat_history, ensure_ascii=False)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        self.check_address()
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            answers = []
            with progress("answers", "row") as show:
                for answer in pool.map(self._answer, [request.args for request in requests]):
                    answers.append(answer)
                    show(len(answers), len(requests))
            return answers
        finally:
            pool.shutdown(cancel_futures=True)

    def loglikelihood(self, requests: list) -> list:
        raise UserError(f"{self.url}: an endpoint gives no likelihoods; run this task on the weights (MODEL=)")

    loglikelihood_rolling = loglikelihood

    def check_address(self) -> None:
        """UserError where nobody listens, without a retry; where only the address with (or without) /v1 answers, it."""
        base = str(self.client.base_url).rstrip("/")
        for address in (base, base.removesuffix("/v1") if base.endswith("/v1") else f"{base}/v1"):
            client = self.client.with_options(base_url=address, max_retries=0, timeout=CONNECT)
            try:
                client.get("/models", cast_to=httpx.Response)
            except openai.NotFoundError:
                continue
            except openai.APIStatusError:  # a server, with no list of models; of the other address it proves nothing
                if address != base:
                    continue
            except openai.APITimeoutError:
                return  # somebody listens, and is busy
            except openai.APIConnectionError as error:
                raise self._error(error) from None
            if address != base:
                print(f"ENDPOINT={base}: nothing is there; taking {address}", file=sys.stderr)
                self.client.base_url = address
            return

    def _answer(self, request: tuple[str, dict]) -> str:
        prompt, options = request[0], normalize_gen_kwargs(request[1])
        parameters = {"max_tokens": options["max_gen_toks"], "temperature": 0}
        parameters |= {"stop": options["until"]} if options["until"] else {}
        try:
            answer = self._text_of(prompt, self._complete(json.loads(prompt), parameters))
        except openai.BadRequestError as error:
            if "content_filter" not in error.response.text:
                raise self._error(error) from None
            answer, self.reasons[prompt], self.tokens[prompt] = "", "content_filter", (0, 0, None)
        except openai.APIError as error:
            raise self._error(error) from None
        self.cache_hook.add_partial("generate_until", request, answer)
        return answer

    def _complete(self, messages: list[dict[str, str]], parameters: dict) -> ChatCompletion:
        """The server's answer to a request, without the parameters that it does not take."""
        while True:
            sent = {(REPLACED[key] if key in self.replaced else key): value for key, value in parameters.items()}
            sent.pop(None, None)
            try:
                return self.client.chat.completions.create(model=self.model, messages=messages, **sent)
            except openai.BadRequestError as error:
                text = error.response.text.lower()
                refused = next((key for key in REPLACED if key in sent and f"'{key}'" in text), None)
                if refused is None or "support" not in text:
                    raise
                if refused not in self.replaced:
                    self.replaced.add(refused)
                    instead = f"sending {REPLACED[refused]}" if REPLACED[refused] else "leaving it out"
                    print(f"warning: {self.url}: does not take {refused}; {instead}", file=sys.stderr)

    def _text_of(self, prompt: str, completion: ChatCompletion) -> str:
        """The answer of a chat completion, empty where it has no text; what the server counted goes to `tokens`.

        The client does not check what servers send: any attribute may be missing, or of another type.
        """
        choices = getattr(completion, "choices", None)
        choice = choices[0] if isinstance(choices, list) and choices else None
        answer, why = getattr(getattr(choice, "message", None), "content", None), getattr(choice, "finish_reason", None)
        if not isinstance(choices, list) or not isinstance(answer, str | None):
            text = (
                completion.model_dump_json(warnings=False)
                if isinstance(completion, ChatCompletion)
                else str(completion)
            )
            raise UserError(
                f"{self.url}: the answer is not a chat completion ({self._line(text, 80)}); is this an OpenAI endpoint?"
            )
        counted = (getattr(completion.usage, f"{part}_tokens", None) or 0 for part in ("prompt", "completion"))
        self.tokens[prompt] = *counted, None if why is None else why != "length"
        if answer is None:
            self.reasons[prompt] = why or ("no text" if choice else "no choice")
        return answer or ""

    def _error(self, error: openai.APIError) -> UserError:
        if isinstance(error, openai.RateLimitError):
            why = f"still answers 429 (too many requests) after {RETRIES} retries; wait, or ask for a higher limit"
        elif isinstance(error, openai.InternalServerError):
            why = f"still answers with a server's error after {RETRIES} retries; look at its log"
        elif isinstance(error, openai.APIStatusError):
            text = self._line(error.response.text, 200)
            why = f"answered {error.status_code} ({text}); check ENDPOINT, MODEL and OPENAI_API_KEY"
        elif isinstance(error, openai.APITimeoutError):
            why = f"no answer within {TIMEOUT} s"
        else:
            why = "cannot be reached; check that the server is running"
        return UserError(f"{self.url}: {why}. The same command resumes from the answers that are kept")

    def _line(self, text: str, length: int) -> str:
        """The beginning of what the server answered, on one line and without the key."""
        text = " ".join(text.split())
        return (text.replace(self.key, "***") if self.key else text)[:length]
