"""Talk to a trained adapter in the terminal, with the chat template that is saved beside it (`make chat`).

finlora chat --recipe sentiment_r8_dora [--tiny] [--keep-quantised]

It loads the merged model where there is one, else merges the adapter in memory; with --keep-quantised the base stays
quantised, unmerged, with DoRA's norms cached. `axolotl inference --chat` takes the template from the recipe instead of
the adapter's folder, samples, applies a repetition penalty, and refuses a pipe; `transformers chat` samples and needs a
server.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress

from transformers import TextStreamer

from finlora.core.paths import shown
from finlora.export.merged import merged_folder
from finlora.models import load as models
from finlora.models.trained import TrainedModel, disable_hub, fetch_base_model


def load(trained: TrainedModel, prompt: str, keep_quantised: bool):
    """(model, tokenizer, what they are, in words)."""
    folder = None if keep_quantised or prompt != "saved" else merged_folder(trained)
    if not folder:
        fetch_base_model(trained)
    disable_hub()
    if folder:
        return models.load_base(str(folder), 16), models.load_tokenizer(str(folder), None, prompt), shown(str(folder))
    tokenizer = models.load_tokenizer(trained.base_model, trained.adapter, prompt)
    models.check_fits(trained.adapter, trained.facts, trained.base_model)
    if keep_quantised and trained.bits != 16:
        model, state = models.as_trained(trained), "not merged"
    else:
        base = models.load_base(trained.base_model, trained.bits)
        model, state = models.attach(base, trained.adapter), "merged in memory"
    return (
        model,
        tokenizer,
        f"{shown(str(trained.adapter))}, {state}, on {trained.bits}-bit {shown(trained.base_model)}",
    )


class AnswerStreamer(TextStreamer):
    """Prints an answer as it is written, without its end: transformers would print one that is no special token."""

    def __init__(self, tokenizer, ends: Sequence[int]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.ends = set(ends)

    def put(self, value) -> None:
        if value.numel() != 1 or value.item() not in self.ends:  # the prompt comes whole, then one token at a time
            super().put(value)


def chat(model, tokenizer, max_new_tokens: int, eot_tokens: Sequence[str] = ()) -> None:
    """Answer lines from the terminal or a pipe, greedily and token by token, until Ctrl-D, Ctrl-C or the end.

    The prompt is the whole conversation, tokenized anew for each answer; /new starts another conversation.
    """
    from finlora.models.generate import padded  # late: it imports lm_eval, which takes seconds, and bitsandbytes

    ends = models.end_tokens(model, tokenizer, eot_tokens)
    terminal = sys.stdin.isatty()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 (line editing; importing it has effects on input(), so only in a terminal)
        print("/new starts a new conversation; Ctrl-C ends an answer; Ctrl-D leaves")
    turns: list[dict[str, str]] = []
    while True:
        try:
            text = input("> " if terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/new":
            turns = []
        if not text or text == "/new":
            continue
        turns.append({"role": "user", "content": text})
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        if len(prompt) + max_new_tokens > model.config.max_position_embeddings:
            print("the conversation is more than the model can take; /new starts another", file=sys.stderr)
            turns.pop()
            continue
        try:
            streamer = AnswerStreamer(tokenizer, ends)
            (answer,) = padded(model, tokenizer, [prompt], max_new_tokens, ends=ends, streamer=streamer)
        except KeyboardInterrupt:
            print()
            turns.pop()
            continue
        turns.append({"role": "assistant", "content": answer.text})


def run(trained: TrainedModel, prompt: str, keep_quantised: bool, max_new_tokens: int) -> None:
    """Load the model, print what it is, and chat."""
    model, tokenizer, description = load(trained, prompt, keep_quantised)
    print(f"chatting with {trained.name}: {description}", file=sys.stderr, flush=True)
    chat(model, tokenizer, max_new_tokens, trained.eot_tokens)
