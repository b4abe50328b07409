"""BERTScore F1 (Zhang et al. 2020, section 3) on any BERT-like encoder: no idf weights, no rescaling with a baseline.

Equal to the authors' bert-score 0.3.13 for BERT encoders pair by pair, and right where that is not: it stops on empty
answers, and in a batch padding is the best match, of similarity 0, of tokens whose similarities are all negative.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from finlora.core.errors import UserError
from finlora.evaluate.questions import Encoder
from finlora.evaluate.scorers import after_answer

ENCODER, LAYER = Encoder()
ADVICE = (
    f"ENCODER=<folder or hub id> names one; {ENCODER} is fetched from the hub where there is a network (HF_TOKEN for a "
    "gated one) or taken from the cache under HF_HOME"
)


def add_bertscore(rows: list[dict[str, Any]], encoder: Encoder) -> None:
    """Give each row its BERTScore F1."""
    values = bertscore([after_answer(row["answer"]) for row in rows], [row["target"] for row in rows], *encoder)
    for row, value in zip(rows, values, strict=True):
        row["bertscore"] = value


@torch.inference_mode()
def bertscore(
    answers: Sequence[str],
    targets: Sequence[str],
    encoder: str = ENCODER,
    layer: int = LAYER,
    device: str | torch.device | None = None,
    batch_size: int = 64,
) -> list[float]:
    """BERTScore F1 of each answer against its target, in float32 from the encoder's hidden states after `layer`.

    Each token is matched with the other text's most similar one; precision and recall are means over the answer's and
    the target's tokens. [CLS] and [SEP] may be matched, as in the reference, but have no weight. A text is cut at the
    encoder's longest input. Without a token in the answer or the target the score is 0.0, also where both have none,
    and so it is where no token is alike (a negative mean, which trained encoders do not give).
    `encoder` is a folder or a hub id; `device` is the GPU where there is one. Raises UserError for an encoder that
    cannot be loaded and for a layer that it does not have.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, model = _load(encoder, layer)
    model.to(device)
    # A tokenizer that does not know its longest input has a number of 30 digits there.
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", sys.maxsize))

    def embed(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unit embeddings (texts, tokens, width); masks (texts, tokens): no padding, and neither [CLS] nor [SEP]."""
        inputs = tokenizer(texts, truncation=True, max_length=longest, padding=True, return_tensors="pt").to(device)
        states = model(**inputs, output_hidden_states=True).hidden_states[layer]
        mask = inputs["attention_mask"].bool()
        special = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id], device=device)
        return states / states.norm(dim=-1, keepdim=True), mask, mask & ~torch.isin(inputs["input_ids"], special)

    scores = [0.0] * len(answers)
    pairs = list(zip(answers, targets, strict=True))
    # Texts of like length share a batch, so little is padding.
    order = sorted(range(len(pairs)), key=lambda row: (len(pairs[row][1]), len(pairs[row][0])))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        answer, answer_mask, answer_weight = embed([pairs[row][0] for row in rows])
        target, target_mask, target_weight = embed([pairs[row][1] for row in rows])
        # Cosine similarities (texts, answer tokens, target tokens), since embeddings have length 1.
        similarity = answer @ target.transpose(1, 2)
        similarity = similarity.masked_fill(~(answer_mask[:, :, None] & target_mask[:, None, :]), -torch.inf)
        precision = _mean(similarity.amax(dim=2), answer_weight)
        recall = _mean(similarity.amax(dim=1), target_weight)
        score = 2 * precision * recall / (precision + recall)
        # A mean over no tokens is not a number, and so not above 0.
        score = torch.where((precision > 0) & (recall > 0), score, 0.0).clamp(max=1.0)
        for row, value in zip(rows, score.tolist(), strict=True):
            scores[row] = value
    return scores


def _mean(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens whose weight is true, a value for each text; not a number where there is none."""
    return values.masked_fill(~weight, 0.0).sum(dim=1) / weight.sum(dim=1)


def _load(encoder: str, layer: int) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer and the encoder, checked to be whole: transformers initialises missing weights at random."""
    if (encoder.startswith((".", "~")) or encoder.count("/") > 1) and not Path(encoder).is_dir():
        raise UserError(f"{encoder}: is no folder with an encoder for BERTScore; {ADVICE}")
    try:
        layers = AutoConfig.from_pretrained(encoder).num_hidden_layers
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        model, loading = AutoModel.from_pretrained(encoder, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # every file format has errors of its own
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{encoder}: the encoder for BERTScore cannot be loaded ({what}); {ADVICE}") from error
    if not 1 <= layer <= layers:
        raise UserError(f"{encoder}: has no layer {layer} for BERTScore; LAYER= takes 1 to {layers}")
    if None in (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id):
        raise UserError(f"{encoder}: is no encoder (its tokenizer has no [CLS], [SEP] or padding token); {ADVICE}")
    if not len(tokenizer.all_special_ids) < len(tokenizer) <= model.config.vocab_size:
        what = f"its tokenizer has {len(tokenizer)} tokens and the model {model.config.vocab_size}"
        raise UserError(f"{encoder}: the encoder for BERTScore is incomplete ({what}); {ADVICE}")
    # bert-score does not use the pooler either, and many encoders come without one.
    missing = sorted(key for key in loading["missing_keys"] if "pooler" not in key)
    if missing:
        raise UserError(f"{encoder}: the encoder for BERTScore is incomplete (no weights for {missing[0]}); {ADVICE}")
    return tokenizer, model.eval()
