"""A trained autoencoder with everything that is needed to use it: embed, encode, decode, save and load.

Shapes: ``n`` checkpoints of ``d`` numbers or ``k`` tokens of ``i`` scalars, latents of ``l`` numbers.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from zoo_common.checkpoint import load_checkpoint, save_checkpoint
from zoo_common.files import read_json
from zoo_common.layout import ParameterLayout
from zoo_common.symmetry import Symmetry
from zoo_common.tokens import ChannelTokenizer
from zoo_common.untrusted import load_untrusted
from zoo_common.windows import HaloWindows

from sane.autoencoder import Autoencoder, AutoencoderConfig
from sane.device import choose_device
from sane.normalization import Normalization
from sane.progress import track

_REFERENCE = "reference"
_TOGETHER = 2**24
"""Numbers of the hidden states of one layer that are computed at once."""


@dataclass(frozen=True)
class Halo:
    """Windows of ``window`` tokens with ``halo`` tokens of context on both sides, instead of the whole sequence."""

    window: int = 156
    halo: int = 64

    def __post_init__(self) -> None:
        """Reject what gives no windows."""
        if self.window < 1 or not 0 <= self.halo < self.window:
            raise ValueError(f"halo ({self.halo}) must be from 0 to below the window ({self.window})")


class Embedding(NamedTuple):
    """Embeddings of checkpoints."""

    vectors: Tensor
    """(n, l): mean latents."""
    method: str
    """``full attention``, or that it is an approximation by windows."""
    cosine: float | None = None
    """Mean cosine to full attention on the checkpoints that were compared, for windows."""


class SaneModel:
    """An autoencoder, and the tokens and normalisation of the zoo that it was trained on."""

    def __init__(
        self,
        autoencoder: Autoencoder,
        tokenizer: ChannelTokenizer,
        normalization: Normalization,
        reference: Tensor,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Join the parts.

        Args:
            autoencoder: The network.
            tokenizer: Layout and tokens of the checkpoints.
            normalization: With the statistics of the training split.
            reference: Checkpoint (d,) that the others are aligned with; also gives what no token holds.
            facts: What else is noted with the model: ``task`` or ``network``, ``align``, ...

        Raises:
            ValueError: Tokens do not fit the autoencoder; the message says which way.
        """
        check_fit(autoencoder.config, tokenizer)
        self.autoencoder = autoencoder.eval()
        self.tokenizer, self.normalization, self.reference = tokenizer, normalization, reference
        self.facts = dict(facts or {})

    @property
    def device(self) -> torch.device:
        """Where the autoencoder computes."""
        return self.autoencoder.encoder_comp.weight.device

    def to(self, device: torch.device) -> "SaneModel":
        """Move the autoencoder."""
        self.autoencoder.to(device)
        return self

    @cached_property
    def symmetry(self) -> Symmetry:
        """Of the networks that the model knows; ``ValueError`` if it does not know how they compute."""
        from sane.preparation import known_network

        constructor, shape = known_network(self.facts, "the model")
        with torch.random.fork_rng(devices=[]):
            return Symmetry.from_module(constructor().eval(), torch.zeros(2, *shape))

    def tokens(self, vectors: Tensor) -> Tensor:
        """Normalised tokens (n, k, i) of checkpoints (n, d)."""
        return self.tokenizer.tokenize(self.normalization.normalize(vectors))

    def vectors(self, tokens: Tensor) -> Tensor:
        """Checkpoints (n, d) of tokens; what no token holds is the reference's."""
        base = self.normalization.normalize(self.reference.to(tokens))
        vectors = self.normalization.denormalize(self.tokenizer.detokenize(tokens, base))
        for name in (n for n in self.tokenizer.layout.names if n.endswith("running_var")):
            vectors[..., self.tokenizer.layout.slices[name]].clamp_min_(1e-5)  # a variance below 0 gives NaN
        return vectors

    def align(self, vectors: Tensor) -> Tensor:
        """Checkpoints (n, d) permuted towards the reference, if the training ones were."""
        if self.facts.get("align", "none") == "none":
            return vectors
        return self.symmetry.align(vectors, self.reference)

    def encode(self, vectors: Tensor, halo: Halo | None = None) -> Tensor:
        """Latents (n, k, l) of aligned checkpoints (n, d), with full attention unless ``halo`` is given.

        Raises:
            ValueError: The checkpoints have another shape.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.tokenizer.layout.size:
            raise ValueError(f"expected checkpoints (n, {self.tokenizer.layout.size}), got {tuple(vectors.shape)}")
        return self._through(self.autoencoder.encode, self.tokens(vectors.float()), halo)

    def decode(self, latents: Tensor, halo: Halo | None = None) -> Tensor:
        """Checkpoints (n, d) of latents (n, k, l).

        Raises:
            ValueError: The latents have another shape.
        """
        expected = (self.tokenizer.shape[0], self.autoencoder.config.latent)
        if latents.ndim != 3 or tuple(latents.shape[1:]) != expected:
            raise ValueError(f"expected latents (n, {expected[0]}, {expected[1]}), got {tuple(latents.shape)}")
        return self.vectors(self._through(self.autoencoder.decode, latents.float(), halo))

    def embed(self, vectors: Tensor, halo: Halo | None = None) -> Tensor:
        """Mean latents (n, l) of aligned checkpoints (n, d)."""
        return self.encode(vectors, halo).mean(1)

    def compare(self, vectors: Tensor, halo: Halo) -> float:
        """Mean cosine of the embeddings by windows with those of full attention."""
        return F.cosine_similarity(self.embed(vectors, halo), self.embed(vectors), dim=1).mean().item()

    @torch.no_grad()
    def _through(self, step: Callable[[Tensor, Tensor], Tensor], sequences: Tensor, halo: Halo | None) -> Tensor:
        """Encode or decode whole sequences (n, k, ...), a bounded number at a time; windows form one batch."""
        positions, count = self.tokenizer.positions, sequences.shape[1]
        size = count if halo is None else min(count, halo.window + 2 * halo.halo)
        if halo is not None:
            windows = HaloWindows(count, halo.window, halo.halo)
            sequences, shape = windows.split(sequences), (len(sequences), len(windows.starts))
            sequences, positions = sequences.flatten(0, 1), windows.split(positions).repeat(shape[0], 1, 1)
        else:
            positions = positions.expand(len(sequences), -1, -1)
        each = max(1, _TOGETHER // (size * 4 * self.autoencoder.config.d_model))
        pairs = zip(sequences.split(each), positions.split(each), strict=True)
        parts = [
            step(x.to(self.device), p.to(self.device)).to(sequences.device) for x, p in track(pairs, step.__name__)
        ]
        out = torch.cat(parts) if parts else sequences.new_zeros(0)
        return out if halo is None else windows.merge(out.unflatten(0, shape))

    def save(self, path: str | Path) -> None:
        """Write the model to one safetensors file, atomically."""
        state = {f"autoencoder/{name}": tensor for name, tensor in self.autoencoder.state_dict().items()}
        document = {
            "kind": "sane-model",
            "autoencoder": dataclasses.asdict(self.autoencoder.config),
            "layout": self.tokenizer.layout.to_json(),
            "token_size": self.tokenizer.token_size,
            "skipped": list(self.tokenizer.skipped),
            "normalization": self.normalization.to_document(),
            "legacy_double_bn": self.normalization.legacy_double_bn,
            "facts": self.facts,
        }
        save_checkpoint(path, {**state, _REFERENCE: self.reference}, document)


def check_fit(config: AutoencoderConfig, tokenizer: ChannelTokenizer) -> None:
    """Check that an autoencoder can take these tokens.

    Raises:
        ValueError: Another token width, or positions that its tables do not have (as after another ``ignore_bn``).
    """
    if tokenizer.token_size != config.token_size:
        raise ValueError(
            f"the autoencoder takes tokens of {config.token_size} scalars, these have {tokenizer.token_size}: "
            f"prepare the zoo with token_size={config.token_size}"
        )
    most = [int(column) for column in tokenizer.positions.amax(0)]
    wanted = most if len(config.max_positions) == 3 else [most[0], most[1]]
    if any(high >= rows for high, rows in zip(wanted, config.max_positions, strict=True)):
        raise ValueError(
            f"the autoencoder knows positions up to {config.max_positions}, these tokens go to {tuple(wanted)}: they "
            "come from another network, or ignore_bn differs between autoencoder and zoo"
        )


def load_model(path: str | Path, device: str | torch.device = "cpu") -> SaneModel:
    """Load a model: a file of :meth:`SaneModel.save`, or the folder of a training run.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or holds no model; or the device is not there.
    """
    path, device = Path(path), choose_device(device) if isinstance(device, str) else device
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"there is no model {path}: give a model file, or the folder of a finished training")
    if path.suffix in (".pt", ".pth"):
        raise ValueError(f"{path} is a file of torch: give model.safetensors, or the folder of a finished training")
    checkpoint = load_checkpoint(path)
    document = checkpoint.metadata
    if document.get("kind") != "sane-model":
        raise ValueError(f"{path} holds no model of sane")
    sizes = document["autoencoder"]
    autoencoder = _empty(AutoencoderConfig(**{**sizes, "max_positions": tuple(sizes["max_positions"])}))
    prefix = "autoencoder/"
    state = {name.removeprefix(prefix): t for name, t in checkpoint.state.items() if name.startswith(prefix)}
    autoencoder.load_state_dict(state, assign=True)
    layout = ParameterLayout.from_json(document["layout"])
    tokenizer = ChannelTokenizer(layout, document["token_size"], tuple(document["skipped"]))
    normalization = Normalization.from_document(
        document["normalization"], tokenizer, legacy_double_bn=document["legacy_double_bn"]
    )
    model = SaneModel(autoencoder, tokenizer, normalization, checkpoint.state[_REFERENCE], document["facts"])
    return model.to(device)


def load_published(
    state: str | Path, config: str | Path | Mapping[str, Any], *, window: int | None = None
) -> Autoencoder:
    """Load a published autoencoder: ``state.pt`` and the ``params.json`` of its training. Nothing in them is executed.

    Args:
        state: File with the entry ``model``, whose keys may carry the prefix of a compiled module.
        config: The configuration, or its file; keys that it lacks have the original's defaults.
        window: Tokens in a window, if the configuration is wrong about it.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: Keys or shapes differ; all of them are named.
    """
    options = config if isinstance(config, Mapping) else read_json(config)
    kind: Literal["gpt2", "legacy_pytorch"] = (
        "gpt2" if options.get("ae:transformer_type", "pytorch") == "gpt2" else "legacy_pytorch"
    )
    autoencoder = _empty(
        AutoencoderConfig(
            token_size=options.get("ae:i_dim", 201),
            max_positions=tuple(options.get("ae:max_positions", (48, options.get("ae:d_model", 512)))),
            window=window or options.get("training::windowsize", 16),
            d_model=options.get("ae:d_model", 512),
            heads=options.get("ae:nhead", 8),
            layers=options.get("ae:num_layers", 6),
            latent=options.get("ae:lat_dim", 16),
            dropout=options.get("ae:dropout", 0.0),
            kind=kind,
        )
    )
    content = load_untrusted(state)
    found = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(found, Mapping):
        raise ValueError(f"{state} holds no autoencoder but {type(content).__name__}")
    weights = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in found.items()}
    if odd := [name for name, value in weights.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{state} holds no autoencoder: {odd[0]!r} is {type(weights[odd[0]]).__name__}")
    expected = autoencoder.state_dict()
    problems = [f"missing {name}" for name in expected if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in expected]
    problems += [
        f"{name}: expected {tuple(expected[name].shape)}, got {tuple(weights[name].shape)}"
        for name in expected.keys() & weights.keys()
        if expected[name].shape != weights[name].shape
    ]
    if problems:
        raise ValueError(f"{state} is another autoencoder than its configuration says: {'; '.join(problems)}")
    autoencoder.load_state_dict(weights, assign=True)
    return autoencoder.eval()


def _empty(config: AutoencoderConfig) -> Autoencoder:
    with torch.device("meta"):
        return Autoencoder(config)


def batches(vectors: Sequence[Tensor] | Tensor, size: int) -> Iterator[Tensor]:
    """Checkpoints in blocks of at most ``size`` numbers, at least one at a time."""
    step = max(1, size // vectors[0].shape[-1]) if len(vectors) else 1
    for start in range(0, len(vectors), step):
        part = vectors[start : start + step]
        yield part if isinstance(part, Tensor) else torch.stack(list(part))
