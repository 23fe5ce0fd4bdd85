"""GenEval's rules, one by one, on made-up detections."""

import json

import pytest

from genkit.eval import geneval as rules
from genkit.eval.geneval import Clause, Detection, Exclusion, Image, geneval, judge, kept, read_detections, relations


def found(name, score=0.95, box=(0, 0, 10, 10), color=None):
    return Detection(class_=name, box=box, score=score, color=color)


def image(tag, include, detections, exclude=(), prompt="a photo"):
    return Image(
        tag=tag,
        prompt=prompt,
        include=[Clause(**c) for c in include],
        exclude=[Exclusion(**c) for c in exclude],
        detections=detections,
    )


def right(*args, **kwargs):
    return judge(image(*args, **kwargs)).correct


DOG = {"class_": "dog", "count": 1}


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_confidence_must_exceed_the_threshold_which_is_higher_for_counting():
    assert right("single_object", [DOG], [found("dog", 0.3001)])
    assert not right("single_object", [DOG], [found("dog", 0.3)])
    assert right("counting", [DOG], [found("dog", 0.9001)])
    assert not right("counting", [DOG], [found("dog", 0.9)])


def test_at_most_sixteen_of_a_class_the_surest():
    many = [found("dog", 0.31 + 0.01 * i) for i in range(20)] + [found("cat", 0.5)]
    objects = kept(many)
    assert [round(d.score, 2) for d in objects["dog"]] == [round(0.5 - 0.01 * i, 2) for i in range(16)]
    assert len(objects["cat"]) == 1
    # Seventeen are never seen, so that "not 17 or more" cannot fail.
    twenty = [found("dog", 0.99) for _ in range(20)]
    assert right("counting", [{**DOG, "count": 16}], twenty, [{"class_": "dog", "count": 17}])


def test_boxes_that_overlap_all_count():
    assert right("counting", [{**DOG, "count": 2}], [found("dog"), found("dog")], [{"class_": "dog", "count": 3}])


def test_equal_confidence_keeps_the_order_of_the_file():
    first, second = found("dog", 0.5, color="red"), found("dog", 0.5, color="blue")
    assert kept([first, second])["dog"] == [first, second]


# -- clauses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "expected"), [(0, False), (1, False), (2, True), (3, False), (4, False)])
def test_counting_is_exact_by_its_exclusion(n, expected):
    include, exclude = [{**DOG, "count": 2}], [{"class_": "dog", "count": 3}]
    assert right("counting", include, [found("dog")] * n, exclude) is expected


def test_without_an_exclusion_more_is_right():
    assert right("counting", [{**DOG, "count": 2}], [found("dog")] * 5)


def test_all_clauses_must_hold():
    both = [DOG, {"class_": "cat", "count": 1}]
    assert right("two_object", both, [found("dog"), found("cat"), found("hen")])
    verdict = judge(image("two_object", both, [found("dog")]))
    assert not verdict.correct and verdict.reasons == ["expected cat>=1, found 0"]


def test_any_exclusion_spoils_it():
    exclude = [{"class_": "cat", "count": 1}, {"class_": "hen", "count": 2}]
    assert right("single_object", [DOG], [found("dog"), found("hen")], exclude)
    assert not right("single_object", [DOG], [found("dog"), found("hen"), found("hen")], exclude)


def test_colour_is_that_of_the_surest_objects():
    red = [{**DOG, "color": "red"}]
    assert right("colors", red, [found("dog", color="red")])
    assert not right("colors", red, [found("dog", color="blue")])
    # A red one that is less sure does not help, a blue one does not harm.
    assert not right("colors", red, [found("dog", 0.8, color="red"), found("dog", 0.9, color="blue")])
    assert right("colors", red, [found("dog", 0.8, color="blue"), found("dog", 0.9, color="red")])
    two = [{**DOG, "count": 2, "color": "red"}]
    assert not right("colors", two, [found("dog", color="red"), found("dog", color="blue")])
    assert right("colors", two, [found("dog", color="red")] * 2)


def test_colour_by_numbers_is_the_largest():
    red = [{**DOG, "color": "red"}]
    assert right("colors", red, [found("dog", color={"red": -1.0, "blue": -2.0})])
    assert not right("colors", red, [found("dog", color={"red": 0.4, "blue": 0.6})])
    assert found("dog", color={"blue": 0.5, "red": 0.5}).named_color == "blue"  # the first, as argmax has it


