"""Adapters of a pipeline, whichever its network: LoRAs beside its weights, SaRAs in them, words and classes learned."""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffusers.utils import set_weights_and_activate_adapters

from genkit import textual_inversion
from genkit._files import local
from genkit._flow_map_files import CONFIG_NAME, LORA_NAME, load_lora, unload_lora
from genkit.adapters import missing
from genkit.denoisers.network import unwrap
from genkit.sara_files import SARA_NAME, Applied, SparseAdapter


class LoraLoading:
    """``load_lora_weights`` and ``unload_lora_weights`` of genkit's pipelines.

    A network that takes prompts is left to Diffusers' own pipeline of the same components; any other gets the LoRA by
    PEFT directly.
    """

    network: Any
    classic: Any
    components: Any
    _loras: Mapping[str, float] = MappingProxyType({})  # their scales
    _saras: Mapping[str, tuple[SparseAdapter, float]] = MappingProxyType({})
    _applied: Applied | None = None  # the sum of those

    def load_adapter(self, path: str | Path, adapter_name: str = "default", scale: float = 1.0) -> None:
        """Load a LoRA (:meth:`load_lora_weights`), a SaRA (:meth:`load_sara_weights`), or a word or class that was
        learned (:func:`genkit.textual_inversion.load`), whichever is there.

        :meth:`unload_adapters` takes LoRAs and SaRAs away again.

        Raises:
            FileNotFoundError, ValueError: as there; a scale of what has none.
        """
        file = Path(path)
        names = [LORA_NAME, SARA_NAME, CONFIG_NAME, textual_inversion.ABOUT, *textual_inversion.FILES]
        folder = file.parent if file.is_file() else local(path, names)
        if not file.is_file() and (folder / textual_inversion.ABOUT).is_file():
            if scale != 1:
                raise ValueError(f"scale={scale}: {folder} holds a word or class, which has no strength; leave it out")
            textual_inversion.load(self, folder)
            return
        found = file if file.is_file() else folder / SARA_NAME
        load = self.load_sara_weights if found.name == SARA_NAME and found.is_file() else self.load_lora_weights
        if not file.is_file() and not any((folder / name).is_file() for name in (LORA_NAME, SARA_NAME, CONFIG_NAME)):
            raise FileNotFoundError(missing(folder, [LORA_NAME, SARA_NAME, textual_inversion.ABOUT]))
        load(path, adapter_name, scale)

    def unload_adapters(self) -> None:
        """Take all LoRAs and SaRAs away; the weights are those of before, bit for bit. Words and classes stay."""
        self.unload_lora_weights()
        self.unload_sara_weights()

    def load_sara_weights(self, path: str | Path, adapter_name: str = "default", scale: float = 1.0) -> None:
        """Add ``scale delta`` to the weights that a SaRA was trained on; a call of the network costs what it did.

        Several SaRAs, each of a name of its own, add up, also in the entries that more than one of them changes, and
        beside LoRAs. A pipeline that is saved has them in its weights.

        Args:
            path: a folder with a ``sara_weights.safetensors``, as training and ``genkit adapters mix`` write it, such a
                file, or a repository of the Hub.
            adapter_name: unused so far.
            scale: of the change; 0 is the base model.

        Raises:
            FileNotFoundError: no such adapter.
            ValueError: a scale that is not finite, a name that is taken, or an adapter of another network or base
                model; nothing is changed.
        """
        if not math.isfinite(scale):
            raise ValueError(f"scale={scale}: accepted is a finite number")
        _check_free(adapter_name, self._saras)
        file = Path(path)
        if not file.is_file():
            folder = local(path, [SARA_NAME, CONFIG_NAME])
            if (folder / CONFIG_NAME).is_file():
                raise ValueError(f"{folder} holds a flow map; load it with FewStepPipeline.load_flow_map")
            file = folder / SARA_NAME
        wanted = {**self._saras, adapter_name: (SparseAdapter.read(file), scale)}
        before, self._applied = self._applied, None
        if before is not None:
            before.undo()  # they are added up anew, and are all of the base model
        try:
            self._applied = Applied(unwrap(self.network), list(wanted.values()))
        except ValueError:
            if before is not None:
                self._applied = Applied(unwrap(self.network), list(self._saras.values()))
            raise
        self._saras = wanted

    def unload_sara_weights(self) -> None:
        """Take all SaRAs away; the weights are those of before, bit for bit."""
        if self._applied is not None:
            self._applied.undo()
        self._applied, self._saras = None, {}

    def load_lora_weights(self, path: str | Path, adapter_name: str = "default", scale: float = 1.0) -> None:
        """Put the update ``scale (alpha / r) B A`` beside every weight that it was trained for.

        Several LoRAs, each of a name of its own, add up.

        Args:
            path: a folder with a ``pytorch_lora_weights.safetensors``, as training, ``genkit adapters mix`` and
                Diffusers write it, such a file, or a repository of the Hub.
            adapter_name: unused so far.
            scale: of the update; 0 is the base model.

        Raises:
            FileNotFoundError: no such adapter.
            ValueError: a scale that is not finite, a name that is taken, an adapter of another network or of a flow
                map, or a network that carries LoRAs which this pipeline did not load.
        """
        network: Any = unwrap(self.network)
        if not math.isfinite(scale):
            raise ValueError(f"scale={scale}: accepted is a finite number")
        _check_free(adapter_name, self._loras)
        strange = sorted(set(getattr(network, "peft_config", None) or ()) - set(self._loras))
        if strange:
            raise ValueError(f"{type(network).__name__} carries the LoRAs {strange}; fuse or unload them first")
        file = Path(path)
        if not file.is_file():
            file = local(path, [LORA_NAME, CONFIG_NAME]) / LORA_NAME
        if (file.parent / CONFIG_NAME).is_file():
            raise ValueError(
                f"{file.parent} holds a flow map, of which the LoRA is a part; load it with "
                "FewStepPipeline.load_flow_map"
            )
        if not file.is_file():
            raise FileNotFoundError(f"{file} is no file; wanted a folder with a {LORA_NAME}, or such a file")
        scales = {**self._loras, adapter_name: scale}
        pipe = self.classic
        # PEFT freezes the base, makes LoRAs trainable and leaves their dropout on.
        trainable = {p for p in network.parameters() if p.requires_grad}
        if pipe is None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are meant
                load_lora(file, network, adapter_name)
            set_weights_and_activate_adapters(network, list(scales), list(scales.values()))
        else:
            try:
                pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=adapter_name)
            except RuntimeError as error:  # shapes
                raise ValueError(f"{file} does not fit {type(network).__name__}: {error}") from error
            pipe.set_adapters(list(scales), list(scales.values()))
        for parameter in network.parameters():
            parameter.requires_grad_(parameter in trainable)
        network.train(network.training)
        self._loras = scales

    def unload_lora_weights(self) -> None:
        """Take all LoRAs away; the weights are those of before, bit for bit."""
        if not self._loras:
            return
        pipe = self.classic
        if pipe is None:
            unload_lora(unwrap(self.network))
        else:
            pipe.unload_lora_weights()
        self._loras = {}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in Diffusers.

        Raises:
            ValueError: a component carries LoRAs, which a folder of a pipeline cannot hold.
        """
        for part in self.components.values():
            names = sorted(getattr(part, "peft_config", None) or ())
            if names:
                raise ValueError(
                    f"{type(part).__name__} carries the LoRAs {names}, which the folder of a pipeline cannot hold: "
                    "save after unload_lora_weights(), and share the LoRAs by themselves"
                )
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


def _check_free(name: str, taken: Mapping[str, Any]) -> None:
    if name in taken:
        raise ValueError(
            f"adapter_name={name!r} is taken: the pipeline has {sorted(taken)}; give a second one a name of its own, "
            f"as adapter_name={f'{name}_{len(taken) + 1}'!r}"
        )
