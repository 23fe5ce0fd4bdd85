import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from genkit import textual_inversion
from genkit.denoisers import from_pipeline
from genkit.testing import tiny


def class_images(pipe, label):
    arguments = tiny.call_arguments("dit") | dict(class_labels=[label], generator=torch.Generator().manual_seed(0))
    return torch.as_tensor(pipe(**arguments).images)


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
        for value in embedding.values:
            value += torch.randn_like(value)
    assert (drawn(pipe, 2) == before[0]).all() and (drawn(pipe, 3) != before[1]).any()
    embedding.save_pretrained(tmp_path)
    fresh = tiny_pipeline("dit")
    assert textual_inversion.load(fresh, tmp_path) == "3"
    assert abs(drawn(fresh, 3) - drawn(pipe, 3)).max() < 1e-5 and (drawn(fresh, 2) == before[0]).all()


def test_every_table_of_a_class_gets_its_own_row(tiny_pipeline, tmp_path):
    """Diffusers' DiT embeds the class anew in each of its blocks."""
    pipe = tiny_pipeline("dit")
    tables = [m.weight for n, m in pipe.transformer.named_modules() if n.endswith("embedding_table")]
    assert len(tables) > 1 and not torch.equal(tables[0], tables[1])
    embedding = textual_inversion.insert(pipe, from_pipeline(pipe), token="3")
    assert torch.equal(embedding.flat, torch.cat([table[3] for table in tables]))
    embedding.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "learned_class.safetensors")
    assert len(saved) == len(tables) and all(v.shape == (1, 16) for v in saved.values())
    plain, drawn = class_images(pipe, 3), []
    for value in embedding.values:
        with embedding.at(torch.cat([v + 1 if v is value else v for v in embedding.values])):
            drawn.append(class_images(pipe, 3))
    assert all(not torch.equal(d, plain) for d in drawn) and not torch.equal(drawn[0], drawn[1])
    with pytest.raises(ValueError, match="token='3': that class is learned already"):
        textual_inversion.insert(pipe, from_pipeline(pipe), token="3")
    assert torch.equal(class_images(pipe, 3), plain)


@pytest.mark.parametrize("name", PIPELINES)
def test_two_words_at_once(name, tiny_pipeline):
    pipe = tiny_pipeline(name)
    student, prompts = from_pipeline(pipe), ("b <it>", "b <that>", "<that> <it>", "b c")
    first = textual_inversion.insert(pipe, student, token="<it>", initializer="a")
    with torch.no_grad():
        first.values[0].add_(1)
    second = textual_inversion.insert(pipe, student, token="<that>", initializer="<it>")  # a word that was learned
    assert torch.equal(second.flat, first.flat)
    before = [images(pipe, name, p) for p in prompts]
    assert torch.equal(before[0], before[1])
    for embedding, changed in ((first, [True, False, True, False]), (second, [False, True, True, False])):
        with embedding.at(embedding.flat.detach() + 1):
            now = [images(pipe, name, p) for p in prompts]
        assert [not torch.equal(a, b) for a, b in zip(now, before, strict=True)] == changed
    for encoder in (e for _, e in textual_inversion.text_encoders(pipe).values()):
        encoder(torch.tensor([[1, 2]]))[0].sum().backward()  # tables go on to be looked up with gradients
    with pytest.raises(IndexError):  # a number of no word
        first.rows[0].table(torch.tensor([first.rows[0].table.num_embeddings + 10]))
    theta = second.flat.detach().requires_grad_()
    with second.at(theta):
        rows = [row.table(torch.tensor([row.index])) for row in second.rows]
    (gradient,) = torch.autograd.grad(sum(row.sum() for row in rows), theta)
    assert gradient.eq(1).all()


@pytest.mark.parametrize("name", [*PIPELINES, "dit"])
def test_removed_tokens_leave_no_trace(name, tiny_pipeline):
    pipe = tiny_pipeline(name)
    student, classes = from_pipeline(pipe), name == "dit"
    encoders = textual_inversion.text_encoders(pipe)
    networks = {"transformer": pipe.transformer} if classes else {n: e for n, (_, e) in encoders.items()}
    states = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in networks.items()}
    draw = class_images if classes else lambda pipe, prompt: images(pipe, name, prompt)
    words = [tokenizer("a <it> b")["input_ids"] for tokenizer, _ in encoders.values()]
    drawn = draw(pipe, 3 if classes else "a b")
    more = dict(token="3") if classes else dict(token="<it>", initializer="a")
    first = textual_inversion.insert(pipe, student, **more)
    second = textual_inversion.insert(pipe, student, **more | dict(token="4" if classes else "<that>"))
    if not classes:
        with pytest.raises(ValueError, match="token='<it>' is not the last word of text_encoder's tokenizer"):
            textual_inversion.remove(pipe, first)
    with torch.no_grad():
        for value in (*first.values, *second.values):
            value += 1
    textual_inversion.remove(pipe, second)
    textual_inversion.remove(pipe, first)
    with pytest.raises(ValueError, match="is not in the .* of this pipeline"):
        textual_inversion.remove(pipe, first)
    for n, network in networks.items():
        state = network.state_dict()
        assert state.keys() == states[n].keys() and all(torch.equal(v, states[n][k]) for k, v in state.items())
        assert not any(isinstance(m, textual_inversion.Table) for m in network.modules())
    assert [tokenizer("a <it> b")["input_ids"] for tokenizer, _ in encoders.values()] == words
    assert torch.equal(draw(pipe, 3 if classes else "a b"), drawn)