def test_colours_of_two_objects():
    include = [{**DOG, "color": "red"}, {"class_": "cat", "count": 1, "color": "black"}]
    assert right("color_attr", include, [found("dog", color="red"), found("cat", color="black")])
    assert not right("color_attr", include, [found("dog", color="black"), found("cat", color="red")])


# -- places -----------------------------------------------------------------------------------------------------------


def at(x, y, size=10.0, name="dog", score=0.95):
    return found(name, score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2))


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (20, 0, {"right of"}),
        (-20, 0, {"left of"}),
        (0, 20, {"below"}),  # y grows downwards
        (0, -20, {"above"}),
        (20, 20, {"right of", "below"}),
        (-20, -20, {"left of", "above"}),
        (1, 1, set()),  # within a tenth of both sizes
        (2, 0, set()),  # the shrunk offset is 0
        (2.0005, 0, set()),  # and below 1e-3 counts as 0
        (0, 0, set()),
    ],
)
def test_directions(dx, dy, expected):
    assert relations(at(100 + dx, 50 + dy), at(100, 50)) == expected


def test_what_is_left_is_measured_by_the_whole_offset():
    # Sizes 10 and 10 take 2 of each component: 4 - 2 = 2 of a length of 4 is 0.5 exactly, which is not more than 0.5.
    assert relations(at(104, 50), at(100, 50)) == set()
    assert relations(at(104.1, 50), at(100, 50)) == {"right of"}
    # Of (9, 12), length 15: 7 / 15 < 0.5 < 10 / 15. Over the length of the shrunk offset both would exceed it.
    assert relations(at(109, 62), at(100, 50)) == {"below"}


def test_sizes_are_shrunk_by_each_side():
    wide, tall = found("dog", box=(0, 0, 100, 2)), found("dog", box=(40, 20, 42, 120))
    # Centres (50, 1) and (41, 70): 9 - 0.1 (100 + 2) < 0 sideways, 69 - 0.1 (2 + 100) of 69.6 up.
    assert relations(wide, tall) == {"above"} and relations(tall, wide) == {"below"}


def test_position_is_to_the_target_and_of_the_surest():
    include = [{"class_": "cat", "count": 1}, {**DOG, "position": ("left of", 0)}]
    cat = at(100, 50, name="cat")
    assert right("position", include, [cat, at(50, 50)])
    assert not right("position", include, [cat, at(150, 50)])
    assert right("position", include, [cat, at(50, 50, score=0.9), at(150, 50, score=0.8)])
    assert not right("position", include, [cat, at(50, 50, score=0.8), at(150, 50, score=0.9)])
    assert not right("position", include, [cat, at(10, 50, name="cat", score=0.99), at(50, 50)])


def test_every_pair_must_be_in_position():
    include = [{"class_": "cat", "count": 2}, {**DOG, "position": ("left of", 0)}]
    cats = [at(100, 50, name="cat"), at(30, 50, name="cat")]
    assert not right("position", include, [*cats, at(50, 50)])
    assert right("position", include, [*cats, at(1, 50)])


def test_a_target_that_failed_is_none():
    include = [{"class_": "cat", "count": 1}, {**DOG, "position": ("left of", 0)}]
    reasons = judge(image("position", include, [found("dog")])).reasons
    assert reasons == ["expected cat>=1, found 0", "no target for dog to be left of"]


# -- scores -----------------------------------------------------------------------------------------------------------


def of_tag(tag, correct, prompt):
    return image(tag, [DOG], [found("dog")] if correct else [], prompt=prompt)


def test_overall_is_the_mean_over_tags_not_images():
    images = [of_tag("counting", i < 1, f"p{i}") for i in range(4)]  # a quarter of four
    images += [of_tag(tag, True, tag) for tag in rules.TAGS if tag != "counting"]
    scores = geneval(images)
    assert scores.overall == pytest.approx((0.25 + 5) / 6, rel=1e-15)
    assert scores.images_correct == pytest.approx(6 / 9) and scores.images == scores.prompts == 9
    assert list(scores.accuracy) == list(rules.TAGS)
    assert scores.notes == ["9 prompts with 1 images; the benchmark has 553 with 4 each"]


def test_a_prompt_is_right_where_any_image_is():
    images = [of_tag("counting", c, "p") for c in (False, True, False)] + [of_tag("counting", False, "q")]
    scores = geneval(images)
    assert scores.prompts_correct == 0.5 and scores.images_correct == 0.25


def test_missing_tags_leave_no_overall():
    scores = geneval([of_tag("counting", True, "p"), of_tag("counting", True, "p"), of_tag("colors", True, "q")])
    assert scores.overall is None
    assert scores.notes[0] == "no overall score: no images of single_object, two_object, position, color_attr"
    assert scores.notes[1].startswith("2 prompts with 1 to 2 images")


