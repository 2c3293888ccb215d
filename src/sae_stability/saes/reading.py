"""The files of another library, checked as they are read: a wrong field or tensor ends in one line that names it and the mend.

Nothing is unpickled: `.pt` files are read as plain tensors (`weights_only`), `.npz` files without objects, and anything else in
them is refused.
"""

import json
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from sae_stability.errors import UserError
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.sae import SAE
from sae_stability.saes.sparse import Codes

AGAIN = "get the file again, or save the SAE again with its own library"  # the mend of a file that contradicts itself
PICKLED = (".pt", ".pth", ".bin")
WEIGHTS = (".safetensors", ".npz", *PICKLED)
INDEX = ".safetensors.index.json"  # of weights that lie in several files
INSIDE = ("ae", "sae", "autoencoder", "state_dict", "model_state_dict", "model")  # where a checkpoint keeps its weights
WRAPPERS = ("_orig_mod.", "module.")  # what compiled and distributed training put into names
UNITED = ("encoder", "decoder")  # first parts of names that tell tensors apart, and are no wrapper
DECODERS = {"W_dec": False, "w_dec": False, "W_D": False, "decoder": False, "dictionary": False, "decoder.weight": True}
"""Names of a decoder, and whether it lies as [d_in, d_sae], as nn.Linear has it."""
OF_D_IN = ("b_dec", "decoder.bias", "decoder_bias", "b_D", "pre_bias", "bias")
OF_D_SAE = ("b_enc", "encoder.bias", "b_E", "latent_bias", "gate_bias", "b_gate", "threshold", "log_threshold")
NEVER = 1e30
"""Weights beyond it are brought to it: an infinite threshold, or a bias of minus infinity, switches a feature off."""


@dataclass(frozen=True)
class About:
    """What a file says of its SAE, beside its weights."""

    path: Path
    model: str | None = None
    hook_name: str | None = None
    centred: bool = False
    """Whether the language model's weights were centred before its activations were read (`center_writing_weights`)."""
    encoder: str | None = None
    """Why the encoder is not taken; None where it is, or where the file has none."""
    sizes: str | None = None
    """Where its configuration gives another size than its weights have."""


@dataclass(frozen=True)
class Loaded(SAE):
    """An SAE from a file."""

    about: About | None = None

    def codes(self, x: Float[Tensor, "token d_in"]) -> Codes:
        """As of every SAE. Raises `UserError` where the encoder was not taken."""
        if self.variant is None and self.about is not None and self.about.encoder is not None:
            raise UserError(f"{self.about.path}: {self.about.encoder}; its directions can be compared, and it does not fire")
        return super().codes(x)


