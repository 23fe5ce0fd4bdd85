"""The Inception network of 2015: the features of the Frechet inception distance, under any resize rule."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from genkit._files import load_into
from genkit.eval.extractors._resized import ResizedExtractor, check_rule
from genkit.eval.extractors.base import Features, file_hash
from genkit.networks.inception import Inception2015
from genkit.rewards._loading import read_weights

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
NAMES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")  # torch-fidelity's copy
PUBLISHED = "6726825d0af5"  # the weights' SHA-256 begins so


class InceptionExtractor(ResizedExtractor):
    """2048 pooled features and 1008 logits, without bias, of images on 0..255 as ``(x - 128) / 128``.

    Args:
        weights: the published conversion of TensorFlow's weights, a ``.pth`` or ``.safetensors`` file; or a URL, which
            is then downloaded once, to where torch.hub keeps its files. If None it must already be there, from
            pytorch-fid or torch-fidelity.
        resize: a rule of :mod:`genkit.eval.resize`. ``tf1`` is what FID was defined with and ADM's tables have:
            distances are then called ``fid``, with others ``fid[clean]``, ``fid[antialias]`` ... With ``pytorch``,
            images go to the network as ``(x - 127.5) / 127.5``, as they do in pytorch-fid.

    With weights of another SHA-256 than the published file's the distance bears theirs: ``fid[a1b2c3d4e5f6]``.

    Raises:
        ValueError: no weights (with the command that fetches them), or others than this network's.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", arXiv 1706.08500; weights as converted by
    pytorch-fid.
    """

    usual = "tf1"
    dim = Inception2015.feature_dim
    num_classes = Inception2015.num_classes

    def __init__(self, weights: str | Path | None = None, resize: str = "tf1"):
        check_rule(resize)
        file = _found(weights)
        digest = file_hash(file)
        super().__init__(
            _loaded(file),
            name="inception-2015-12-05",
            weights=digest,
            distance="fid" if digest == PUBLISHED else f"fid[{digest}]",
            size=Inception2015.size,
            resize=resize,
        )

    def see(self, pixels: Tensor) -> Features:
        middle = 127.5 if self.resize == "pytorch" else 128
        return Features(*self.network((pixels - middle) / middle))


def _found(weights: str | Path | None) -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if weights is None:
        there = [folder / name for name in NAMES if (folder / name).is_file()]
        if not there:
            raise ValueError(
                f"extractor 'inception' has no weights: {NAMES[0]} is not in {folder}. "
                f"Fetch it with\n  curl -L --create-dirs -o {folder / NAMES[0]} {URL}\n"
                "or set weights to a file or a URL"
            )
        return there[0]
    if str(weights).startswith(("http://", "https://")):
        file = folder / str(weights).rpartition("/")[2]
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(str(weights), str(file))
        return file
    file = Path(weights).expanduser()
    if file.suffix == ".pt":
        raise ValueError(
            f"weights={file} is a program of TorchScript; accepted are .pth and .safetensors. "
            "The extractor clean_fid:mode=legacy_tensorflow runs that one"
        )
    if not file.is_file() or file.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"weights={weights}: accepted are a .pth or .safetensors file and a URL")
    return file


def _loaded(file: Path) -> Inception2015:
    try:
        state = read_weights(str(file), file.name)
    except (RuntimeError, OSError, EOFError, SafetensorError) as error:
        raise ValueError(f"weights={file} cannot be read ({error})") from error
    state = {key: value for key, value in state.items() if not key.startswith("AuxLogits.")}
    with torch.device("meta"):  # initial weights would be drawn from the caller's random stream
        network = Inception2015()
    network.to_empty(device="cpu")
    for name in network.state_dict():
        if name.endswith("num_batches_tracked"):  # older files lack it, and nothing reads it
            state.setdefault(name, torch.zeros((), dtype=torch.long))
    load_into(network, state, file)
    return network