def test_the_whole_benchmark_has_no_note():
    counts = dict(zip(rules.TAGS, (80, 99, 80, 94, 100, 100), strict=True))
    images = [of_tag(tag, True, f"{tag} {i // 4}") for tag, n in counts.items() for i in range(4 * n)]
    scores = geneval(images)
    assert (scores.overall, scores.notes, scores.prompts) == (1.0, [], 553)


# -- files ------------------------------------------------------------------------------------------------------------

ROW = {
    "tag": "position",
    "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["right of", 0]}],
    "prompt": "a photo of a cat right of a dog",
    "detections": [
        {"class": "dog", "box": [0, 0, 40, 40], "score": 0.9, "mask": [[0, 1]]},
        {"class": "cat", "box": [60, 0, 100, 40], "score": 0.8, "color": {"red": 0.1, "black": 0.9}},
    ],
    "filename": "00/samples/0000.png",
}


def test_files_and_command(tmp_path, capsys):
    from genkit.cli import app

    (tmp_path / "d.json").write_text(json.dumps([ROW, {**ROW, "detections": []}]))
    (tmp_path / "d.jsonl").write_text(f"{json.dumps(ROW)}\n\n{json.dumps({**ROW, 'detections': []})}\n")
    assert read_detections(tmp_path / "d.json") == read_detections(tmp_path / "d.jsonl")
    app(
        ["eval", "geneval", str(tmp_path / "d.json"), "--json", str(tmp_path / "out.json")],
        standalone_mode=False,
    )
    assert "position" in capsys.readouterr().out
    written = rules.GenEval.model_validate_json((tmp_path / "out.json").read_text())
    assert written.accuracy == {"position": 0.5} and written.overall is None
    assert [v.correct for v in written.verdicts] == [True, False]
    assert written.verdicts[0].filename == "00/samples/0000.png"
    assert rules.main(tmp_path / "d.jsonl", quiet=True) == written and not capsys.readouterr().out
    with pytest.raises(ValueError, match="does not exist"):
        rules.main(tmp_path / "d.json", json_path=tmp_path / "no" / "out.json")


def without(key):
    return {k: v for k, v in ROW.items() if k != key}


def with_detection(**changed):
    return {**ROW, "detections": [{**ROW["detections"][0], **changed}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "tag": "texture"}, "image 1: tag: .*'single_object'"),
        (without("detections"), "image 1: detections: Field required"),
        ({**ROW, "include": []}, "image 1: include"),
        ({**ROW, "includes": []}, "image 1: includes: Extra"),
        ({**ROW, "include": [{"class": "dog", "count": 0}]}, "include.0.count"),
        ({**ROW, "include": [{"class": "dog", "count": 1, "color": "teal"}]}, "include.0.color"),
        ({**ROW, "include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]}, "include 0: position to cl"),
        ({**ROW, "include": [{"class": "dog", "count": 1, "position": ["beside", 0]}]}, "include.0.position"),
        (with_detection(score=1.2), "detections.0.score"),
        (with_detection(score=float("nan")), "detections.0.score"),
        (with_detection(box=[0, 0, 1]), "detections.0.box"),
        (with_detection(box=[5, 0, 1, 4]), "detections.0.box.*left <= right"),
        (with_detection(box=[0, 0, float("nan"), 4]), "detections.0.box"),
        (with_detection(color="teal"), "detections.0.color"),
        (with_detection(color={"red": float("nan")}), "detections.0.color"),
        (with_detection(label="dog"), "detections.0.label: Extra"),
        ([1], "image 1: "),
    ],
)
def test_bad_rows_are_named(row, message, tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([ROW, row]))
    with pytest.raises(ValueError, match=message):
        read_detections(tmp_path / "d.json")


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file of detections"):
        read_detections(tmp_path / "none.json")
    (tmp_path / "d.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_detections(tmp_path / "d.json")
    (tmp_path / "d.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a list of images, found dict"):
        read_detections(tmp_path / "d.json")
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(ValueError, match="images is empty"):
        rules.main(tmp_path / "d.json", quiet=True)


def test_a_colour_that_nobody_judged():
    with pytest.raises(ValueError, match="'a photo': a dog lacks the color"):
        judge(image("colors", [{**DOG, "color": "red"}], [found("dog")]))
    assert not right("colors", [{**DOG, "color": "red"}], [found("dog", 0.2)])  # too unsure to be asked
