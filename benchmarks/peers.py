"""Three peer libraries behind one interface: SAELens, dictionary_learning and sparsify train and run SAEs with their own code.

    trainee = start("saelens", "topk", d_in=512, d_sae=4096, k=32, batch=1024, steps=5000, rate=1e-3, seed=0, mode="float32")
    for x in batches:                   # [batch, d_in]: mean zero, average norm sqrt(d_in)
        trainee.step(x)
    x_hat = trainee.reconstruct(held_out)

Written for sae-lens 6.54, dictionary-learning 0.1 and eai-sparsify 1.3. Each is imported on first use, so one may be missing.
Whatever no argument names keeps the library's default: initialisation, clipping, dead features, bandwidths, Adam's betas.
"""

import math
import os
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

ALL = ("relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka")
VARIANTS = {"saelens": ALL, "dictionary_learning": ALL, "sparsify": ("topk",)}  # what each can train
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # by mode: bfloat16 is autocast, weights and Adam stay float32
WARM_UP, DECAY = 0.02, 0.3  # shares of the steps in which the rate rises from zero and, at the end, falls to it
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)  # of the features, in the nested dictionaries of a Matryoshka SAE: those of our own
# dictionary_learning raises sparsity penalties over 2000 steps, and starts to measure inference thresholds after 1000. Shorter runs
# would never get there (and its BatchTopK keeps every positive pre-activation until then), so these shares of the steps cap both.
PENALTY_WARM_UP, THRESHOLD_START = 0.05, 0.5

Pair = tuple[Float[Tensor, "token d_sae"], Float[Tensor, "token d_in"]]


