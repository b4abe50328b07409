"""Models behind an OpenAI-compatible endpoint (vLLM, a hosted model), for lm-evaluation-harness.

Limits: the prompt is the server's own chat template, so it cannot be compared with the one in training; answers come
without logits, so tasks that compare likelihoods (MMLU) cannot run; a hosted model may change behind its name and
answer differently twice.

lm-eval 0.4.11's own client (local-chat-completions) does not suffice: it needs tenacity, which axolotl does not bring;
after its retries it raises tenacity's RetryError without the server's reason; it takes an answer that it cannot parse
for an empty one; and it drops the token counts and the finish reason, which are kept with every answer here.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import requests
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from finlora.core.errors import UserError

RETRIES = 6
TIMEOUT = 120  # seconds: a busy server queues requests
CONNECT = 10  # seconds until a server that does not answer at all is called down
AT_ONCE = 32  # requests in flight; vLLM batches them
# What newer servers do not take, and what they take in its place (OpenAI's reasoning models).
REPLACED = {"max_tokens": "max_completion_tokens", "temperature": None, "stop": None}


class Endpoint(LM):
    """`url`: the server's base URL (http://localhost:8000/v1); `model`: the name it serves; key: OPENAI_API_KEY.

    `tokens` maps a prompt to what the server counted (prompt tokens, answer tokens) and whether the answer ended, which
    is None where it gives no finish reason. `reasons` maps a prompt to why its answer has no text; such an answer is
    empty. Answers 429 and 5xx are retried RETRIES times, after Retry-After or `backoff` x 2^n seconds. Raises UserError
    for whatever keeps a request from being answered; at once where no server is there.
    """

    tokenizer_name = ""

    def __init__(self, url: str, model: str, backoff: float = 1.0):
        super().__init__()
        self.url, self.model = f"{url.rstrip('/').removesuffix('/chat/completions')}/chat/completions", model
        self.tokens: dict[str, tuple[int, int, bool | None]] = {}
        self.reasons: dict[str, str] = {}
        self.replaced: set[str] = set()
        retry = Retry(RETRIES, backoff_factor=backoff, status_forcelist=[429, 500, 502, 503, 504], allowed_methods=None)
        self.session = requests.Session()
        for scheme in "http://", "https://":
            self.session.mount(scheme, HTTPAdapter(pool_maxsize=AT_ONCE, max_retries=retry))
        self.key = os.environ.get("OPENAI_API_KEY")
        if self.key:
            self.session.headers["Authorization"] = f"Bearer {self.key}"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return json.dumps(chat_history, ensure_ascii=False)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        self.check_address()
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            answers = pool.map(self._answer, [request.args for request in requests])
            return list(tqdm(answers, total=len(requests), desc="requests", disable=disable_tqdm))
        finally:
            pool.shutdown(cancel_futures=True)

    def loglikelihood(self, requests: list) -> list:
        raise UserError(f"{self.url}: an endpoint gives no likelihoods; run this task on the weights (MODEL=)")

    loglikelihood_rolling = loglikelihood

    def check_address(self) -> None:
        """UserError where nobody listens, without a retry; where only the address with (or without) /v1 answers, it."""
        base = self.url.removesuffix("/chat/completions")
        for address in (base, base.removesuffix("/v1") if base.endswith("/v1") else f"{base}/v1"):
            try:
                models = requests.get(f"{address}/models", headers=self.session.headers, timeout=CONNECT)
            except requests.Timeout:
                return  # somebody listens, and is busy
            except requests.RequestException as error:
                raise UserError(f"{self.url}: {_reason(error)}") from None
            if models.ok and address != base:
                print(f"ENDPOINT={base}: nothing is there; taking {address}", file=sys.stderr)
                self.url = f"{address}/chat/completions"
            if models.ok or models.status_code != 404:
                return

    def _answer(self, request: tuple[str, dict]) -> str:
        prompt, options = request[0], normalize_gen_kwargs(request[1])
        body = {"messages": json.loads(prompt), "max_tokens": options["max_gen_toks"], "temperature": 0}
        body |= {"model": self.model} | ({"stop": options["until"]} if options["until"] else {})
        response = self._post(body)
        if response.status_code == 400 and "content_filter" in response.text:
            answer, self.reasons[prompt], self.tokens[prompt] = "", "content_filter", (0, 0, None)
        elif not response.ok:
            text = self._text(response, 200)
            raise UserError(
                f"{self.url}: answered {response.status_code} ({text}); check ENDPOINT, MODEL and OPENAI_API_KEY"
            )
        else:
            answer = self._text_of(prompt, response)
        self.cache_hook.add_partial("generate_until", request, answer)
        return answer

    def _post(self, body: dict) -> requests.Response:
        """The server's answer to a request, without the parameters that it does not take."""
        while True:
            sent = {(REPLACED[key] if key in self.replaced else key): value for key, value in body.items()}
            sent.pop(None, None)
            try:
                response = self.session.post(self.url, json=sent, timeout=TIMEOUT)
            except requests.RequestException as error:
                raise UserError(
                    f"{self.url}: {_reason(error)}. The same command resumes from the answers that are kept."
                ) from None
            text = response.text.lower() if response.status_code == 400 else ""
            refused = next((key for key in REPLACED if key in sent and f"'{key}'" in text and "support" in text), None)
            if refused is None:
                return response
            if refused not in self.replaced:
                self.replaced.add(refused)
                instead = f"sending {REPLACED[refused]}" if REPLACED[refused] else "leaving it out"
                print(f"warning: {self.url}: does not take {refused}; {instead}", file=sys.stderr)

    def _text_of(self, prompt: str, response: requests.Response) -> str:
        """The answer of a chat completion, empty where it holds no text; what the server counted goes to `tokens`."""
        try:
            completion = response.json()
            choice = (completion["choices"] or [{}])[0]
            usage, message = completion.get("usage") or {}, choice.get("message") or {}
            answer, why = message.get("content"), choice.get("finish_reason")
            counted = (int(usage.get(f"{part}_tokens") or 0) for part in ("prompt", "completion"))
            self.tokens[prompt] = *counted, None if why is None else why != "length"
            if not isinstance(answer, str | None):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError):
            text = self._text(response, 80)
            raise UserError(
                f"{self.url}: the answer is not a chat completion ({text}); is this an OpenAI endpoint?"
            ) from None
        if answer is None:
            self.reasons[prompt] = why or ("no text" if completion["choices"] else "no choice")
        return answer or ""

    def _text(self, response: requests.Response, length: int) -> str:
        """The beginning of what the server answered, on one line and without the key."""
        text = " ".join(response.text.split())
        return (text.replace(self.key, "***") if self.key else text)[:length]


def _reason(error: Exception) -> str:
    text = str(error)
    if "429 error" in text:  # not a port or an address
        return f"still answers 429 (too many requests) after {RETRIES} tries; wait, or ask for a higher limit"
    if "too many" in text and "error responses" in text:
        return f"still answers with a server's error after {RETRIES} tries; look at its log"
    if isinstance(error, requests.Timeout):
        return f"no answer within {TIMEOUT} s"
    return "cannot be reached; check that the server is running"
