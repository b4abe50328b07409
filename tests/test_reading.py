"""Answers as a person reads them: what names the target and nothing else is right, whatever is said around it."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.reading import agreement
from finlora.data.tasks import load_tasks
from finlora.evaluate.quantities import Number, calculation, number, numbers
from finlora.evaluate.reading import finder, named, read_calculation, read_formula, read_number
from finlora.evaluate.scorers import finlora, read, strict

TESTS = {name: spec for entry in load_tasks().values() for name, spec in entry.tests.items()}
NAMED = [
    ("fpb", "The sentiment of this news is positive.", "positive"),
    ("fpb", "The sentiment of this news is positive. The", "positive"),
    ("fpb", "Answer: positive", "positive"),
    ("fpb", "positive\n\nExplanation: the negative part is over.", "positive"),
    ("fpb", "The sentiment is negative because positive news are missing.", "negative"),
    ("fpb", "Because sales rose, it is positive.", "positive"),
    ("fpb", "It is not negative but positive.", "positive"),
    ("fpb", "positive rather than neutral", "positive"),
    ("fpb", "positive\nInput: Sales fell.\nAnswer: negative", "positive"),
    ("fpb", "<think>negative? or neutral?</think>\n\npositive", "positive"),
    ("fpb", "negative? or neutral?</think>positive", "positive"),
    ("fpb", "Between negative and neutral, so my answer is: neutral", "neutral"),
    ("fpb", "It is neutral. The news does not convey a strong negative opinion.", "neutral"),
    ("fpb", "It is neutral, with no negative or positive emotions", "neutral"),
    ("nwgi", "The sentiment is Mildly positive.", "mildly positive"),
    ("nwgi", "The sentiment of this news is generally neutral. The", "neutral"),
    ("ner", "The entity type of 'SOLAR' is organization", "organization"),
    ("headline", "Yes, it does", "Yes"),
    ("headline", "Yes, there is no doubt.", "Yes"),
    ("headline", "My reply is no.", "No"),
    ("headline", "The answer is No", "No"),
    ("cfa_level1", "The answer is B.", "B"),
    ("cfa_level1", "Option A", "A"),
    ("cfa_level1", "option a is right", "A"),
    ("cfa_level1", "(c)", "C"),
    ("cfa_level1", r"\boxed{B}", "B"),
    ("cfa_level1", r"So it is $\boxed{\text{B}}$ and not A", "B"),
    ("cfa_level1", "A: 11%", "A"),
    ("cfa_level1", "C is the best choice, given that A is too low.", "C"),
    ("xbrl_extract_tags", "us-gaap:Goodwill", "Goodwill"),
    ("xbrl_extract_tags", "The tag is Goodwill.", "us-gaap:Goodwill"),
    ("finer", "us-gaap:Goodwill", "Goodwill"),
    ("finer", "1. Goodwill\n2. us-gaap:DebtInstrumentFaceAmount", "Goodwill,DebtInstrumentFaceAmount"),
    ("finer", "Goodwill; the second is DebtInstrumentFaceAmount", "Goodwill,DebtInstrumentFaceAmount"),
    ("xbrl_extract_formula", "Liabilities / Assets", "us-gaap:Liabilities / us-gaap:Assets"),
    ("xbrl_extract_formula", "It is (us-gaap:Cash+us-gaap:Debt)/us-gaap:Sales.", "(Cash + Debt) / Sales"),
    ("xbrl_extract_formula_calculations", "The ratio is 37540 / 12420 = 3.02", "37540 / 12420"),
    ("xbrl_extract_formula_calculations", "ROA: (1,294 / 38,542) x 100 = (1294 / 38542) * 100", "(1294 / 38542) * 100"),
    ("xbrl_extract_value", "The value for FY 2023 is $34,728,000,000.", "34728000000"),
    ("xbrl_extract_value", "34.728 billion", "34728000000"),
    ("xbrl_extract_value", "It was (473) million.", "-473"),
    ("xbrl_extract_value", "It is 2021-12-31.", "2021-12-31"),
    ("formula", "A: 11%", "0.11"),
    ("formula", "USD 15.0", "15.0"),
    ("formula", "15.00 USD", "15.0"),
    ("formula", "$-15.0", "-15.0"),
    ("formula", "It loses -$15.", "-15.0"),
    ("formula", "15.0x", "15.0"),
    ("formula", "8.5 million", "8500000.0"),
    ("formula", "The NPV at a discount rate of 8% is $15,092.44.", "15092.44"),
    ("formula", "22,000 * (1 + 3.5%)^2 = 23,566.95", "23566.95"),
    ("formula", "The APR is 0.11, which is approximately 11%.", "0.11"),
    ("formula", "The rate is 8% and the term 5 years. The answer is 12.", "12.0"),
]  # fmt: skip
OTHER = [
    ("fpb", "I am sorry, I cannot say; positive", "positive"),
    ("fpb", "It is impossible to tell whether this is positive.", "positive"),
    ("fpb", "There is not enough context, positive", "positive"),
    ("fpb", "The sentiment cannot be determined; it may be positive", "positive"),
    ("fpb", "positive or negative", "positive"),
    ("fpb", "negative/neutral/positive", "negative"),
    ("fpb", "positive\n\nnegative", "positive"),
    ("fpb", "nonpositive", "positive"),
    ("fpb", "non-positive", "positive"),
    ("fpb", "The news speaks positively of it", "positive"),
    ("fpb", "not positive", "positive"),
    ("fpb", "It isn't positive", "positive"),
    ("fpb", "I do not think it is positive", "positive"),
    ("fpb", "neither positive nor negative", "positive"),
    ("fpb", "<think>positive", "positive"),
    ("fpb", "Explanation: it rose", "positive"),
    ("nwgi", "positive", "mildly positive"),
    ("ner", "organizational", "organization"),
    ("headline", "There is no doubt about it", "No"),
    ("headline", "Yes or No", "Yes"),
    ("headline", "Nothing", "No"),
    ("cfa_level1", "A bond with a higher yield", "A"),
    ("cfa_level1", "A or B", "A"),
    ("cfa_level1", "B is wrong, so A is right", "A"),
    ("cfa_level1", "the U.S.A. and Washington D.C.", "C"),
    ("xbrl_extract_tags", "us-gaap:GoodwillAndIntangibles", "us-gaap:Goodwill"),
    ("xbrl_extract_tags", "us-gaap:Goodwill or us-gaap:AssetsCurrent", "us-gaap:Goodwill"),
    ("xbrl_extract_formula", "us-gaap:Assets / us-gaap:Liabilities", "us-gaap:Liabilities / us-gaap:Assets"),
    ("xbrl_extract_formula", "us-gaap:Debt / us-gaap:Sales or us-gaap:Cash / us-gaap:Sales", "Debt / Sales"),
    ("xbrl_extract_formula_calculations", "3.0225442834138488", "37540 / 12420"),
    ("xbrl_extract_formula_calculations", "37540 / 12421", "37540 / 12420"),
    ("xbrl_extract_formula_calculations", "37540 / 12420 or 37540 / 2", "37540 / 12420"),
    ("xbrl_extract_value", "34728000020", "34728000000"),
    ("xbrl_extract_value", "34.7 billion", "34728000000"),
    ("xbrl_extract_value", "1615%", "16.15"),
    ("xbrl_extract_value", "between 10 and 15", "15"),
    ("xbrl_extract_value", "473", "-473"),
    ("formula", "15 or 16", "15.0"),
    ("formula", "The answer is 15. The answer is 16.", "15.0"),
    ("formula", "115.0", "15.0"),
    ("formula", "the 15th", "15.0"),
    ("formula", "Q15", "15.0"),
    ("formula", "I don't know, 15.0", "15.0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "answer", "target"), NAMED)
def test_what_names_the_target_alone_is_right(name, answer, target):
    items = read(TESTS[name], [answer], [target])
    assert set(items["right"]) == {1.0} and items["predicted"] == items["target"] and not any(items["unparsed"])


@pytest.mark.parametrize(("name", "answer", "target"), OTHER)
def test_what_names_another_several_or_none_is_wrong(name, answer, target):
    items = read(TESTS[name], [answer], [target])
    assert items["right"] == [0.0] and items["predicted"] != items["target"]
    assert items["unparsed"] == [items["predicted"] == ["unparsed"]]


def test_the_answer_named_instead_is_the_class_that_counts():
    answers = ["It is positive.", "It is up.", "positive or negative", "Negative!"]
    items = read(TESTS["fpb"], answers, ["neutral"] * 4)
    assert items["predicted"] == ["positive", "unparsed", "unparsed", "negative"]
    assert items["unparsed"] == [False, True, True, False]
    items = read(TESTS["finer"], ["The tag is LongTermDebt"], ["Goodwill"])
    assert (items["predicted"], items["unparsed"]) == (["longtermdebt"], [False])


LABELLED = st.sampled_from(["fpb", "nwgi", "ner", "headline", "cfa_level1"])
FRAMES = [
    "{}",
    "The answer is {}.",
    "Answer: {}",
    "answer: {}\n\nExplanation: it says so.",
    r"\boxed{{{}}}",
    "</think>{}",
]


@given(LABELLED, st.data(), st.sampled_from(FRAMES))
def test_a_label_in_a_frame_is_that_label_and_no_other(name, data, frame):
    labels = TESTS[name].labels
    target, said = (data.draw(st.sampled_from(labels)) for _ in range(2))
    items = read(TESTS[name], [frame.format(said)], [target])
    assert (items["predicted"], items["right"]) == ([said], [float(said == target)])


@given(LABELLED, st.data(), st.sampled_from(["{} or {}", "{}, {}", "{}/{}", "The answer is {}. The answer is {}."]))
def test_two_labels_are_no_answer(name, data, frame):
    one, two = data.draw(st.permutations(TESTS[name].labels))[:2]
    items = read(TESTS[name], [frame.format(one, two)], [one])
    assert (items["right"], items["unparsed"]) == ([0.0], [True])


AMOUNTS = st.decimals(min_value=-(10**12), max_value=10**12, places=2)


@given(AMOUNTS, AMOUNTS, st.sampled_from(["{}", "${}", "USD {}", "The value is {}.", "Value: {}", "x = {}", "{} EUR"]))
def test_a_number_in_a_frame_is_exactly_that_number(said, target, frame):
    for form in ("{}", "{:,}"):
        items = read(TESTS["xbrl_extract_value"], [frame.format(form.format(said))], [str(target)])
        assert items["right"] == [float(said == target)]
        assert read(TESTS["xbrl_extract_value"], [frame.format(form.format(said))], [str(said)])["right"] == [1.0]


@given(
    st.sampled_from(sorted(TESTS)),
    st.lists(st.text("abAB15.0 ,-/%()$:\n", max_size=14), min_size=1, max_size=4),
    st.data(),
)
def test_strictly_right_is_right_as_read(name, answers, data):
    spec = TESTS[name]
    targets = [data.draw(st.sampled_from([*(spec.labels or ["5.0", "A1", "1 / 5"]), *answers])) for _ in answers]
    one, other = strict(spec, answers, targets), read(spec, answers, targets)
    assert all(a <= b for a, b in zip(one["right"], other["right"], strict=True))
    assert (one["row"], one["target"]) == (other["row"], other["target"])


def test_a_model_s_answers_are_read_as_a_person_read_them():
    count, others = agreement()
    for name, rows in (("fiqa", 160), ("nwgi", 30), ("formula", 30)):
        assert count[name, "read"] == count[name, ""] == rows >= count[name, "finlora"] and count[name, "strict"] < rows
    assert any("1. negative" in line and ", finlora" in line for line in others)


def test_the_three_scorings_differ_where_they_should():
    answers = ["not positive", "It is positive.", "positive"]
    right = [way(TESTS["fpb"], answers, ["positive"] * 3)["right"] for way in (finlora, read, strict)]
    assert right == [[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]


# The parts of a reading by themselves: what each sees in a text, and what it leaves.


def test_a_refusal_names_nothing_and_boxes_are_joined_by_spaces():
    assert named("I cannot say; positive") == ""
    assert named(r"\boxed{strong} \boxed{positive}") == "strong positive"


def test_the_longest_label_is_found_whatever_the_case():
    assert finder(["per", "per share", "us-gaap:Assets"])("earnings PER share; assets") == {
        "per share",
        "us-gaap:Assets",
    }
    assert finder({"Yes", "yes"})("yes") == finder(["yes", "Yes"])("yes") == {"Yes"}
    assert finder([""])("anything") == set()


@pytest.mark.parametrize(
    ("text", "value", "right"),
    [
        ("it rose to 5 in 2023", 5, True),
        ("in 2023", 2023, True),
        ("it is 3 + 4", 3, None),
        ("it is 3 (see page 4)", 3, True),
        ("it is 5", 6, False),
        ("it is 5, it is 6", 5, None),
        ("no number", 5, None),
    ],
)
def test_the_number_that_a_text_states(text, value, right):
    assert read_number(text, lambda number: number.value == value) is right


@pytest.mark.parametrize(
    ("text", "value", "right"),
    [
        ("so 3 + 4.", 7, True),
        ("- 3 + 4 -", 7, True),
        ("1e3 + 1", 1001, True),
        ("1E3 + 1", 1001, True),
        ("3 + 4, and 5 + 6", 7, None),
        ("3 + 4", 8, False),
        ("7", 7, None),
    ],
)
def test_the_calculation_that_a_text_has(text, value, right):
    assert read_calculation(text, lambda found: found == value) is right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("It is (NetIncomeLoss / Assets) * 100", True),
        ("netincomeloss / assets", None),
        ("(NETINCOMELOSS/Assets)*100", True),
        ("(NetIncomeLoss / Assets) * 100)", True),
        ("(NetIncomeLoss / Assets) * 100))", True),
        ("(NetIncomeLoss / Liabilities) * 100", False),
        ("NetIncomeLoss / Assets or Assets / NetIncomeLoss", None),
    ],
)
def test_the_formula_that_a_text_has(text, right):
    assert read_formula(text, "(us-gaap:NetIncomeLoss / us-gaap:Assets) * 100") is right


@pytest.mark.parametrize(
    ("one", "other", "fractions", "equal"),
    [
        (("12.5", True), ("12.5", True), False, True),
        (("12.5", True), ("12.5", False), False, False),
        (("12.5", True), ("12.5", False), True, True),
        (("12.5", True), ("0.125", False), True, True),
        (("0.125", False), ("12.5", True), True, True),
        (("12.5", False), ("0.125", True), True, False),
        (("12.5", True), ("0.125", True), True, False),
    ],
)
def test_a_percentage_is_a_fraction_only_where_fractions_count(one, other, fractions, equal):
    one, other = (Number(Fraction(value), percent) for value, percent in (one, other))
    assert one.equals(other, Fraction(0), 0.0, fractions) is equal


def test_numbers_have_a_length_a_sign_and_a_unit():
    assert number("9" * 500) is not None and number("9" * 501) is None
    assert [value for _, value in numbers("(5 apples, 6), (7), 8 percent, 9 PERCENT")] == [
        Number(Fraction(value), percent)
        for value, percent in ((5, False), (6, False), (-7, False), (8, True), (9, True))
    ]


def test_powers_have_a_largest_and_roots_are_floats():
    assert calculation("2^32768") == 2**32768 and calculation("2^32769") is None
    assert calculation("4^0.5") == 2 and calculation("3 + 50%") == Fraction(7, 2)
