import pytest
from readers import Reading, write_files

from megatron_iml.data.sources.jinja_templates import draw, load_templates
from megatron_iml.data.sources.promptsource import read


def template(name: str, jinja: str, choices: str = "null", original: str = "true", metric: str = "Accuracy"):
    return (
        f"  {name}-id: !Template\n"
        f"    answer_choices: {choices}\n"
        f"    id: {name}-id\n"
        f"    jinja: {jinja!r}\n"
        "    metadata: !TemplateMetadata\n"
        "      choices_in_prompt: null\n"
        f"      languages:\n      - en\n      metrics:\n      - {metric}\n      original_task: {original}\n"
        f"    name: {name}\n"
        "    reference: ''\n"
    )


def reading(tmp_path, templates: list[str], rows: object, name: str = "riddles/easy", **options):
    data_set = name.split("/")
    subset = f"subset: {data_set[1]}\n" if len(data_set) > 1 else ""
    files = {
        f"templates/{name}/templates.yaml": f"dataset: {data_set[0]}\n{subset}templates:\n"
        + "".join(templates),
        f"rows/{name}/train.jsonl": rows,
    }
    write_files(tmp_path, files)
    return Reading(read, tmp_path / "rows", templates="../templates", **options)


WET = template(
    "wet", "Is {{ word }} wet? {{ answer_choices | join(', ') }}|||{{ answer_choices[label] }}", "Yes ||| No"
)
ROWS = [{"word": "sea", "label": 0}, {"word": "sun", "label": 1}]


def test_a_data_set_is_one_task_with_choices_and_sources(tmp_path):
    found = reading(tmp_path, [WET], ROWS, "super_glue/wic")
    assert list(found.tasks) == ["super_glue__wic"]
    task = found.tasks["super_glue__wic"]
    assert (task.benchmark, task.metric, task.data_sources) == ("PromptSource", "accuracy", ("wic",))
    assert task.parent == "wic"
    first, second = found.examples("super_glue__wic")
    assert (first.source, first.targets) == ("Is sea wet? Yes, No", ("Yes",))
    assert (second.targets, second.candidates) == (("No",), ("Yes", "No"))
    assert (first.id, first.instance) == ("train-1", '{"label": 0, "word": "sea"}')


def test_templates_of_another_task_are_left_out(tmp_path):
    turned = template("turned", "Ask about {{ word }}. ||| Is {{ word }} wet?", original="false")
    found = reading(tmp_path, [WET, turned], ROWS * 10)
    assert all("Is " in example.source for example in found.examples("riddles__easy"))
    nothing = reading(tmp_path, [turned], ROWS)
    assert not nothing.tasks
    assert nothing.drops.skipped_files == {"riddles/easy": "no template of the original task"}


def test_a_row_gets_one_prompt_whatever_the_number_of_templates(tmp_path):
    many = [template(f"t{i}", f"{i}: {{{{ word }}}} ||| x") for i in range(5)]
    rows = [{"word": f"w{i}"} for i in range(200)]
    first = [example.source for example in reading(tmp_path, many, rows).examples("riddles__easy")]
    again = [example.source for example in reading(tmp_path, many, rows).examples("riddles__easy")]
    assert first == again
    assert len(first) == 200
    assert {source[0] for source in first} == set("01234")
    other = [example.source for example in reading(tmp_path, many, rows, seed=2).examples("riddles__easy")]
    assert first != other


def test_every_prompt_of_a_row_is_of_one_instance(tmp_path):
    many = [template(f"t{i}", f"{i}: {{{{ word }}}} ||| x") for i in range(3)]
    examples = reading(tmp_path, many, ROWS, prompts_per_row=0).examples("riddles__easy")
    assert [example.id for example in examples] == [f"train-{row}-{i}" for row in (1, 2) for i in range(3)]
    assert len({example.instance for example in examples[:3]}) == 1
    assert len({example.instance for example in examples}) == 2
    assert {example.source[0] for example in examples[:3]} == set("012")


