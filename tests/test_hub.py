"""Portable folders, the stock loader, hints, cards and sharing."""

import inspect
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from genkit import hub
from genkit.testing import tiny

# A process that finds torch and Diffusers but no genkit, however genkit was installed.
WITHOUT_GENKIT = """
import sys
sys.path = [p for p in sys.path if p not in ("", {root!r})]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
import importlib.util
assert importlib.util.find_spec("genkit") is None
"""


def child(code: str, *args, env: dict | None = None) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# -- portable folders ---------------------------------------------------------------------------------------------

OWN_PIPELINE = """
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from genkit.interpolants import Linear


class OwnNet(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 3):
        super().__init__()
        self.layer = torch.nn.Linear(width, width)

    def forward(self, x):
        return self.layer(x)


class OwnPipeline(DiffusionPipeline):
    def __init__(self, net, scheduler):
        super().__init__()
        self.register_modules(net=net, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self):
        x = torch.ones(1, self.net.config.width)
        return Linear().interpolate(self.net(x), x, torch.tensor(0.25))
"""


def class_conditional(scheduler, guider=None):
    from genkit.networks.dit import DiT
    from genkit.pipelines import ClassConditionalPipeline

    net = DiT(hidden_size=16, num_layers=1, num_heads=2)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    pipe = ClassConditionalPipeline(net, scheduler, guider=guider)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(name, pipe):
    """Images of a pipeline; its source runs in the child as well."""
    import torch

    if name == "own":
        return pipe().numpy()
    pipe.set_progress_bar_config(disable=True)
    inputs = dict(class_labels=[1, 2])
    if name == "stock":
        inputs = dict(prompt="a cat", height=32, width=32, max_sequence_length=16, guidance_scale=1.0)
    generator = torch.Generator().manual_seed(0)
    return pipe(num_inference_steps=2, generator=generator, output_type="np", **inputs).images


