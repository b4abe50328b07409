"""Models behind an OpenAI-compatible endpoint (vLLM, a hosted model), for lm-evaluation-harness.

Limits: the prompt is the server's own chat template, so nothing here can hold it against the one in training; answers
come without logits, so tasks that compare likelihoods (MMLU) cannot run; a hosted model may change behind its name and
answer differently twice. lm-eval's own client needs a package that axolotl does not bring, hides the reason of a failed
request, and takes an answer that it cannot parse for an empty one; here each of these is an error.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import requests
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from finlora.core.errors import UserError

RETRIES, TIMEOUT, AT_ONCE = 6, 120, 32


class Endpoint(LM):
    """`url`: the server's base URL (http://localhost:8000/v1); `model`: the name it serves; key: OPENAI_API_KEY."""

    def __init__(self, url: str, model: str, backoff: float = 1.0):
        super().__init__()
        self.url, self.model = f"{url.rstrip('/')}/chat/completions", model
        # By prompt what the server counted, of prompt and answer, and whether the answer ended; None where it says not.
        self.tokens: dict[str, tuple[int, int, bool | None]] = {}
        # 429 and 5xx are waited for, as long as Retry-After says.
        retry = Retry(RETRIES, backoff_factor=backoff, status_forcelist=[429, 500, 502, 503, 504], allowed_methods=None)
        self.session = requests.Session()
        for scheme in "http://", "https://":
            self.session.mount(scheme, HTTPAdapter(pool_maxsize=AT_ONCE, max_retries=retry))
        self.key = os.environ.get("OPENAI_API_KEY")
        if self.key:
            self.session.headers["Authorization"] = f"Bearer {self.key}"

    tokenizer_name = ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return json.dumps(chat_history, ensure_ascii=False)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            answers = pool.map(self._answer, [request.args for request in requests])
            return list(tqdm(answers, total=len(requests), desc="requests", disable=disable_tqdm))
        finally:
            pool.shutdown(cancel_futures=True)

    def loglikelihood(self, requests: list) -> list:
        raise UserError(f"{self.url}: an endpoint gives no likelihoods; run this task on the weights (MODEL=)")

    loglikelihood_rolling = loglikelihood

    def _answer(self, request: tuple[str, dict]) -> str:
        prompt, options = request[0], normalize_gen_kwargs(request[1])
        body = {
            "model": self.model,
            "messages": json.loads(prompt),
            "max_tokens": options["max_gen_toks"],
            "temperature": 0,
            **({"stop": options["until"]} if options["until"] else {}),
        }
        try:
            response = self.session.post(self.url, json=body, timeout=TIMEOUT)
        except requests.RequestException as error:
            raise UserError(f"{self.url}: {_reason(error)}; the same command goes on with the answers left") from None
        if not response.ok:
            said = self._said(response, 200)
            raise UserError(f"{self.url}: answered {response.status_code} ({said}); check MODEL and OPENAI_API_KEY")
        try:
            found = response.json()
            answer = found["choices"][0]["message"]["content"]
            usage, why = found.get("usage") or {}, found["choices"][0].get("finish_reason")
            counted = (int(usage.get(f"{part}_tokens", 0)) for part in ("prompt", "completion"))
            self.tokens[prompt] = *counted, None if why is None else why != "length"
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            answer = None
        if not isinstance(answer, str):
            said = self._said(response, 80)
            raise UserError(f"{self.url}: the answer is not a chat completion ({said}); is this an OpenAI endpoint?")
        self.cache_hook.add_partial("generate_until", request, answer)
        return answer

    def _said(self, response: requests.Response, length: int) -> str:
        text = " ".join(response.text.split())
        return (text.replace(self.key, "***") if self.key else text)[:length]


def _reason(error: Exception) -> str:
    text = str(error)
    if "429" in text:
        return f"still answers 429 (too many requests) after {RETRIES} tries; wait, or ask for a higher limit"
    if "too many" in text and "error responses" in text:
        return f"still answers with a server's error after {RETRIES} tries; look at its log"
    if isinstance(error, requests.Timeout):
        return f"no answer within {TIMEOUT} s"
    return "cannot be reached; is the server running?"