def test_blank_and_failing_templates_give_way_to_others(tmp_path):
    fitting = template("fits", "Say {{ word }}. ||| {{ word }}")
    blank = template("blank", "{% if label == 7 %}Say {{ word }}.|||{{ word }}{% endif %}")
    half = template("half", "Say {{ word }}.|||{{ absent }}")
    fails = template("fails", "{{ word }} ||| {{ words.index('x') }}")
    three = template("three", "a ||| b ||| c")
    found = reading(tmp_path, [blank, half, fails, three, fitting], ROWS * 20)
    assert {example.targets for example in found.examples("riddles__easy")} == {("sea",), ("sun",)}
    assert found.counts("riddles__easy").repaired["template blank for a row, another taken"] > 20
    lost = reading(tmp_path, [blank, half, fails, three], ROWS)
    assert lost.examples("riddles__easy") == []
    assert lost.counts("riddles__easy").dropped == {"every template is blank for the row": 2}


def test_choice_is_seeded_and_separators_of_a_row_stay(tmp_path):
    drawn = template("drawn", "{{ choice(words) }} {{ words | choice }} ||| {{ words | join(' ') }}")
    rows = [{"words": ["a", "b|||c", "d"]} for _ in range(60)]
    first = reading(tmp_path, [drawn], rows).examples("riddles__easy")
    assert first == reading(tmp_path, [drawn], rows).examples("riddles__easy")
    assert len({example.source for example in first}) == 9
    assert {example.targets for example in first} == {("a b|||c d",)}


def test_filters_and_globals_of_promptsource(tmp_path):
    jinja = "{% for a, b in zip(x, y) %}{{ a }}{{ b }} {% endfor %}|||{{ x | most_frequent | first }}"
    (example,) = reading(tmp_path, [template("zip", jinja)], [{"x": [2, 1, 1], "y": "abc"}]).examples(
        "riddles__easy"
    )
    assert (example.source, example.targets) == ("2a 1b 1c", ("1",))


def test_templates_run_in_a_sandbox(tmp_path):
    escape = template("escape", "{{ ''.__class__.__mro__[1].__subclasses__() }} ||| x")
    assert reading(tmp_path, [escape], ROWS).examples("riddles__easy") == []


def test_choices_that_accuracy_does_not_use_are_no_candidates(tmp_path):
    explained = template("why", "Is {{ word }} wet? ||| No, since", "Yes ||| No", metric="Other")
    found = reading(tmp_path, [explained], ROWS)
    assert found.tasks["riddles__easy"].metric == "rouge_l"
    assert found.examples("riddles__easy")[0].candidates == ()


def test_only_the_row_splits_asked_for_are_read(tmp_path):
    write_files(tmp_path, {"rows/riddles/easy/test.csv": "word,label\nrain,0\n"})
    assert len(reading(tmp_path, [WET], ROWS).examples("riddles__easy")) == 2
    both = reading(tmp_path, [template("say", "{{ word }}|||x")], ROWS, row_splits=["train", "test"])
    assert [example.id for example in both.examples("riddles__easy")] == ["test-2", "train-1", "train-2"]
    none = reading(tmp_path, [WET], ROWS, row_splits=["validation"])
    assert none.drops.skipped_files == {"riddles/easy": "no file of the splits validation"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("templates: [", "templates.yaml: not a PromptSource file of templates"),
        ("dataset: x\n", "templates.yaml: not a PromptSource file of templates"),
        ("templates:\n" + template("bad", "{% if %}"), "templates.yaml: template is not Jinja"),
    ],
)
def test_files_that_are_no_templates(tmp_path, content, message):
    path = write_files(tmp_path, {"templates.yaml": content}) / "templates.yaml"
    with pytest.raises(ValueError, match=message):
        load_templates(path)


def test_folders_that_do_not_fit(tmp_path):
    write_files(tmp_path, {"rows/x/train.jsonl": ROWS, "templates/y/templates.yaml": "templates:\n" + WET})
    with pytest.raises(ValueError, match="no data set of .* has rows here"):
        Reading(read, tmp_path / "rows", templates="../templates")
    with pytest.raises(FileNotFoundError, match="no folder of templates"):
        Reading(read, tmp_path / "rows", templates="../absent")


def test_draws_are_those_of_the_first_release():
    # A change of these changes every bench: raise the bench's format version with it.
    assert [draw(10, "1 train-1", str(i)) for i in range(6)] == DRAWN


DRAWN = [2, 0, 7, 8, 3, 1]