@pytest.fixture(scope="module")
def portable(tmp_path_factory):
    """Portable folders, their pipelines, and what one process without genkit made of them all."""
    from genkit.guidance import CFG
    from genkit.schedulers import FlowMapScheduler

    root = tmp_path_factory.mktemp("portable")
    (root / "own_module.py").write_text(OWN_PIPELINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        import own_module

        stock = tiny.pipeline("sd3")
        stock.scheduler = FlowMapScheduler(shift=3.0)
        pipes = {
            "own": own_module.OwnPipeline(own_module.OwnNet(4), DDIMScheduler()),
            "student": class_conditional(FlowMapScheduler(shift=2.0)),
            "guided": class_conditional(FlowMatchEulerDiscreteScheduler(), CFG(guidance_scale=2.0)),
            "stock": stock,
        }
        for name, pipe in pipes.items():
            hub.save_portable(pipe, root / name)
        wanted = {name: run(name, pipe) for name, pipe in pipes.items()}
    script = "\n".join(
        [
            WITHOUT_GENKIT.format(root=str(Path(hub.__file__).parents[1])),
            inspect.getsource(run),
            "import json, numpy",
            "from diffusers import DiffusionPipeline",
            "for name in json.loads(sys.argv[2]):",
            "    folder = sys.argv[1] + '/' + name",
            "    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)",
            "    numpy.save(folder + '.npy', run(name, pipe))",
            "    print(name, *sorted(type(p).__name__ for p in pipe.components.values() if p is not None))",
        ]
    )
    printed = child(script, root, json.dumps(list(pipes)), env={"HF_MODULES_CACHE": str(root / "cache")})
    classes = {line.split()[0]: set(line.split()[1:]) for line in printed.splitlines()}
    got = {name: numpy.load(root / f"{name}.npy") for name in pipes}
    return root, wanted, got, classes


@pytest.mark.parametrize(
    "name, classes",
    [
        ("own", {"OwnNet", "DDIMScheduler"}),
        ("student", {"DiT", "FlowMapScheduler"}),
        ("guided", {"DiT", "FlowMatchEulerDiscreteScheduler", "CFG"}),
        ("stock", {"SD3Transformer2DModel", "FlowMapScheduler"}),
    ],
)
def test_portable_folders_load_without_genkit(name, classes, portable):
    _, wanted, got, found = portable
    assert classes <= found[name]
    assert numpy.ptp(wanted[name]) > 0.1
    numpy.testing.assert_allclose(got[name], wanted[name], rtol=0, atol=1e-5)


def test_a_portable_folder_explains_itself(portable):
    root = portable[0]
    assert {str(f.relative_to(root)) for f in (root / "guided").rglob("*.py")} == {
        "guided/pipeline.py",
        "guided/transformer/genkit_networks_dit.py",
        "guided/guider/genkit_guidance_cfg.py",
    }
    assert [f.name for f in (root / "stock").rglob("*.py")] == ["genkit_schedulers_flow_map.py"]
    assert "trust_remote_code=True" in (root / "guided" / "README.md").read_text()
    assert "diffusers>=" in (root / "guided" / "requirements.txt").read_text()


def test_a_class_that_cannot_be_shipped(tmp_path, tiny_pipeline):
    class Local(DDIMScheduler):
        pass

    Local.__module__ = "__main__"
    pipe = tiny_pipeline("sd15")
    pipe.scheduler = Local()
    with pytest.raises(ValueError, match="Local is defined in '__main__', which has no file to ship"):
        hub.save_portable(pipe, tmp_path / "portable")
    assert not (tmp_path / "portable").exists()


# -- the stock loader, after import genkit ------------------------------------------------------------------------


# What constructors cannot do without.
SETTINGS = {
    "DiscriminatorHead": {"at": ["sample"], "channels": [4], "hidden_size": 8, "norm_num_groups": 2},
    "FixedCondition": {"shapes": {"class_labels": [1]}},
    "ImageTokenizer": {
        "quantizer": {"kind": "vq", "codebook_size": 4, "dim": 2},
        "block_out_channels": [8, 8],
        "latent_channels": 8,
        "norm_num_groups": 4,
    },
    "ReadoutHead": {"at": ["sample"], "channels": [1], "projection_dim": 24, "norm_num_groups": 1},
}


def test_stock_loader_finds_every_component_after_import_genkit(tmp_path, tiny_pipeline):
    """One fresh process; remote code is off, since genkit's classes need none."""
    from diffusers import ModelMixin

    from genkit.guidance.base import Guider
    from genkit.registry import members
    from genkit.schedulers.base import PathScheduler

    guiders = list(members("genkit.guidance", Guider).values())
    schedulers = list(members("genkit.schedulers", PathScheduler).values())
    networks = list(members("genkit.networks", ModelMixin).values())
    assert len(guiders) >= 2 and schedulers and networks
    parts = [*guiders, *schedulers, *networks]
    pipe = tiny_pipeline("sd3")
    for i, cls in enumerate(parts):
        # Any pipeline's slot will do: what is tested is how the loader finds the class.
        made = class_conditional(FlowMatchEulerDiscreteScheduler())
        slot = "guider" if cls in guiders else "scheduler" if cls in schedulers else "transformer"
        made.register_modules(**{slot: cls(**SETTINGS.get(cls.__name__, {}))})
        made.save_pretrained(tmp_path / str(i))
        assert json.loads((tmp_path / str(i) / "model_index.json").read_text())[slot] == [cls.__module__, cls.__name__]
    pipe.scheduler = schedulers[0]()
    pipe.save_pretrained(tmp_path / "stock")
    code = """
    import sys
    import genkit
    assert "torch" not in sys.modules and "genkit.pipelines" in sys.modules
    from diffusers import DiffusionPipeline
    print(type(DiffusionPipeline.from_pretrained(sys.argv[1] + "/stock").scheduler).__name__)
    for i in range(int(sys.argv[2])):
        pipe = genkit.pipelines.ClassConditionalPipeline.from_pretrained(f"{sys.argv[1]}/{i}")
        print(*(type(part).__name__ for part in pipe.components.values() if part is not None))
    """
    printed = child(code, tmp_path, len(parts), env={"DIFFUSERS_DISABLE_REMOTE_CODE": "true"}).splitlines()
    assert printed[0] == schedulers[0].__name__
    for cls, line in zip(parts, printed[1:], strict=True):
        assert cls.__name__ in line.split()


def test_import_genkit_is_light():
    code = """
    import sys, time
    start = time.perf_counter()
    import genkit
    took = time.perf_counter() - start
    heavy = {"torch", "diffusers", "transformers", "numpy", "accelerate"} & set(sys.modules)
    print(took, sorted(heavy))
    """
    best = min((child(code).split(maxsplit=1) for _ in range(3)), key=lambda line: float(line[0]))
    assert best[1].strip() == "[]"
    assert float(best[0]) < 0.3


# -- hints, cards, sharing ----------------------------------------------------------------------------------------


def test_a_torchvision_of_another_torch_gives_a_hint(tmp_path, monkeypatch):
    from genkit._lazy import register_tree

    error = 'raise RuntimeError("operator torchvision::nms does not exist")\n'
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(error)
    (tmp_path / "torchvision-0.1.dist-info").mkdir()
    (tmp_path / "torchvision-0.1.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.1\n")
    (tmp_path / "broken_family").mkdir()
    (tmp_path / "broken_family" / "__init__.py").write_text("")
    (tmp_path / "broken_family" / "inner.py").write_text("import torchvision\n")
    (tmp_path / "broken_family" / "outer.py").write_text("from broken_family.inner import thing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    import broken_family  # noqa: F401

    register_tree("broken_family")
    with pytest.raises(
        ImportError, match="torchvision 0.1 does not work with torch .* pip uninstall torchvision"
    ) as caught:
        sys.modules["broken_family.outer"].anything  # noqa: B018
    assert isinstance(caught.value.__context__ or caught.value.__cause__, RuntimeError)


def test_no_hint_for_other_errors(monkeypatch):
    from genkit._hints import hint

    assert hint(ImportError("no module named 'flash_attn'")) is None
    monkeypatch.setitem(sys.modules, "torchvision", sys)  # one that works
    assert hint(RuntimeError("operator torchvision::nms does not exist")) is None


def test_model_card_round_trip(tmp_path):
    from huggingface_hub import ModelCard

    card = hub.model_card(
        "LSD", {"steps": 600}, {"fd": 24.0321, "calls": 1}, 'print("hi")', base_model="a/b", tags=("digits",)
    )
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.tags == ["genkit", "lsd", "digits"] and loaded.data.base_model == "a/b"
    assert "| fd | 24.03 |" in loaded.text and "| calls | 1 |" in loaded.text
    assert 'print("hi")' in loaded.text and '"steps": 600' in loaded.text
    assert "## Metrics" not in hub.model_card("LSD", {}).text


def test_push_saves_first(tmp_path, tiny_pipeline):
    with pytest.raises(ConnectionError, match=r"could not push to me/thing: .*[Oo]ffline") as caught:
        hub.push_to_hub(tiny_pipeline("dit"), "me/thing", folder=tmp_path / "thing")
    assert f"push_to_hub('{tmp_path / 'thing'}', 'me/thing')" in str(caught.value)
    assert DiffusionPipeline.from_pretrained(tmp_path / "thing").transformer.config.num_layers == 2
    with pytest.raises(ValueError, match="repo_id='thing': accepted is owner/name"):
        hub.push_to_hub(tmp_path, "thing")
    with pytest.raises(FileNotFoundError, match="nowhere is no folder; nothing was pushed"):
        hub.push_to_hub(tmp_path / "nowhere", "me/thing")


def test_push_uploads_the_folder(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, *a, **k: calls.append((a, k)))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **k: calls.append(k) or "address")
    assert hub.push_to_hub(tmp_path, "me/thing", private=True) == "address"
    assert calls[0] == (("me/thing",), dict(private=True, exist_ok=True))
    assert calls[1]["folder_path"] == tmp_path and calls[1]["repo_id"] == "me/thing"