@dataclass(frozen=True)
class Config:
    """The fields of a configuration in JSON."""

    path: Path
    fields: dict

    @classmethod
    def read(cls, path: Path) -> "Config":
        """Raises `UserError` where the file is missing, unreadable or no JSON object."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise UserError(f"{path}: missing; an SAE's folder holds it beside the weights") from None
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror}); check that it is a file, and its permissions") from None
        except (ValueError, RecursionError):
            raise UserError(f"{path}: no valid JSON; {AGAIN}") from None
        return cls(path, _object(path, "the file", fields))

    def __contains__(self, key: str) -> bool:
        return self.fields.get(key) is not None

    def section(self, key: str) -> "Config":
        return Config(self.path, _object(self.path, key, self._wanted(key)))

    def within(self, *keys: str) -> "Config":
        """A section of a section, and so on; without fields where there is none."""
        fields = self.fields
        for key in keys:
            inner = fields.get(key)
            fields = inner if isinstance(inner, dict) else {}
        return Config(self.path, fields)

    def text(self, key: str, default: str | None = None) -> str:
        """A string; null and a missing field are the default, where there is one."""
        value = self.fields.get(key) if default is not None else self._wanted(key)
        value = default if value is None else value
        if not isinstance(value, str):
            raise UserError(f"{self.path}: {key} is {shown(value)} and should be a string; {AGAIN}")
        return value

    def hint(self, *keys: str) -> str | None:
        """The first of some fields that holds a string; None where none does. For what is told, and computed from nowhere."""
        found = (self.fields.get(key) for key in keys)
        return next((value for value in found if isinstance(value, str) and value), None)

    def flag(self, key: str, default: bool) -> bool:
        """True or false; null and a missing field are the default."""
        value = self.fields.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise UserError(f"{self.path}: {key} is {shown(value)} and should be true or false; correct it")
        return value

    def differing(self, **sizes: int) -> str | None:
        """Which of some sizes stand here otherwise than in the weights; 0 stands for a size that follows from others."""
        told = {key: self.fields.get(key) for key in sizes}
        wrong = [key for key, size in told.items() if type(size) is int and size not in (0, sizes[key])]
        return "; ".join(f"{self.path.name} says {key} {told[key]}, and its weights have {sizes[key]}" for key in wrong) or None

    def k(self, d_sae: int) -> int:
        """The number of features that fire."""
        return whole_k(self.path, self._wanted("k"), d_sae)

    def average_k(self, d_sae: int) -> int:
        """The same where it need not be whole, since it is kept on average over a batch."""
        k = self._wanted("k")
        return whole_k(self.path, int(k) if isinstance(k, float) and 1 <= k <= d_sae else k, d_sae)

    def _wanted(self, key: str):
        if key not in self.fields:
            raise UserError(f"{self.path}: no field {key}; {AGAIN}")
        return self.fields[key]


@dataclass(frozen=True)
class Weights:
    """The tensors of a file by their names; those that are asked for come in float32, without NaN, and in the shape that fits."""

    path: Path
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> "Weights":
        """Read a file of weights, or the index of several. What training wrapped around them is taken off.

        Raises `UserError` where a file is missing, damaged, or holds anything that would have to be unpickled.
        """
        if path.name.endswith(INDEX):
            parts = sorted(set(map(str, Config.read(path).section("weight_map").fields.values())))
            if any(Path(part).name != part for part in parts):
                raise UserError(f"{path}: it names weights outside its folder; {AGAIN}")
            state = {name: tensor for part in parts for name, tensor in _tensors(path.parent / part).items()}
        else:
            state = _tensors(path)
        return cls(path, _unwrapped(state))

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def any_of(self, names: Iterable[str]) -> str | None:
        """The first of some names that a tensor has."""
        return next((name for name in names if name in self.tensors), None)

    def named(self, old: dict[str, str]) -> "Weights":
        """The same under other names, where it has the old ones and not the new."""
        return Weights(self.path, {old.get(name, name): tensor for name, tensor in self.tensors.items()})

    def decoder(self, name: str, transposed: bool = False) -> Float[Tensor, "d_sae d_in"]:
        """The decoder, whose shape all others must fit. `transposed`: it lies as [d_in, d_sae]."""
        W_dec = self._floats(name)
        if W_dec.ndim == 3:
            raise UserError(
                f"{self.path}: {name} has shape {list(W_dec.shape)} and should have [d_sae, d_in]: three dimensions are those of a "
                "crosscoder, which writes to several sites; save the directions of one site"
            )
        if W_dec.ndim != 2 or 0 in W_dec.shape:
            raise UserError(f"{self.path}: {name} has shape {list(W_dec.shape)} and should have [d_sae, d_in]; {AGAIN}")
        if not W_dec.any():
            raise UserError(f"{self.path}: every weight of {name}, the decoder, is zero; that SAE is broken, leave it out")
        return W_dec.T if transposed else W_dec

    def directions(self) -> Float[Tensor, "d_sae d_in"]:
        """The decoder under whatever name it has, the way round that biases beside it tell."""
        name = self.any_of(DECODERS)
        if name is None:
            raise UserError(f"{self.path}: no decoder among its tensors ({self.names()}); name it W_dec or decoder.weight")
        W_dec = self.decoder(name, DECODERS[name])
        for names, axis in ((OF_D_IN, 1), (OF_D_SAE, 0)):
            beside = self.any_of(names)
            size = self.tensors[beside].shape if beside is not None else ()
            if len(size) == 1 and size[0] != W_dec.shape[axis] and size[0] == W_dec.shape[1 - axis]:
                return W_dec.T
        return W_dec

    def fitting(self, name: str, *shape: int) -> Float[Tensor, "*shape"]:
        """A tensor of the shape that the decoder asks for."""
        tensor = self._floats(name)
        if tensor.shape != shape:
            raise UserError(
                f"{self.path}: {name} {list(tensor.shape)} and the decoder don't fit each other (not {list(shape)}); {AGAIN}"
            )
        return tensor

    def bias(self, name: str, d_sae: int) -> Float[Tensor, "d_sae"]:
        """Offsets of features, of which minus infinity switches one off."""
        return self._switches(name, d_sae, -torch.inf).clamp(min=-NEVER)

    def thresholds(self, name: str, d_sae: int) -> Float[Tensor, "d_sae"]:
        """Thresholds of features, of which infinity switches one off, and minus infinity is none."""
        return self._switches(name, d_sae, torch.inf, -torch.inf).clamp(-NEVER, NEVER)

    def number(self, name: str) -> Float[Tensor, ""]:
        """A tensor of one number, in whatever shape."""
        tensor = self._floats(name)
        if tensor.numel() != 1:
            raise UserError(f"{self.path}: {name} has shape {list(tensor.shape)} and should be one number; {AGAIN}")
        return tensor.reshape(())

    def k(self, d_sae: int) -> int:
        """The number of features that fire, where a library keeps it among the weights."""
        k = self._wanted("k")
        return whole_k(self.path, k.item() if k.numel() == 1 else k.tolist(), d_sae)

    def names(self) -> str:
        """The first names, for messages."""
        return shown(", ".join(sorted(self.tensors))) if self.tensors else "it has none"

    def _switches(self, name: str, d_sae: int, *infinite: float) -> Tensor:
        """A number a feature, finite or one of those that are given."""
        tensor = self._dense(name)
        switched = torch.zeros_like(tensor, dtype=torch.bool)
        for value in infinite:
            switched |= tensor == value
        self._finite(name, torch.where(switched, 0.0, tensor))
        if tensor.shape != (d_sae,):
            raise UserError(
                f"{self.path}: {name} {list(tensor.shape)} and the decoder don't fit each other (not [{d_sae}]); {AGAIN}"
            )
        return tensor

    def _floats(self, name: str) -> Tensor:
        return self._finite(name, self._dense(name))

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.isfinite().all():
            raise UserError(f"{self.path}: {name} holds NaN or infinite weights; that SAE is broken, leave it out")
        return tensor

    def _dense(self, name: str) -> Tensor:
        tensor = self._wanted(name)
        if not tensor.is_floating_point():
            raise UserError(f"{self.path}: {name} is {str(tensor.dtype).removeprefix('torch.')}, not floating point; {AGAIN}")
        return tensor.float()

    def _wanted(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise UserError(f"{self.path}: no tensor {name} among its weights ({self.names()}); {AGAIN}")
        tensor = self.tensors[name].detach()
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UserError(f"{self.path}: {name} is no plain dense tensor; {AGAIN}")
        return tensor


def directions_only(W_dec: Float[Tensor, "d_sae d_in"], about: About) -> Loaded:
    """What has no encoder here. The encoder is zero, without taking memory."""
    zero = torch.zeros(())
    nothing = (zero.expand_as(W_dec), zero.expand(len(W_dec)))
    return Loaded(None, None, Parameters(*nothing, W_dec, torch.zeros(W_dec.shape[1])), about=about)


def whole_k(path: Path, k, d_sae: int) -> int:
    """`k` as an integer. Raises `UserError` where it is none, or not in 1 to d_sae."""
    if isinstance(k, bool) or not isinstance(k, int | float) or k != k or k in (float("inf"), float("-inf")) or k != int(k):
        raise UserError(f"{path}: k is {shown(k)} and should be a whole number; correct it to the k of the training")
    if not 1 <= k <= d_sae:
        raise UserError(f"{path}: k is {shown(k)}, and 1 to {d_sae} features can fire; correct it to the k of the training")
    return int(k)


def scaled_by(norms: Float[Tensor, "d_sae"], sae: Parameters) -> Parameters:
    """The same SAE where codes are chosen by how long what they add is: pre-activations times the norms of directions, which become
    of unit length. A feature without a direction never fires."""
    none = norms == 0
    unit = F.normalize(sae.W_dec, dim=1)
    b_enc = torch.where(none, -NEVER, sae.b_enc * norms)
    return sae._replace(W_enc_rows=sae.W_enc_rows * norms[:, None], b_enc=b_enc, W_dec=unit)


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by their names; what is none is left out, down to the dictionary that holds them."""
    state: dict | None
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                state = {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}
        elif path.suffix in PICKLED:
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = load_file(path)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: holds pickled objects, not only tensors; it is not opened, since that could run code; save a state_dict"
        ) from None
    except PermissionError:
        raise UserError(f"{path}: can't be read; check its permissions") from None
    except FileNotFoundError:
        raise UserError(f"{path}: missing; get the file again") from None
    except IsADirectoryError:
        raise UserError(f"{path}: can't be read (Is a directory); give the file of the weights") from None
    except ValueError as error:
        if "pickle" not in str(error).lower():  # what NumPy says of arrays of objects
            raise UserError(f"{path}: damaged or truncated; get the file again") from None
        raise UserError(f"{path}: holds pickled objects, not only arrays; it is not opened, since that could run code") from None
    except Exception:  # what PyTorch raises depends on where a file is broken
        raise UserError(f"{path}: damaged or truncated; get the file again") from None
    for _ in INSIDE:  # a file may hold itself
        inner = next((state[key] for key in INSIDE if isinstance(state.get(key), dict)), None) if isinstance(state, dict) else None
        state = inner or state
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a dictionary of named tensors; save a state_dict")
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if state and not tensors:
        raise UserError(f"{path}: not a dictionary of named tensors; save a state_dict")
    return tensors


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that they had before training was compiled, distributed, or put into a larger module."""
    for wrapper in WRAPPERS:
        shorter = {name.replace(wrapper, ""): tensor for name, tensor in state.items()}
        state = shorter if len(shorter) == len(state) else state
    while state and len(heads := {name.partition(".")[0] for name in state}) == 1 and all("." in name for name in state):
        if heads <= set(UNITED):
            break
        state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
    return state


def _object(path: Path, what: str, value) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{path}: {what} is {shown(value)} and should be a JSON object with fields; {AGAIN}")
    return value


def shown(value) -> str:
    """A value of a file within one line of a message."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
