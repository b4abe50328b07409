"""An OpenAI-compatible endpoint: a real HTTP server on this machine that answers, refuses and talks nonsense."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest
from failures import refuses, says
from lm_eval.api.instance import Instance

from finlora.evaluate import endpoint


class Handler(BaseHTTPRequestHandler):
    """Answers with the last word of the prompt; each request first takes the next misdeed from server.script."""

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.log.append((self.path, body, self.headers.get("Authorization")))
            act = server.script.pop(0) if server.script else {}
        act |= next(({"status": 400, "body": text} for key, text in server.refused.items() if key in body), {})
        if act.get("drop"):
            self.close_connection = True
            return self.connection.close()
        text = body["messages"][-1]["content"].split()[-1]
        usage = {"prompt_tokens": 5, "completion_tokens": 1}
        choice = {"message": {"role": "assistant", "content": text}} | act.get("choice", {})
        answer = {"choices": [choice], "usage": usage}
        content = act.get("body", json.dumps(answer)).encode()
        self.send_response(act.get("status", 200))
        for key, value in act.get("headers", {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.send_response(404 if self.server.models not in (None, self.path) else 200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)  # seconds
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket.listen(endpoint.AT_ONCE)  # by default 5 wait; who finds no room asks again a second later
    server.script, server.log, server.lock = [], [], threading.Lock()
    server.models, server.refused = None, {}  # the path of its list of models; parameters that it does not take
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server, texts, model="m"):
    lm = endpoint.Endpoint(server.url, model)
    requests = [
        Instance("generate_until", {}, (lm.apply_chat_template([{"role": "user", "content": text}]), OPTIONS), i)
        for i, text in enumerate(texts)
    ]
    return lm, lm.generate_until(requests, disable_tqdm=True)


OPTIONS = {"max_gen_toks": 7, "do_sample": False, "until": ["\n"]}


def test_every_prompt_is_answered_in_order(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    lm, answers = ask(server, [f"say word{i}" for i in range(50)])
    assert answers == [f"word{i}" for i in range(50)]
    path, body, key = server.log[0]
    assert path == "/v1/chat/completions" and key == "Bearer sk-test"
    assert body["model"] == "m" and body["max_tokens"] == 7 and body["temperature"] == 0 and body["stop"] == ["\n"]
    assert set(lm.tokens.values()) == {(5, 1, None)}


@pytest.mark.parametrize("address", ["http://127.0.0.1:8000", "http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"])
def test_errors_name_the_address_that_is_asked(address):
    assert endpoint.Endpoint(address, "m").url == f"{address.rstrip('/')}/chat/completions"


@pytest.mark.parametrize(("reason", "ended"), [("stop", True), ("length", False), (None, None)])
def test_an_answer_that_the_server_cut_is_known_as_such(server, reason, ended):
    server.script = [{"choice": {"finish_reason": reason}}]
    assert set(ask(server, ["say yes"])[0].tokens.values()) == {(5, 1, ended)}


@pytest.mark.parametrize(
    "misdeed", [{"status": 429, "headers": {"Retry-After": "0"}}, {"status": 503}, {"drop": True}], ids=str
)
def test_what_passes_is_waited_for(server, misdeed):
    server.script = [misdeed] * 3
    assert ask(server, ["say yes"])[1] == ["yes"]
    assert len(server.log) == 4


NO_COMPLETION = ("chat completion", "OpenAI")
LASTING = {
    "429 for ever": ({"status": 429}, ["429", "8 tries|8 times|8 retries", "wait"]),
    "500 for ever": ({"status": 500}, ["server", "8 tries|8 times|8 retries", "log"]),
    "401": ({"status": 401, "body": '{"error": "no such key"}'}, ["401", "no such key", "MODEL", "OPENAI_API_KEY"]),
    "404": ({"status": 404, "body": "not\n here"}, ["404", "not here", "MODEL"]),
    "garbage": ({"body": "<html>hello</html>"}, NO_COMPLETION),
    "another JSON": ({"body": '{"choice": []}'}, NO_COMPLETION),
    "a text that is none": ({"body": '{"choices": [{"message": {"content": 1}}]}'}, NO_COMPLETION),
    "a list": ({"body": "[1]"}, NO_COMPLETION),
    "choices that are no list": ({"body": '{"choices": {"a": 1}}'}, NO_COMPLETION),
}


@pytest.mark.parametrize("case", LASTING)
def test_what_lasts_is_one_line(server, case):
    misdeed, words = LASTING[case]
    server.script = [misdeed] * 40
    with refuses(*words, file=f"{server.url}/chat/completions"):
        ask(server, ["say yes"])


NO_TEXT = {
    "null": ({"choice": {"message": {"content": None}}}, "no text"),
    "cut before its text": ({"choice": {"message": {"content": None}, "finish_reason": "length"}}, "length"),
    "a filter": ({"choice": {"message": {}, "finish_reason": "content_filter"}}, "content_filter"),
    "no choice": ({"body": '{"choices": []}'}, "no choice"),
    "an empty choice": ({"body": '{"choices": [{}], "usage": {"prompt_tokens": null}}'}, "no text"),
    "a filter on the prompt": ({"status": 400, "body": '{"error": {"code": "content_filter"}}'}, "content_filter"),
}


@pytest.mark.parametrize("case", NO_TEXT)
def test_an_answer_without_text_is_empty_and_stops_nothing(server, case):
    act, reason = NO_TEXT[case]
    server.script = [act]
    lm, answers = ask(server, ["say one", "say two", "say three"])
    assert sorted(answers)[0] == "" and len(set(answers)) == 3
    assert list(lm.reasons.values()) == [reason] and len(lm.tokens) == 3


@pytest.mark.parametrize("parameter", ["max_tokens", "temperature", "stop"])
def test_a_parameter_that_a_server_does_not_take_is_replaced(server, parameter, capsys):
    text = f"Unsupported parameter: '{parameter}' is not supported with this model."
    server.refused = {parameter: json.dumps({"error": {"message": text, "param": parameter}})}
    assert ask(server, [f"say word{i}" for i in range(9)])[1] == [f"word{i}" for i in range(9)]
    answered = [body for _, body, _ in server.log if parameter not in body]
    assert len(answered) == 9
    assert all(("max_completion_tokens" in body) == (parameter == "max_tokens") for body in answered)
    (line,) = capsys.readouterr().err.splitlines()
    says(line, parameter, file="warning")


def test_an_address_is_kept_where_the_other_one_answers_with_an_error(server, capsys):
    """With no list of models here, a 401 there says nothing of this address."""
    statuses = iter([404, 401])

    class Lists(Handler):
        def do_GET(self):
            self.send_response(next(statuses))
            self.end_headers()

    server.RequestHandlerClass = Lists
    lm, answers = ask(server, ["say yes"])
    assert answers == ["yes"] and lm.url == f"{server.url}/chat/completions" and not capsys.readouterr().err


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/chat/completions"])
def test_an_address_with_and_without_v1(server, ending, capsys):
    server.models, url = "/v1/models", server.url
    server.url = url.removesuffix("/v1") + ending
    lm, answers = ask(server, ["say yes"])
    assert answers == ["yes"] and lm.url == f"{url}/chat/completions"
    assert ("taking" in capsys.readouterr().err) == (not ending.startswith("/v1"))


def test_nobody_listens_and_it_is_said_at_once():
    began = time.monotonic()
    with refuses("reach", "server", "running", file="http://127.0.0.1:9/v1/chat/completions"):
        lm = endpoint.Endpoint("http://127.0.0.1:9/v1", "m")
        lm.generate_until([Instance("generate_until", {}, ("[]", OPTIONS), 0)])
    assert time.monotonic() - began < 5, "the first retry alone would wait longer in all"


def test_no_key_in_an_error(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-key")
    server.script = [{"status": 401, "body": "wrong key sk-secret-key given"}]
    with refuses("401", "wrong key *** given") as error:
        ask(server, ["say yes"])
    assert "sk-secret-key" not in str(error.value)


def test_likelihoods_are_not_to_be_had(server):
    lm, _ = ask(server, ["say yes"])
    with refuses("likelihoods", "weights", "MODEL="):
        lm.loglikelihood([])
