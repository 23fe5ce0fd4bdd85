import pytest
import torch
from safetensors.torch import load_file

from genkit import textual_inversion
from genkit.denoisers import from_pipeline
from genkit.testing import tiny

PIPELINES = ("sd15", "sdxl", "sd3")


@pytest.fixture(params=PIPELINES)
def made(request, tiny_pipeline):
    """A pipeline with a token, which started as the word 'a' and has moved, and its vectors."""
    pipe = tiny_pipeline(request.param)
    embedding = textual_inversion.insert(pipe, from_pipeline(pipe), token="<it>", initializer="a")
    with torch.no_grad():
        for value in embedding.values:
            value += torch.randn_like(value)
    return request.param, pipe, embedding


def images(pipe, name, prompt):
    generator = torch.Generator().manual_seed(0)
    arguments = tiny.call_arguments(name) | dict(prompt=prompt, output_type="pt", generator=generator)
    return pipe(**arguments).images


@pytest.mark.parametrize("name", PIPELINES)
def test_a_token_starts_as_its_word_and_changes_no_other(name, tiny_pipeline):
    pipe = tiny_pipeline(name)
    plain = [images(pipe, name, prompt) for prompt in ("b a c", "b c")]
    textual_inversion.insert(pipe, from_pipeline(pipe), token="<it>", initializer="a")
    assert torch.equal(images(pipe, name, "b c"), plain[1])
    for tokenizer, encoder in textual_inversion.text_encoders(pipe).values():
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("<it>", "a")]
        assert [len(i) for i in ids] == [1, 1] and ids[0] != ids[1]
        table = encoder.get_input_embeddings()
        assert torch.equal(*(table(torch.tensor(i)) for i in ids))


def test_vectors_are_looked_up_where_they_are_said_to_be(made):
    name, pipe, embedding = made
    before, other = images(pipe, name, "b <it>"), images(pipe, name, "b")
    with embedding.at(embedding.flat.detach() + 1):
        assert not torch.equal(images(pipe, name, "b <it>"), before)
        assert torch.equal(images(pipe, name, "b"), other)
    assert torch.equal(images(pipe, name, "b <it>"), before)
    with pytest.raises(RuntimeError, match="within"), embedding.at(embedding.flat.detach() + 1):
        raise RuntimeError("within")
    assert torch.equal(images(pipe, name, "b <it>"), before)


def test_a_fresh_pipeline_gets_the_token(made, tiny_pipeline, tmp_path):
    name, pipe, embedding = made
    embedding.save_pretrained(tmp_path)
    fresh = tiny_pipeline(name)
    assert textual_inversion.load(fresh, tmp_path) == "<it>"
    torch.testing.assert_close(images(fresh, name, "b <it>"), images(pipe, name, "b <it>"), rtol=0, atol=1e-5)
    with pytest.raises(
        ValueError, match="token='<it>' exists already in text_encoder's tokenizer; load it into a fresh"
    ):
        textual_inversion.load(fresh, tmp_path)


def test_diffusers_loads_the_file(tiny_pipeline, tmp_path):
    pipe = tiny_pipeline("sd15")
    embedding = textual_inversion.insert(pipe, from_pipeline(pipe), token="<it>", initializer="a")
    with torch.no_grad():
        embedding.values[0].add_(1)
    embedding.save_pretrained(tmp_path)
    assert load_file(tmp_path / "learned_embeds.safetensors")["<it>"].shape == (1, 32)
    fresh = tiny_pipeline("sd15")
    fresh.load_textual_inversion(str(tmp_path), weight_name="learned_embeds.safetensors")
    torch.testing.assert_close(images(fresh, "sd15", "<it>"), images(pipe, "sd15", "<it>"), rtol=0, atol=1e-5)


def test_a_class_gets_a_new_vector(tiny_pipeline, tmp_path):
    pipe = tiny_pipeline("dit")
    arguments = tiny.call_arguments("dit") | dict(class_labels=[3], output_type="np")
    embedding = textual_inversion.insert(pipe, from_pipeline(pipe), token="3")

    def drawn(pipe, label):
        return pipe(**arguments | dict(class_labels=[label], generator=torch.Generator().manual_seed(0))).images

    before = [drawn(pipe, label) for label in (2, 3)]
    with torch.no_grad():
        embedding.values[0].add_(1)
    assert (drawn(pipe, 2) == before[0]).all() and (drawn(pipe, 3) != before[1]).any()
    embedding.save_pretrained(tmp_path)
    fresh = tiny_pipeline("dit")
    assert textual_inversion.load(fresh, tmp_path) == "3"
    assert abs(drawn(fresh, 3) - drawn(pipe, 3)).max() < 1e-5 and (drawn(fresh, 2) == before[0]).all()


def test_bad_input(tiny_pipeline, tmp_path):
    pipe = tiny_pipeline("sdxl")
    student = from_pipeline(pipe)

    def insert(**settings):
        with pytest.raises(ValueError) as caught:
            textual_inversion.insert(pipe, student, **settings)
        assert all(len(t) == n for t, n in sizes)
        return str(caught.value)

    sizes = [(t, len(t)) for t, _ in textual_inversion.text_encoders(pipe).values()]
    assert "token='a' exists already in text_encoder's tokenizer" in insert(token="a", initializer="b")
    assert "initializer='ab' is 2 tokens of text_encoder" in insert(token="<it>", initializer="ab")
    assert "initializer=None: name a word" in insert(token="<it>")
    pipe = tiny_pipeline("dit")
    student, sizes = from_pipeline(pipe), []
    assert "token='x': the network has classes; accepted are 0 to" in insert(token="x")
    assert "a class starts from its own vector" in insert(token="1", initializer="b")
    with pytest.raises(ValueError, match="holds no textual_inversion.json"):
        textual_inversion.load(pipe, tmp_path)
    sd15 = tiny_pipeline("sd15")
    textual_inversion.insert(sd15, from_pipeline(sd15), token="<it>", initializer="a").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"is for \['text_encoder'\], the pipeline has \['text_encoder', 'text_encoder_2'"
    ):
        textual_inversion.load(tiny_pipeline("sdxl"), tmp_path)
