"""Options of a training, with the published names, and the published settings as presets."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

Dataset = Literal["digits", "mnist", "fashion-mnist", "cifar10"]
Dtype = Literal["auto", "float16", "bfloat16", "float32", "float64"]
DataRoot = Annotated[Path | None, tyro.conf.arg(aliases=["--data"])]

_PUBLISHED = (
    "--epochs 50 --seed 0 --depth 2 --scheduler multistep --lr-drop-ratio .15 --gclip-per-param "
    "--no-apply-lr-mult-to-wd --bias-lr-mult .5 "
)
PRESETS: dict[str, str] = {
    "infinite": _PUBLISHED + "--lr 1.0 --gclip .4 --lr-drop-milestones 40 --wd 1e-5 --r 400 --batch-size 8 "
    "--bias-alpha .5 --first-layer-lr-mult .1 --last-layer-lr-mult 4 --first-layer-alpha 1 --last-layer-alpha .5",
    "finite": _PUBLISHED + "--lr .5 --gclip 3.2 --lr-drop-milestones 35 --wd 1.6e-4 --r 400 --batch-size 32 "
    "--width 2048 --bias-alpha 4 --first-layer-lr-mult .2 --last-layer-lr-mult 8 --first-layer-alpha .125 "
    "--last-layer-alpha .5",
    "mu-net": _PUBLISHED + "--lr 1.0 --gclip .1 --lr-drop-milestones 40 --wd 1.6e-4 --batch-size 32 --width 2048 "
    "--gaussian-init --no-Gproj --bias-alpha 4 --first-layer-lr-mult .2 --last-layer-lr-mult 16 "
    "--first-layer-alpha 2 --last-layer-alpha .25",
}
"""The best published settings for CIFAR-10 (Yang, Santacroce & Hu, 2022), as the options that were published."""

OBSOLETE: dict[str, str] = {
    "--init-from-data": "it had no effect; leave it out",
    "--init-A-B-direct": "it had no effect; leave it out",
    "--cycarr": "it overwrote atoms and so changed the net; bound their number with --max-atoms",
    "--human": "output is readable without it, and --json is for programs; leave it out",
    "--verbose": "it had no effect on the training; leave it out",
}


def expand_presets(argv: Sequence[str]) -> list[str]:
    """Replace ``--preset NAME`` of ``train`` by its options, which come first so that given ones override them.

    Raises:
        ValueError: There is no such preset, or an option is obsolete.
    """
    arguments = list(argv)
    for argument in arguments:
        if (name := argument.partition("=")[0].replace("_", "-")) in OBSOLETE:
            raise ValueError(f"{name} is obsolete: {OBSOLETE[name]}")
    if arguments[:1] != ["train"]:
        return arguments
    for i, argument in enumerate(arguments):
        flag, _, name = argument.partition("=")
        if flag == "--preset":
            name = name or (arguments[i + 1] if i + 1 < len(arguments) else "")
            if name not in PRESETS:
                raise ValueError(f"--preset {name or '(nothing)'}: there are {', '.join(PRESETS)}")
            return ["train", *PRESETS[name].split(), *arguments[1:]]
    return arguments


@dataclass(frozen=True)
class TrainConfig:
    """Train an infinite net, or with --width a finite one. Names and meaning of options are the published ones."""

    dataset: tyro.conf.Positional[Dataset]
    """What to learn."""
    data_root: DataRoot = None
    """Folder with the files of the data set; digits need none."""
    save_dir: Path | None = None
    """Folder for the run: configuration, metrics.jsonl, state, curves.png; default: nothing is written."""
    resume: bool = False
    """Go on with the run in --save-dir."""
    save_model: bool = False
    """Also write checkpoints/epochK.th, the published format, after every epoch; 0 is the start."""
    model_path: Path | None = None
    """Start with this infinite net: folder of a run or of atoms, or a published file; with --width, with a finite sample of it."""
    test: bool = False
    """Only evaluate the net of --model-path, as `pilimit eval` does."""
    preset: str | None = None
    """Published best settings for CIFAR-10: infinite, finite or mu-net; options given beside it override."""
    cuda: bool = False
    """Compute on a GPU."""
    single: Annotated[bool, tyro.conf.arg(name="float")] = False
    """The same as --dtype float32."""
    dtype: Dtype = "auto"
    """Of atoms; auto: float16 (as published) on a GPU, float32 on a CPU."""
    cuda_batch_size: int | None = None
    """Keep atoms in the memory of the host, and bring so many at once to the GPU."""
    batch_size: int = 64
    """Images per backward pass; each becomes an atom of every layer."""
    test_batch_size: int = 256
    """Images at once in evaluations."""
    accum_steps: int = 1
    """Batches per step of the optimizer; their gradients are averaged."""
    lr: float = 2.0
    """Learning rate; that of a layer is this times its multiplier."""
    momentum: float = 0.0
    """Of all parameters, atoms included."""
    dampening: float = 0.0
    """Of the momentum, from the first step on."""
    wd: float = 1e-4
    """Weight decay."""
    gclip: float = 0.2
    """Threshold of gradient clipping; 0: none."""
    gclip_per_param: bool = False
    """Clip every parameter by its own norm."""
    scheduler: Literal["none", "None", "cosine", "multistep"] = "none"
    """Of the learning rate: cosine falls to 0 at the end; multistep drops it at --lr-drop-milestones."""
    lr_drop_ratio: float = 0.5
    """Factor at each milestone."""
    lr_drop_milestones: str = ""
    """Epochs, separated by commas; fractions are allowed."""
    gclip_drop_ratio: float = 0.5
    """Factor of the clipping threshold at each of its milestones."""
    gclip_drop_milestones: str = ""
    """Of the clipping threshold; default: it drops with the learning rate, as published."""
    first_layer_lr_mult: float = 0.1
    """Of the weights of the first layer."""
    last_layer_lr_mult: float = 1.0
    """Of the weights of the output layer; 0: it gets no atoms."""
    bias_lr_mult: float = 0.5
    """Of all biases."""
    first_layer_alpha: float = 1.0
    """Multiplier of what the first layer gives."""
    last_layer_alpha: float = 1.0
    """Multiplier of the outputs."""
    bias_alpha: float = 1.0
    """Multiplier of the biases; 0: no biases."""
    last_bias_alpha: float | None = None
    """Default: that of --bias-alpha."""
    no_apply_lr_mult_to_wd: bool = False
    """Decay by lr * wd whatever the multiplier of the learning rate."""
    last_layer_grad_no_alpha: bool = False
    """Do not multiply the gradient of the output layer by its alpha (for experiments)."""
    layernorm: bool = False
    """Divide pre-activations by their norm before every activation."""
    loss: Literal["xent", "mse"] = "xent"
    """Cross-entropy, or square distance from one-hot minus 0.1."""
    depth: int = 2
    """Number of ReLU layers; with --model-path, that of the net there."""
    r: int = 200
    """Rank of the probability space; with --model-path, that of the net there counts."""
    width: int | None = None
    """Units per layer of a finite net; default, or 0: infinite."""
    gaussian_init: bool = False
    """Finite nets: Gaussian weights of variance 2 / fan-in; with --no-Gproj a mu-net."""
    no_Gproj: bool = False
    """Finite nets: do not project gradients."""
    tie_omegas: bool = False
    """Finite nets: all layers share one Gaussian matrix (for experiments)."""
    epochs: int = 24
    """Passes over the training images."""
    seed: int = 1
    """Of the initial values, the order of the images and their augmentation."""
    train_subset_size: int | None = None
    """Train on the first so many images."""
    test_subset_size: int | None = None
    """Test on the first so many images."""
    data_augment: bool = False
    """Flip images at random and crop them after padding by 4."""
    teacher_path: Path | None = None
    """Distill from this net: a run, folder or published file."""
    teacher_alpha: float = 0.5
    """Share of the ordinary loss."""
    teacher_temp: float = 1.0
    """Temperature of both nets."""
    max_atoms: int | None = None
    """Atoms per layer at most: whenever they are reached, the layer is recompressed."""
    keep_atoms: int | None = None
    """Atoms per layer after a recompression; default: a quarter of --max-atoms."""
    max_memory: float | None = None
    """GB for atoms at most; a run that would need more is refused, and told when it would."""
    checkpoint_steps: int | None = None
    """Save the state every so many steps; default: every epoch."""
    limit_seconds: float | None = None
    """Save and stop after this time."""
    quiet: bool = False
    """No progress bar, no forecast, no lines per epoch."""
    json: bool = False
    """Print one JSON object."""

    def check(self) -> None:
        """Reject what would only fail later.

        Raises:
            ValueError: A value that cannot be; the message names the option.
        """
        positive = ("batch_size", "test_batch_size", "accum_steps", "depth", "r", "epochs", "train_subset_size")
        for name in (*positive, "test_subset_size", "max_atoms", "keep_atoms", "checkpoint_steps", "cuda_batch_size"):
            self._check(name, lambda value: value >= 1, "at least 1")
        rates = ("first_layer_lr_mult", "last_layer_lr_mult", "bias_lr_mult", "lr_drop_ratio", "gclip_drop_ratio")
        for name in ("lr", "wd", "gclip", "width", *rates):
            self._check(name, lambda value: 0 <= value < math.inf, "at least 0 and finite")
        for name in ("first_layer_alpha", "last_layer_alpha", "bias_alpha", "last_bias_alpha"):
            self._check(name, math.isfinite, "finite")
        for name in ("momentum", "dampening"):
            self._check(name, lambda value: 0 <= value < 1, "at least 0 and below 1")
        for name in ("teacher_temp", "max_memory"):
            self._check(name, lambda value: value > 0, "positive")
        self._check("limit_seconds", lambda value: value >= 0, "at least 0")
        self._check("teacher_alpha", lambda value: 0 <= value <= 1, "between 0 and 1")
        if self.infinite:
            for name in ("gaussian_init", "no_Gproj", "tie_omegas"):
                if getattr(self, name):
                    raise ValueError(f"{_flag(name)} is for finite nets: give --width, or leave it out")
            self._check_bound()
        elif self.max_atoms is not None or self.max_memory is not None or self.cuda_batch_size is not None:
            raise ValueError("a finite net has no atoms: leave out --max-atoms, --max-memory and --cuda-batch-size")
        if (self.resume or self.save_model) and self.save_dir is None:
            raise ValueError("--resume and --save-model need --save-dir")
        for name in ("lr_drop_milestones", "gclip_drop_milestones"):
            milestones(getattr(self, name), 1, _flag(name))
        if self.scheduler == "multistep" and not self.lr_drop_milestones:
            raise ValueError("--scheduler multistep needs --lr-drop-milestones")

    def _check(self, name: str, holds: Callable[[Any], bool], told: str) -> None:
        value = getattr(self, name)
        if value is not None and not holds(value):
            raise ValueError(f"{_flag(name)} must be {told}, got {value}")

    def _check_bound(self) -> None:
        if self.keep_atoms is not None and self.max_atoms is None:
            raise ValueError("--keep-atoms needs --max-atoms, which says when atoms are recompressed")
        if self.keep_atoms is not None and self.keep_atoms >= (self.max_atoms or 0):
            raise ValueError(f"--keep-atoms ({self.keep_atoms}) must be below --max-atoms ({self.max_atoms})")
        rows = self.batch_size * self.accum_steps
        if self.max_atoms is not None and self.max_atoms - self.kept < rows:
            raise ValueError(
                f"--max-atoms {self.max_atoms} leaves no room for one step of {rows} samples beside the {self.kept} "
                "atoms that are kept: raise it"
            )

    @property
    def infinite(self) -> bool:
        """Whether the net has infinite width."""
        return not self.width

    @property
    def kept(self) -> int:
        """Atoms per layer after a recompression."""
        return self.keep_atoms or (self.max_atoms or 0) // 4

    def to_json(self) -> dict[str, Any]:
        """Values that JSON can hold."""
        return {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainConfig":
        """The inverse of :meth:`to_json`."""
        paths = ("data_root", "save_dir", "model_path", "teacher_path")
        read: dict[str, Any] = {name: Path(v) if name in paths and v is not None else v for name, v in values.items()}
        return cls(**read)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def milestones(text: str, steps_per_epoch: int, name: str = "milestones") -> list[int]:
    """Steps of milestones in epochs.

    Raises:
        ValueError: Something is not a number.
    """
    try:
        return [int(float(word) * steps_per_epoch) for word in text.split(",") if word.strip()]
    except ValueError:
        raise ValueError(f"{name} must be epochs separated by commas, got {text!r}") from None


@dataclass(frozen=True)
class EvalConfig:
    """Loss and accuracy of a net on the test images of a data set."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Folder of a run or of atoms, a published file, or a finite net of `pilimit sample` (.safetensors)."""
    dataset: tyro.conf.Positional[Dataset]
    """What it has learned."""
    data_root: DataRoot = None
    """Folder with the files of the data set; digits need none."""
    width: int | None = None
    """Evaluate a finite net of this width, sampled from the infinite one; default, or 0: itself."""
    seed: int = 1
    """Of the sample."""
    loss: Literal["xent", "mse"] = "xent"
    """Cross-entropy, or square distance from one-hot minus 0.1."""
    test_batch_size: int = 256
    """Images at once."""
    test_subset_size: int | None = None
    """Test on the first so many images."""
    mapped: bool = False
    """Leave the atoms of a folder in its files, for a net larger than memory; slower, and sums are not checked."""
    cuda: bool = False
    """Compute on a GPU."""
    quiet: bool = False
    """No progress bar."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class KernelConfig:
    """Kernel ridge regression: NNGP, NTK, or the learned features of a net."""

    dataset: tyro.conf.Positional[Dataset]
    """Images, to be classified by one-hot targets minus 0.5."""
    data_root: DataRoot = None
    """Folder with the files of the data set; digits need none."""
    kernel: Literal["nngp", "ntk", "features"] = "nngp"
    """Net whose readout alone learns, net linear in all its weights, or what a trained net has learned."""
    model: Path | None = None
    """The net of `features`: folder of a run or of atoms, or a published file."""
    mode: Literal["exact", "legacy"] = "exact"
    """Of the NTK; legacy is what the published NTK numbers used."""
    depth: int = 2
    """Number of ReLU layers of the net that becomes a kernel."""
    varw: float = 1.0
    """Variance of its weights, times the fan-in."""
    varb: float = 0.0
    """Variance of its biases."""
    first_layer_lr_mult: float = 1.0
    """NTK: learning rate of the first weights; those between have 1."""
    last_layer_lr_mult: float = 1.0
    """NTK: of the last weights."""
    bias_lr_mult: float = 1.0
    """NTK: of all biases."""
    kernel_reg: tuple[float, ...] = (1e-4,)
    """Ridges that are added to the diagonal; several are tried one after the other."""
    multiple_regs: bool = False
    """The published ridges 1e-5, 1e-4 and 1e-3."""
    train_subset_size: int | None = None
    """Train on the first so many images."""
    test_subset_size: int | None = None
    """Test on the first so many images."""
    memory_budget: float | None = None
    """GB beside the images; where float64 does not fit, float32 with refinement is used."""
    test_batch_size: int = 256
    """Images at once, when features are computed."""
    cuda: bool = False
    """Compute on a GPU."""
    quiet: bool = False
    """No progress bar."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class WidthsConfig:
    """Train finite nets of several widths beside the infinite one, and measure how fast they approach it."""

    dataset: tyro.conf.Positional[Dataset] = "digits"
    """What they learn."""
    data_root: DataRoot = None
    """Folder with the files of the data set; digits need none."""
    widths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    """Of the finite nets, at least two."""
    nets: int = 8
    """Finite nets per width, computed together."""
    steps: int = 20
    """Of plain gradient descent."""
    batch_size: int = 16
    """Images per step."""
    lr: float = 0.2
    """Learning rate."""
    r: int = 8
    """Rank of the probability space; widths should be much larger."""
    depth: int = 2
    """Number of ReLU layers."""
    seed: int = 0
    """Of the nets and the batches."""
    plot: Path | None = None
    """PNG file of the errors over the widths."""
    quiet: bool = False
    """No progress bar."""
    json: bool = False
    """Print one JSON object."""
