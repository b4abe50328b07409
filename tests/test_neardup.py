"""Near-duplicate groups: what they promise, on generated texts and on FinLoRA's own rows."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finlora.data.neardup import BATCH, COMMON_LEAST, COMPARED, duplicate_groups, near_duplicate_groups, normalise

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "finlora" / "data"
TWEET = (
    "Instruction: What is the sentiment of this tweet? Please choose an answer from {{negative/neutral/positive}}.\n"
    "Input: {}\nAnswer: "
)
WORDS = st.sampled_from("alpha beta gamma delta rises falls bank profit share 2019 loss café Ünion 北京 the of".split())
LONG = "alpha beta gamma delta rises falls bank profit share 2019 loss café Ünion 北京 the of"
ALIKE = [LONG, "loss", f"{LONG} more", f"even {LONG} more", f"{LONG[:50]} of the bank", LONG.upper() + "!", "", "🚀"]
TEXTS = st.lists(st.one_of(st.lists(WORDS, max_size=30).map(" ".join), st.text(max_size=40)), max_size=12)


def word_pairs(text: str) -> set[tuple[str, str]]:
    words = normalise(text).split()
    return set(zip(["", *words], words, strict=False))


def jaccard(one: str, other: str) -> float:
    left, right = word_pairs(one), word_pairs(other)
    return len(left & right) / len(left | right)


def partition(groups: list[int]) -> set[frozenset[int]]:
    members: dict[int, set[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, set()).add(place)
    return {frozenset(places) for places in members.values()}


def random_words(rng: random.Random, count: int) -> list[str]:
    return [f"w{rng.randrange(10**6)}" for _ in range(count)]


@example(ALIKE)
@given(TEXTS)
def test_texts_that_are_equal_after_normalisation_share_a_group(texts):
    groups = near_duplicate_groups(texts + [f"  {text.upper()}\n" for text in texts])
    for i, text in enumerate(texts):
        for j, other in enumerate(texts):
            if normalise(text) == normalise(other):
                assert groups[i] == groups[j]
        if normalise(text) == normalise(f"  {text.upper()}\n"):
            assert groups[i] == groups[len(texts) + i]


@example(ALIKE)
@given(TEXTS)
def test_two_texts_share_a_group_only_through_similar_ones(texts):
    # COMMON_LEAST is far away with a dozen texts, so the definition can be computed directly.
    similar = [
        [normalise(a) == normalise(b) or (jaccard(a, b) if word_pairs(a) | word_pairs(b) else 0) >= 0.8 for b in texts]
        for a in texts
    ]
    reach = list(range(len(texts)))
    for _ in texts:
        for i in range(len(texts)):
            reach[i] = min(reach[j] for j in range(len(texts)) if similar[i][j])
    groups = near_duplicate_groups(texts)
    for i in range(len(texts)):
        for j in range(i):
            assert groups[i] != groups[j] or reach[i] == reach[j]


@example(ALIKE, random.Random(1))
@given(TEXTS, st.randoms(use_true_random=False))
def test_the_order_of_the_texts_does_not_change_the_partition(texts, rng):
    order = list(range(len(texts)))
    rng.shuffle(order)
    shuffled = near_duplicate_groups([texts[i] for i in order])
    back = {frozenset(order[i] for i in group) for group in partition(shuffled)}
    assert back == partition(near_duplicate_groups(texts))


@example(" \u2028ﬁn–Ance  https://t.co/x\n\x1c_")
@given(st.text(max_size=60))
def test_normalise_leaves_one_line_of_words(text):
    plain = normalise(text)
    assert "\n" not in plain and "  " not in plain and plain == plain.strip()
    assert normalise(f" {text}\t") == plain


def test_groups_are_numbered_by_first_occurrence():
    assert near_duplicate_groups(["one two", "three", "ONE, two!", "four five six"]) == [0, 1, 0, 2]
    assert near_duplicate_groups([]) == []
    assert near_duplicate_groups(iter(["only"])) == [0]


def test_normalise_by_example():
    assert normalise("  $EVI – Reports\tQ2 results: +3.5% https://t.co/JORsCDM5m7 ") == "evi reports q2 results 3 5"
    assert normalise("ＦＵＬＬ width ﬁnance") == "full width finance"
    assert normalise("🚀 !") == "🚀 !" != normalise("💩 !")


def test_equal_and_similar_texts_meet_however_far_apart_they_stand():
    # Texts are hashed in batches; these copies are in different ones.
    rng = random.Random(9)
    body = random_words(rng, 40)
    filler = [" ".join(random_words(rng, rng.randrange(5, 60))) for _ in range(9000)]
    assert len(filler) > 2 * BATCH
    copies = [" ".join(body), " ".join(body).upper(), " ".join([*body[:39], "other"])]
    texts = [copies[0], *filler[:4000], copies[1], *filler[4000:], copies[2]]
    same, near = duplicate_groups(texts)
    assert same[0] == same[4001] != same[-1]
    assert near[0] == near[4001] == near[-1]
    assert len(set(near.tolist())) == len(filler) + 1
    # And the partition is that of the same texts in another order, which fall into other blocks.
    order = rng.sample(range(len(texts)), len(texts))
    shuffled = near_duplicate_groups([texts[i] for i in order])
    assert {frozenset(order[i] for i in group) for group in partition(shuffled)} == partition(near.tolist())


def test_texts_without_words_match_only_their_equals():
    assert near_duplicate_groups(["", "🚀", "💩", "  ", "🚀 "]) == [0, 1, 2, 0, 1]
    assert near_duplicate_groups(["\ud800 lone", "lone"]) == near_duplicate_groups(["\ud800 lone", "lone"])


@pytest.mark.parametrize("threshold", [0, -1, 1.01])
def test_a_threshold_outside_0_and_1_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold"):
        near_duplicate_groups(["a"], threshold)


def test_the_groups_are_the_same_in_every_process_and_with_every_number_of_threads():
    code = (
        "import random; from finlora.data.neardup import near_duplicate_groups as g; r = random.Random(1);"
        "print(g(' '.join(f'w{r.randrange(12)}' for _ in range(r.randrange(9))) for _ in range(3000)))"
    )
    answers = set()
    for seed, threads in (("0", "1"), ("1", "2"), ("12345", "4")):
        env = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        answers.add(done.stdout)
    assert len(answers) == 1
    groups = json.loads(answers.pop())
    assert 1 < len(set(groups)) < 3000


def test_two_tweets_under_one_instruction_are_not_near_duplicates():
    tweets = ["$ALLY - Ally Financial pulls outlook", "$SAN: Deutsche Bank cuts to Hold", "Buy $TSLA", "Sell $TSLA"]
    rng = random.Random(3)
    # The long instruction alone makes the two shortest nearly alike.
    texts = [TWEET.format(tweet) for tweet in tweets]
    assert jaccard(texts[2], texts[3]) > 0.7
    texts += [TWEET.format(" ".join(random_words(rng, 12))) for _ in range(60)]
    groups = near_duplicate_groups(texts)
    assert len(set(groups)) == len(texts)
    # And one tweet under two links is one.
    again = near_duplicate_groups([*texts, TWEET.format(tweets[0] + " https://t.co/G9Zdi1boy5")])
    assert again[-1] == again[0] and len(set(again)) == len(texts)


def test_what_is_proposed_and_missed_at_the_threshold():
    # 2,000 pairs of similarity 0.80 to 0.84, of which the module says about one in 500 is missed: 4 here, and 15 would
    # be five standard deviations more.
    rng = random.Random(5)
    texts = []
    while len(texts) < 4000:
        words = random_words(rng, rng.randrange(20, 60))
        other = list(words)
        for _ in range(max(1, len(words) // 20)):
            other[rng.randrange(len(words))] = random_words(rng, 1)[0]
        if 0.8 <= jaccard(" ".join(words), " ".join(other)) <= 0.84:
            texts += [" ".join(words), " ".join(other)]
    groups = near_duplicate_groups(texts)
    missed = sum(groups[i] != groups[i + 1] for i in range(0, len(texts), 2))
    assert missed <= 15
    assert max(Counter(groups).values()) <= 2


def test_pairs_just_below_the_threshold_stay_apart():
    rng = random.Random(6)
    texts = []
    while len(texts) < 2000:
        words = random_words(rng, rng.randrange(8, 40))
        other = list(words)
        for _ in range(1 + len(words) // 16):
            other[rng.randrange(len(words))] = random_words(rng, 1)[0]
        if 0.7 <= jaccard(" ".join(words), " ".join(other)) < 0.8:
            texts += [" ".join(words), " ".join(other)]
    assert len(set(near_duplicate_groups(texts))) == len(texts)


def test_long_texts_are_compared_whole():
    rng = random.Random(7)
    words = random_words(rng, 10_000)
    near = list(words)
    for place in rng.sample(range(len(words)), len(words) // 40):
        near[place] = "changed"
    far = list(words)
    for place in rng.sample(range(len(words)), len(words) // 4):
        far[place] = random_words(rng, 1)[0]
    one, alike, unlike = " ".join(words), " ".join(near), " ".join(far)
    assert jaccard(one, alike) > 0.9 and jaccard(one, unlike) < 0.7
    assert near_duplicate_groups([one, alike, unlike]) == [0, 0, 1]


def test_only_the_first_part_of_a_giant_text_counts():
    giant = "word " * (COMPARED // 5 + 10)
    assert near_duplicate_groups([giant + "a b c", giant + "d e f", "small"]) == [0, 0, 1]


def test_copies_with_another_last_word_each():
    body = " ".join(random_words(random.Random(8), 40))
    assert set(near_duplicate_groups([f"{body} {i}" for i in range(COMMON_LEAST - 1)])) == {0}
    # With more of them than COMMON_LEAST the body is boilerplate, and what is left to compare is the last word.
    assert len(set(near_duplicate_groups([f"{body} {i}" for i in range(3000)]))) == 3000


@pytest.mark.parametrize(
    ("file", "rows", "most_rows_in_groups"),
    [
        ("test/tfns_test.jsonl", 2388, 40),
        ("test/fpb_test.jsonl", 1212, 20),
        ("test/fiqa_test.jsonl", 235, 10),
        ("test/formula_test.jsonl", 200, 4),
        ("test/xbrl_term_test.jsonl", 651, 10),
    ],
)
def test_real_rows_with_one_instruction_are_kept_apart(file, rows, most_rows_in_groups):
    if not (REAL / file).exists():
        pytest.skip("FinLoRA's files are not in ../shared")
    texts = [json.loads(line)["context"] for line in (REAL / file).read_text(encoding="utf-8").splitlines()]
    groups = near_duplicate_groups(texts)
    sizes = Counter(groups)
    assert len(groups) == rows
    assert 0 <= sum(size for size in sizes.values() if size > 1) <= most_rows_in_groups
    # Every group that it does form says nearly the same once the instruction is gone.
    for group, size in sizes.items():
        if size > 1:
            alike = [text for text, number in zip(texts, groups, strict=True) if number == group]
            word_sets = [set(normalise(text.split("Input:")[-1]).split()) for text in alike]
            assert all(any(len(a & b) >= 0.7 * len(a | b) for b in word_sets if b is not a) for a in word_sets)


def test_one_tweet_under_two_links_is_found_in_tfns():
    file = REAL / "test/tfns_test.jsonl"
    if not file.exists():
        pytest.skip("FinLoRA's files are not in ../shared")
    texts = [json.loads(line)["context"] for line in file.read_text(encoding="utf-8").splitlines()]
    groups = near_duplicate_groups(texts)
    assert groups[421] == groups[422] and "Porsche" in texts[421] and texts[421] != texts[422]
