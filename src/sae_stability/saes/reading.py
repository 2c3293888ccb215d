"""The files of another library, checked as they are read: a wrong field or tensor ends in one line that names it and the mend.

Nothing is unpickled: `.pt` files are read as plain tensors (`weights_only`), and anything else in them is refused.
"""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from sae_stability.errors import UserError

AGAIN = "get the file again, or save the SAE again with its own library"  # the mend of a file that contradicts itself


@dataclass(frozen=True)
class Config:
    """The fields of a configuration in JSON."""

    path: Path
    fields: dict

    @classmethod
    def read(cls, path: Path) -> "Config":
        """Raises `UserError` where the file is missing, unreadable or no JSON object."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: missing; an SAE's folder holds it beside the weights") from None
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror}); check that it is a file, and its permissions") from None
        except (ValueError, RecursionError):
            raise UserError(f"{path}: no valid JSON; {AGAIN}") from None
        return cls(path, _object(path, "the file", fields))

    def section(self, key: str) -> "Config":
        return Config(self.path, _object(self.path, key, self._wanted(key)))

    def text(self, key: str, default: str | None = None) -> str:
        """A string; null and a missing field are the default, where there is one."""
        value = self.fields.get(key) if default is not None else self._wanted(key)
        value = default if value is None else value
        if not isinstance(value, str):
            raise UserError(f"{self.path}: {key} is {_shown(value)} and should be a string; {AGAIN}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.fields.get(key, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.path}: {key} is {_shown(value)} and should be true or false; correct it")
        return value

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
    """The tensors of a file by their names; those that are asked for come in float32, finite, and in the shape that fits."""

    path: Path
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> "Weights":
        """Raises `UserError` where the file is damaged, or holds anything but tensors."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True) if path.suffix == ".pt" else load_file(path)
        except pickle.UnpicklingError:
            raise UserError(
                f"{path}: holds pickled objects, not only tensors; it is not opened, since that could run code; save a state_dict"
            ) from None
        except PermissionError:
            raise UserError(f"{path}: can't be read; check its permissions") from None
        except Exception:  # what PyTorch raises depends on where a file is broken
            raise UserError(f"{path}: damaged or truncated; get the file again") from None
        if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
            raise UserError(f"{path}: not a dictionary of named tensors; save a state_dict")
        return cls(path, state)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def decoder(self, name: str, transposed: bool = False) -> Float[Tensor, "d_sae d_in"]:
        """The decoder, whose shape all others must fit. `transposed`: it lies as [d_in, d_sae]."""
        W_dec = self._floats(name)
        if W_dec.ndim != 2 or 0 in W_dec.shape:
            raise UserError(f"{self.path}: {name} has shape {list(W_dec.shape)} and should have [d_sae, d_in]; {AGAIN}")
        if not W_dec.any():
            raise UserError(f"{self.path}: every weight of {name}, the decoder, is zero; that SAE is broken, leave it out")
        return W_dec.T if transposed else W_dec

    def fitting(self, name: str, *shape: int) -> Float[Tensor, "*shape"]:
        """A tensor of the shape that the decoder asks for."""
        tensor = self._floats(name)
        if tensor.shape != shape:
            raise UserError(
                f"{self.path}: {name} {list(tensor.shape)} and the decoder don't fit each other (not {list(shape)}); {AGAIN}"
            )
        return tensor

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

    def _floats(self, name: str) -> Tensor:
        tensor = self._wanted(name)
        if not tensor.is_floating_point():
            raise UserError(f"{self.path}: {name} is {str(tensor.dtype).removeprefix('torch.')}, not floating point; {AGAIN}")
        tensor = tensor.float()
        if not tensor.isfinite().all():
            raise UserError(f"{self.path}: {name} holds NaN or infinite weights; that SAE is broken, leave it out")
        return tensor

    def _wanted(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise UserError(f"{self.path}: no tensor {name} among its weights ({self.names()}); {AGAIN}")
        tensor = self.tensors[name].detach()
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UserError(f"{self.path}: {name} is no plain dense tensor; {AGAIN}")
        return tensor

    def names(self) -> str:
        """The first names, for messages."""
        return _shown(", ".join(sorted(self.tensors))) if self.tensors else "it has none"


def whole_k(path: Path, k, d_sae: int) -> int:
    """`k` as an integer. Raises `UserError` where it is none, or not in 1 to d_sae."""
    if isinstance(k, bool) or not isinstance(k, int | float) or k != k or k in (float("inf"), float("-inf")) or k != int(k):
        raise UserError(f"{path}: k is {_shown(k)} and should be a whole number; correct it to the k of the training")
    if not 1 <= k <= d_sae:
        raise UserError(f"{path}: k is {_shown(k)}, and 1 to {d_sae} features can fire; correct it to the k of the training")
    return int(k)


def _object(path: Path, what: str, value) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{path}: {what} is {_shown(value)} and should be a JSON object with fields; {AGAIN}")
    return value


def _shown(value) -> str:
    """A value of a file within one line of a message."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