@pytest.mark.parametrize("name", [*PIPELINES, "dit"])
def test_a_saved_pipeline_has_the_token(name, tiny_pipeline, tmp_path):
    pipe, classes = tiny_pipeline(name), name == "dit"
    more = dict(token="3") if classes else dict(token="<it>", initializer="a")
    embedding = textual_inversion.insert(pipe, from_pipeline(pipe), **more)
    with torch.no_grad():
        for value in embedding.values:
            value += 1
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    drawn = [class_images(p, 3) if classes else images(p, name, "b <it>") for p in (pipe, again)]
    torch.testing.assert_close(drawn[1], drawn[0], rtol=0, atol=1e-5)
    if not classes:
        assert not torch.equal(images(again, name, "b <it>"), images(again, name, "b a"))


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


def test_files_that_do_not_fit(tiny_pipeline, tmp_path):
    def written(name, **more):
        folder = tmp_path / name
        shutil.rmtree(folder, ignore_errors=True)
        pipe = tiny_pipeline(name)
        textual_inversion.insert(pipe, from_pipeline(pipe), **more).save_pretrained(folder)
        return folder

    def refused(name, folder, match):
        pipe = tiny_pipeline(name)
        parts = [p for p in pipe.components.values() if isinstance(p, torch.nn.Module)]
        before = [{k: v.clone() for k, v in p.state_dict().items()} for p in parts]
        with pytest.raises(ValueError, match=match):
            textual_inversion.load(pipe, folder)
        for part, state in zip(parts, before, strict=True):
            assert all(torch.equal(v, state[k]) for k, v in part.state_dict().items())

    word, strange = dict(token="<it>", initializer="a"), "is not what a run of textual inversion wrote"
    (written("sdxl", **word) / "learned_embeds_2.safetensors").unlink()
    refused("sdxl", tmp_path / "sdxl", strange)
    save_file({"<that>": torch.zeros(1, 32)}, tmp_path / "sdxl" / "learned_embeds_2.safetensors")
    refused("sdxl", tmp_path / "sdxl", strange)
    (tmp_path / "sdxl" / "learned_embeds_2.safetensors").write_bytes(b"no such file")
    refused("sdxl", tmp_path / "sdxl", strange)
    for text in ("", "[]", "{}", '{"kind": "word"}'):
        (written("sd15", **word) / "textual_inversion.json").write_text(text)
        refused("sd15", tmp_path / "sd15", strange)
    save_file({"<it>": torch.zeros(2, 32)}, written("sd15", **word) / "learned_embeds.safetensors")
    refused("sd15", tmp_path / "sd15", r"has \(2, 32\) for text_encoder; accepted is one vector")
    refused("sd15", written("dit", token="3"), "UNet2DConditionModel has neither text encoders nor an embedding of cl")
    about = tmp_path / "dit" / "textual_inversion.json"
    for label in ("1000", "1001", "-1"):  # that of no class, and none at all
        about.write_text(about.read_text().replace('"3"', f'"{label}"'))
        refused("dit", tmp_path / "dit", f"token='{label}': the network has classes; accepted are 0 to 999")
        written("dit", token="3")
    file = written("dit", token="3") / "learned_class.safetensors"
    save_file({k: v[:, :-1].contiguous() for k, v in load_file(file).items()}, file)
    refused("dit", tmp_path / "dit", "has a vector of 15 for transformer_blocks.0")
    (written("dit", token="3") / "learned_class.safetensors").unlink()
    refused("dit", tmp_path / "dit", strange)
    pipe = tiny_pipeline("dit")
    textual_inversion.insert(pipe, from_pipeline(pipe), token="3")
    with pytest.raises(ValueError, match="that class is being learned; load it into a fresh pipeline"):
        textual_inversion.load(pipe, written("dit", token="3"))


def test_tables_that_are_no_embedding(tiny_pipeline):
    class Scaled(torch.nn.Embedding):
        pass

    pipe = tiny_pipeline("sd15")
    pipe.text_encoder.set_input_embeddings(Scaled(1000, 32))
    with pytest.raises(ValueError, match="the table of text_encoder is a Scaled; accepted is an nn.Embedding"):
        textual_inversion.insert(pipe, from_pipeline(pipe), token="<it>", initializer="a")
    assert "<it>" not in pipe.tokenizer.get_vocab()
