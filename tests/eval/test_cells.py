import pytest
from diffusers import DDIMScheduler

from genkit.eval.cells import cells
from genkit.guidance.cfg import CFG
from genkit.step_annealing import StepAnnealer


@pytest.fixture(scope="module")
def pipe(tiny_pipeline):
    from genkit.pipelines.commands import adopt

    return adopt(tiny_pipeline("dit"))


def test_the_product_of_the_axes_with_one_cell_without_guidance(pipe):
    found = cells(pipe, steps=[1, 4], guidance=[1, 3, 7.5], guiders=["cfg", "apg:eta=0"])
    said = [(c.made_with["steps"], c.made_with["guider"], c.made_with["guidance_scale"]) for c in found]
    guided = [(steps, name, scale) for name in ("cfg", "apg:eta=0") for scale in (3, 7.5) for steps in (1, 4)]
    assert sorted(said) == sorted([(1, "none", 1), (4, "none", 1), *guided])
    assert len({cell.name for cell in found}) == 10 and all("/" not in c.name and ":" not in c.name for c in found)
    assert [c.guider.guidance_scale for c in found if c.guider] == [
        c.made_with["guidance_scale"] for c in found if c.guider
    ]
    assert {c.guider.config.eta for c in found if c.made_with["guider"] == "apg:eta=0"} == {0}
    assert all((c.guider is None) == (c.made_with["guider"] == "none") for c in found)
    assert [c.cost for c in found] == [c.steps * (1 if c.guider is None else 2) for c in found]


def test_names_stay_as_axes_grow_and_tell_settings_apart(pipe):
    few = {c.name for c in cells(pipe, steps=[2], guidance=[3.0])}
    more = {c.name for c in cells(pipe, steps=[2, 3], guidance=[3.0, 5.0], guiders=["cfg", "apg"])}
    assert few < more
    other = {c.name for c in cells(pipe, steps=[2], guidance=[3.0], schedulers=["DDIMScheduler"])}
    assert not few & other


def test_a_run_said_in_two_ways_is_one(pipe):
    assert len(cells(pipe, steps=[2], guidance=[3.0], guiders=["cfg", "cfg:guidance_rescale=0.0"])) == 1


def test_schedulers_are_those_asked_for(pipe):
    found = cells(pipe, steps=[2], schedulers=["DDIMScheduler", "DDIMScheduler:clip_sample=True", "PNDMScheduler"])
    assert [type(c.scheduler).__name__ for c in found] == ["DDIMScheduler", "DDIMScheduler", "PNDMScheduler"]
    assert isinstance(found[1].scheduler, DDIMScheduler) and found[1].scheduler.config.clip_sample is True
    assert found[1].made_with["scheduler"] == "DDIMScheduler:clip_sample=True"


def test_a_pipelines_own_guider_is_put_aside_where_there_is_no_guidance(pipe):
    pipe.register_modules(guider=CFG(guidance_scale=4.0))
    try:
        (cell,) = cells(pipe, steps=[2])
    finally:
        pipe.register_modules(guider=None)
    assert cell.guider is not None and cell.guider.neutral and cell.made_with["guider"] == "none" and cell.cost == 2


def test_a_distilled_scale_is_told_to_the_network(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe), "embeds_guidance", True)
    found = cells(pipe, steps=[2], guidance=[1, 3.5])
    assert [c.told for c in found] == [{"guidance_scale": 1.0}, {"guidance_scale": 3.5}]
    assert {c.made_with["guider"] for c in found} == {"embedded"} and all(c.guider is None for c in found)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (dict(steps=[]), "steps: no value"),
        (dict(steps=[1], guidance=[]), "guidance: no value"),
        (dict(steps=[0]), "steps=0: must be at least 1"),
        (dict(steps=[StepAnnealer(4, 2)]), "steps=linear:hi=4,lo=2: steps that fall are those of a diffusion head"),
        (dict(steps=[1], over={"eta": [0, 1]}), "the axes of ClassConditionalPipeline are steps, guidance, guider"),
        (dict(steps=[1, 1]), "steps: 1 is named twice"),
        (dict(steps=[1], guidance=[2, 2.0]), "guidance: 2 is named twice"),
        (dict(steps=[1], guidance=[2], guiders=["cgf"]), "guider='cgf' is not known; did you mean 'cfg'"),
        (dict(steps=[1], guidance=[2], guiders=["cfg:etta=0"]), "'etta' is not known"),
        (dict(steps=[1], guidance=[-2]), "guidance_scale=-2"),
        (dict(steps=[1], guidance=[2], guiders=["cfg:guidance_scale=3"]), "leave guidance_scale out"),
        (dict(steps=[1], guidance=[2], guiders=["autoguidance"]), "needs 'weak'"),
        (dict(steps=[1], guiders=["apg"]), "guider='apg' has no effect where guidance is 1 alone"),
        (dict(steps=[1], guidance=[2], guiders=["embedded"]), "distilled for no guidance scale"),
        (dict(steps=[1], schedulers=["ddim"]), "scheduler='ddim' is not known"),
    ],
)
def test_bad_axes_are_refused(pipe, axes, words):
    with pytest.raises(ValueError) as error:
        cells(pipe, **axes)
    assert words in str(error.value)