class Trainee(ABC):
    """One SAE in training."""

    @abstractmethod
    def step(self, x: Float[Tensor, "batch d_in"]) -> None:
        """One step of the library's own training on this batch."""

    @abstractmethod
    def inference(self) -> nn.Module:
        """The SAE that the library would use after training."""

    def encode(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_sae"]:
        """Activations at inference, zero where a feature is silent."""
        return _apply(self.inference(), x)[0]

    def reconstruct(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_in"]:
        return _apply(self.inference(), x)[1]


class Together:
    """Several SAEs in training on the same batches."""

    def __init__(self, trainees: list[Trainee]):
        self.trainees = trainees

    def step(self, x: Float[Tensor, "batch d_in"]) -> None:
        for trainee in self.trainees:
            trainee.step(x)


def start(
    library, variant, *, d_in, d_sae, k, batch, steps, rate, seed, mode, coefficient=None, device="cpu", x_first=None
) -> Trainee:
    """An SAE before its first step. `mode` is a key of `DTYPES`; `rate` is Adam's, at its peak.

    `coefficient` weighs the sparsity penalty of relu, gated and jumprelu, in the library's own loss. sparsify starts the decoder's
    bias at the mean of `x_first` [batch, d_in], or else of its first batch; dictionary_learning's topk, batchtopk and matryoshka at
    the geometric median of their first batch; SAELens at zero.
    """
    if variant not in VARIANTS[library]:
        raise ValueError(f"{library} has no {variant}; it has {', '.join(VARIANTS[library])}")
    dtype = DTYPES[mode]
    if library == "saelens":
        from sae_lens.training.sae_trainer import SAETrainer

        sae = _saelens_sae(variant, d_in, d_sae, k, coefficient, seed, device)
        return SAELensTrainee(SAETrainer(_saelens_config(batch, steps, rate, dtype, device), sae, data_provider=iter(())))
    torch.manual_seed(seed)  # sparsify takes no seed, and dictionary_learning's JumpReLU trainer ignores the one it takes
    if library == "dictionary_learning":
        return DictionaryTrainee(_dictionary_trainer(variant, d_in, d_sae, k, steps, rate, coefficient, seed, device), dtype)
    return SparsifyTrainee(d_in, d_sae, k, steps, rate, dtype, device, x_first)


def start_many(library, variant, *, d_in, d_sae, k, batch, steps, rate, seeds, mode, coefficient=None, device="cpu") -> Together:
    """As `start`, one SAE for each of the list `seeds`, in SAELens's trainer of several SAEs. No other library is known here."""
    if library != "saelens" or variant not in VARIANTS[library]:
        raise ValueError(f"{library} {variant}: only SAELens's variants are trained together")
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer

    saes = {f"seed{seed}": _saelens_sae(variant, d_in, d_sae, k, coefficient, seed, device) for seed in seeds}
    config = _saelens_config(batch, steps, rate, DTYPES[mode], device)
    many = MultiSAETrainer(config, saes, hook_names=dict.fromkeys(saes, "x"), data_provider=iter(()))
    # Its loop hands each batch to the trainers of its SAEs in turn, which is what `Together` does.
    return Together([SAELensTrainee(trainer) for trainer in many.trainers.values()])


class SAELensTrainee(Trainee):
    def __init__(self, trainer):
        self.trainer, self.ready = trainer, None

    def step(self, x):
        self.trainer.step(x)
        self.trainer.n_training_steps += 1
        self.ready = None

    def inference(self):
        """What SAELens would save and load: BatchTopK and Matryoshka become JumpReLU with one threshold for all features."""
        from sae_lens import SAE

        if self.ready is None:
            trained = self.trainer.sae
            weights = trained.state_dict()
            trained.process_state_dict_for_saving_inference(weights)
            self.ready = SAE.from_dict(trained.cfg.get_inference_sae_cfg_dict())
            self.ready.load_state_dict(weights)
        return self.ready


class DictionaryTrainee(Trainee):
    def __init__(self, trainer, dtype: torch.dtype):
        self.trainer, self.dtype, self.count = trainer, dtype, 0

    def step(self, x):
        # As in its loop: the whole step is under autocast, the optimiser too, and the batch itself is cast. On a CPU its own option
        # does no more than this cast, which its Matryoshka does not survive.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            self.trainer.update(self.count, x.to(self.dtype))
        self.count += 1

    def inference(self):
        return self.trainer.ae


class SparsifyTrainee(Trainee):
    """The step of sparsify's loop, which can't be called without a language model around it."""

    def __init__(self, d_in, d_sae, k, steps, rate, dtype, device, x_first):
        if device != "cpu" and dtype == torch.float32:
            raise ValueError("on a GPU, sparsify trains in bfloat16 autocast and nothing else")
        from transformers import get_linear_schedule_with_warmup

        sparsify = _sparsify()
        coder = sparsify.SparseCoderConfig(num_latents=d_sae, k=k)
        self.config = sparsify.TrainConfig(coder, optimizer="adam", lr=rate, lr_warmup_steps=round(WARM_UP * steps))
        self.coder = sparsify.SparseCoder(d_in, coder, device, dtype=torch.float32)
        # Its default is signSGD; told to use Adam, it prefers the 8-bit one of bitsandbytes where that is installed.
        self.optimizer = torch.optim.Adam(self.coder.parameters(), lr=rate)
        # The rate falls from the end of the warm-up on: its schedule has no constant part.
        self.scheduler = get_linear_schedule_with_warmup(self.optimizer, self.config.lr_warmup_steps, steps)
        self.tokens_since_fired = torch.zeros(d_sae, dtype=torch.long, device=device)
        self.autocast = device == "cpu" and dtype == torch.bfloat16  # on a GPU its forward pass brings its own
        self.x_first = x_first

    def step(self, x):
        coder, config = self.coder, self.config
        if self.scheduler.last_epoch == 0:
            coder.b_dec.data = (x if self.x_first is None else self.x_first).mean(0).to(coder.device)
        coder.set_decoder_norm_to_unit_norm()
        dead = self.tokens_since_fired > config.dead_feature_threshold if config.auxk_alpha > 0 else None  # 0 by default
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            out = coder(x, dead_mask=dead)
            loss = out.fvu + config.auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8
        loss.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.tokens_since_fired += len(x)
        self.tokens_since_fired[out.latent_indices.flatten()] = 0

    def inference(self):
        return self.coder


def forward_variants(library: str) -> tuple[str, ...]:
    """What the library's inference classes can express."""
    return VARIANTS[library]


def forward(library: str, variant: str, weights: dict[str, Tensor], x: Float[Tensor, "token d_in"], k: int) -> Pair:
    """Activations and reconstruction, in float32, by the library's inference class with these weights.

    `weights` holds W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in] and b_dec [d_in]; threshold, [d_sae] for jumprelu and a
    scalar for batchtopk and matryoshka; for gated r_mag and b_mag, [d_sae] each, while b_enc is the gate's.
    """
    build = {"saelens": _saelens_inference, "dictionary_learning": _dictionary_inference, "sparsify": _sparsify_inference}[library]
    sae, state = build(variant, {name: torch.as_tensor(tensor).float() for name, tensor in weights.items()}, k)
    sae.load_state_dict({**sae.state_dict(), **state})  # what is not given, such as k, the constructor has set
    return _apply(sae.to(x.device), x.float())


@torch.no_grad()
def _apply(sae: nn.Module, x: Float[Tensor, "token d_in"]) -> Pair:
    """Dense activations and reconstruction, from any library's inference class."""
    codes = sae.encode(x)
    if isinstance(codes, Tensor):
        return codes, sae.decode(codes)
    values, features, _ = codes  # sparsify's, k a token
    return values.new_zeros(len(x), sae.num_latents).scatter_(1, features, values), sae.decode(values, features)


def _saelens_sae(variant: str, d_in: int, d_sae: int, k: int, coefficient: float | None, seed: int, device: str) -> nn.Module:
    from sae_lens import TrainingSAE

    torch.manual_seed(seed)
    architecture = {"relu": "standard", "matryoshka": "matryoshka_batchtopk"}.get(variant, variant)
    widths = sorted({max(1, round(d_sae * share)) for share in SHARES})
    settings = {"k": k, "l1_coefficient": coefficient, "l0_coefficient": coefficient, "matryoshka_widths": widths}
    size = {"d_in": d_in, "d_sae": d_sae, "device": device}
    return TrainingSAE.from_dict({"architecture": architecture, **size, **settings})  # takes the settings that the architecture has


def _saelens_config(batch: int, steps: int, rate: float, dtype: torch.dtype, device: str):
    from sae_lens.config import SAETrainerConfig

    schedule = {"lr": rate, "lr_warm_up_steps": round(WARM_UP * steps), "lr_decay_steps": round(DECAY * steps)}
    schedule["lr_end"] = rate / 10  # must be set, though only other schedules read it
    autocast = dtype == torch.bfloat16
    return SAETrainerConfig(steps * batch, batch, **schedule, autocast=autocast, device=device)


def _dictionary_trainer(variant, d_in, d_sae, k, steps, rate, coefficient, seed, device):
    trainers = _dictionary_learning().trainers
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate

    penalty = {"sparsity_warmup_steps": min(2000, round(PENALTY_WARM_UP * steps))}
    top = {"k": k, "threshold_start_step": min(1000, round(THRESHOLD_START * steps))}
    fractions = [share - smaller for smaller, share in zip((0, *SHARES[:-1]), SHARES, strict=True)]  # of what each level adds
    trainer, own = {
        # Its L1 penalty is weighted by the decoder's norms, like ours; `StandardTrainer` and `PAnnealTrainer` fix those norms.
        "relu": (StandardTrainerAprilUpdate, {"l1_penalty": coefficient, **penalty}),
        "gated": (trainers.GatedSAETrainer, {"l1_penalty": coefficient, **penalty}),
        "jumprelu": (trainers.JumpReluTrainer, {"sparsity_penalty": coefficient, "target_l0": k, **penalty}),
        "topk": (trainers.TopKTrainer, top),
        "batchtopk": (trainers.BatchTopKTrainer, top),
        "matryoshka": (MatryoshkaBatchTopKTrainer, {"group_fractions": fractions, **top}),
    }[variant]
    schedule = {"lr": rate, "warmup_steps": round(WARM_UP * steps), "decay_start": steps - round(DECAY * steps)}
    size = {"activation_dim": d_in, "dict_size": d_sae}
    return trainer(steps=steps, **size, **schedule, **own, layer=0, lm_name="", seed=seed, device=device)


def _saelens_inference(variant: str, given: dict[str, Tensor], k: int) -> tuple[nn.Module, dict[str, Tensor]]:
    from sae_lens import SAE

    d_in, d_sae = given["W_enc"].shape
    if "threshold" in given:
        given = {**given, "threshold": given["threshold"].expand(d_sae)}
    # BatchTopK and Matryoshka are saved as JumpReLU with one threshold for all features.
    architecture = {"relu": "standard", "batchtopk": "jumprelu", "matryoshka": "jumprelu"}.get(variant, variant)
    sae = SAE.from_dict({"architecture": architecture, "d_in": d_in, "d_sae": d_sae, "k": k})
    return sae, _renamed(given, b_enc="b_gate") if variant == "gated" else given


def _dictionary_inference(variant: str, given: dict[str, Tensor], k: int) -> tuple[nn.Module, dict[str, Tensor]]:
    dictionary = _dictionary_learning().dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    d_in, d_sae = given["W_enc"].shape
    if variant == "jumprelu":
        sae = dictionary.JumpReluAutoEncoder(d_in, d_sae)
        sae.apply_b_dec_to_input = True
        return sae, given
    if variant == "matryoshka":
        return matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(d_in, d_sae, k, [d_sae]), given
    linear = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
    given = {**given, "W_enc": given["W_enc"].T, "W_dec": given["W_dec"].T}
    if variant == "relu":
        return dictionary.AutoEncoder(d_in, d_sae), _renamed(given, **linear, b_dec="bias")
    if variant == "gated":
        biases = {"b_enc": "gate_bias", "b_mag": "mag_bias", "b_dec": "decoder_bias"}
        return dictionary.GatedAutoEncoder(d_in, d_sae), _renamed(given, **{**linear, **biases})
    kind = top_k.AutoEncoderTopK if variant == "topk" else batch_top_k.BatchTopKSAE
    return kind(d_in, d_sae, k), _renamed(given, **linear)


def _sparsify_inference(variant: str, given: dict[str, Tensor], k: int) -> tuple[nn.Module, dict[str, Tensor]]:
    sparsify = _sparsify()
    d_in, d_sae = given["W_enc"].shape
    coder = sparsify.SparseCoder(d_in, sparsify.SparseCoderConfig(num_latents=d_sae, k=k))
    return coder, _renamed({**given, "W_enc": given["W_enc"].T}, W_enc="encoder.weight", b_enc="encoder.bias")


def _renamed(given: dict[str, Tensor], **names: str) -> dict[str, Tensor]:
    return {names.get(name, name): tensor for name, tensor in given.items()}


def _dictionary_learning():
    """With `math` as it was: nnsight, which is imported with it, wraps its functions, and numba can't compile the wrapped ones."""
    functions = dict(vars(math))
    import dictionary_learning
    import dictionary_learning.trainers

    vars(math).update(functions)
    return dictionary_learning


def _sparsify():
    if not torch.cuda.is_available():
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # else it decodes with Triton, if installed, on a CPU too
    import sparsify

    return sparsify
