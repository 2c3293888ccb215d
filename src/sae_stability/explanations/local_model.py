"""An engine on this machine: a chat model from a Hugging Face folder, a GGUF file, the hub, or by a name of ours.

It answers greedily, so that the same model says the same again, and answers are kept. Whether a feature is active in a piece of
text is read off what it predicts as the next token, yes or no, less what it predicts for an empty piece: small models lean to one
of the two whatever they are asked (Zhao et al., *Calibrate before use*, arXiv:2102.09690).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path

import torch
from jaxtyping import Float, Int
from jinja2 import TemplateError
from torch import Tensor

from sae_stability.errors import UserError
from sae_stability.explanations.answers import text_of
from sae_stability.explanations.asking import LONGEST_EXPLANATION, detect_in_one_messages, explain_messages, place_of
from sae_stability.explanations.scoring import Described, LeftOut
from sae_stability.explanations.windows import Window
from sae_stability.files import fingerprint, read_json, write_json
from sae_stability.language import models
from sae_stability.study import model_name

YES, NO = (("yes", "Yes", " yes", " Yes"), ("no", "No", " no", " No"))
BATCH = 8  # questions that are answered together


@dataclass
class LocalModel:
    """The engine. Raises `UserError` where the model can't be loaded, or its tokenizer does not tell yes from no."""

    model: str
    """As `models.locate` takes it."""
    cache: Path
    """A folder for the answers."""
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    answered: dict[tuple[int, ...], str | None] = field(default_factory=dict, repr=False, compare=False)
    """What it has said, by the tokens of the question."""

    @property
    def name(self) -> str:
        """Apart from the engine of rules, and from an endpoint's model of the same name."""
        return f"{model_name(self.model)} (on this machine)"

    @cached_property
    def _identity(self) -> dict:
        """Whose answers are kept: other files in the same place say something else. A model of the hub goes by its name."""
        return {"model": fingerprint(models.locate(self.model)), "dtype": str(self.dtype)}

    @cached_property
    def _weights(self):
        return models.load_weights(self.model, self.dtype).to(self.device).eval()

    @cached_property
    def _tokenizer(self):
        return models.load_tokenizer(self.model)

    @cached_property
    def _words(self) -> tuple[list[int], list[int]]:
        """The tokens with which an answer of yes, and one of no, begin."""
        yes, no = ({self._ids(word)[0] for word in words if self._ids(word)} for words in (YES, NO))
        if not (yes - no and no - yes):
            raise UserError(f"explainer.model: the tokenizer of {self.model} does not tell yes from no; name another model")
        return sorted(yes - no), sorted(no - yes)

    def explain(self, shown: list[Window]) -> Described | None:
        """What the model says; of windows that do not fit into its context, the weakest are left out."""
        ids = tuple(self._question(shown))
        if ids not in self.answered:
            self._answer([list(ids)])
        text = self.answered[ids]
        return Described(text, self) if text else None

    def explain_ahead(self, features: Iterable[list[Window]]) -> Iterator[int]:
        """Answer for many features, `BATCH` at a time, so that `explain` knows the answers; how many, as they come.

        A token of one answer costs as much as a token of each of several: both read the weights once. Which questions are answered
        together follows from the features alone, since rounding may differ with it.
        """
        asked = set[tuple[int, ...]]()
        for shown in features:
            with suppress(LeftOut):  # which `explain` says
                asked.add(tuple(self._question(shown)))
        ordered = [list(ids) for ids in sorted(asked, key=lambda ids: (len(ids), ids))]
        for start in range(0, len(ordered), BATCH):
            self._answer(ordered[start : start + BATCH])
            yield len(ordered[start : start + BATCH])

    def _question(self, shown: list[Window]) -> list[int]:
        for count in range(len(shown), 0, -1):
            ids = self._prompt(explain_messages(shown[:count]))
            if len(ids) + LONGEST_EXPLANATION <= self._longest:
                return ids
        raise LeftOut(f"its question is too long for {self.model}, which reads {self._longest:,} tokens")

    def _answer(self, asked: list[list[int]]) -> None:
        """Answer some questions together; the answers are kept together too."""
        kept = place_of({**self._identity, "questions": asked}, self.cache)
        if not kept.is_file():
            write_json(kept, {"answers": self._said(asked)})
        self.answered |= zip(map(tuple, asked), read_json(kept)["answers"], strict=True)

    def detect(self, text: str, windows: list[list[str]]) -> list[bool]:
        """Whether yes is likelier than for an empty piece, for each window."""
        asked = [self._prompt(detect_in_one_messages(text, window)) for window in ([], *windows)]
        if max(map(len, asked)) > self._longest:
            raise LeftOut(f"a piece is too long for {self.model}, which reads {self._longest:,} tokens")
        kept = place_of({**self._identity, "pieces": asked}, self.cache)
        if not kept.is_file():
            parts = [asked[start : start + BATCH] for start in range(0, len(asked), BATCH)]
            write_json(kept, {"leaning": [lean for part in parts for lean in self._leaning(part).tolist()]})
        of_nothing, *leaning = read_json(kept)["leaning"]
        return [lean > of_nothing for lean in leaning]

    @property
    def _longest(self) -> int:
        config = self._weights.config
        return int(getattr(config, "max_position_embeddings", None) or self._tokenizer.model_max_length)

    def _prompt(self, messages: list[dict]) -> list[int]:
        """A conversation as the model was trained to read it; as plain text, where it was trained on none."""
        if self._tokenizer.chat_template is None:
            return self._tokenizer("\n\n".join(message["content"] for message in messages) + "\n\nAnswer:").input_ids
        try:
            text = self._template(messages)
        except TemplateError:  # without a role for instructions
            text = self._template([{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}])
        return self._ids(text)

    def _template(self, messages: list[dict]) -> str:
        return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def _said(self, asked: list[list[int]]) -> list[str | None]:
        """The first line of a greedy answer to each question, without the thoughts before it."""
        from transformers import GenerationConfig

        named = self._weights.generation_config.eos_token_id
        named = self._tokenizer.eos_token_id if named is None else named
        ends = named if isinstance(named, list) else [] if named is None else [named]
        padding = ends[0] if ends else 0
        wanted = GenerationConfig(
            max_new_tokens=LONGEST_EXPLANATION, do_sample=False, eos_token_id=ends or None, pad_token_id=padding
        )
        longest = max(map(len, asked))
        prompts = torch.tensor([[padding] * (longest - len(ids)) + ids for ids in asked], device=self.device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in asked], device=self.device)
        with torch.inference_mode():
            answers = self._weights.generate(prompts, attention_mask=mask, generation_config=wanted)[:, longest:]
        return [self._first_line(takewhile(lambda token: token not in ends, answer)) for answer in answers.tolist()]

    def _first_line(self, ids: Iterable[int]) -> str | None:
        lines = text_of(self._tokenizer.decode(list(ids), skip_special_tokens=True)).splitlines()
        return next((line.strip() for line in lines if line.strip()), None)

    def _leaning(self, asked: Sequence[list[int]]) -> Float[Tensor, "piece"]:
        """How much likelier yes is than no as the next token, as the logarithm of a ratio."""
        last = torch.tensor([len(ids) - 1 for ids in asked])
        padded: Int[Tensor, "piece token"] = torch.zeros(len(asked), int(last.max()) + 1, dtype=torch.int64)
        for row, ids in zip(padded, asked, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        mask = torch.arange(padded.shape[1]) <= last[:, None]
        with torch.inference_mode():
            logits = self._weights(padded.to(self.device), attention_mask=mask.long().to(self.device)).logits
        following = logits[torch.arange(len(asked)), last].float().cpu()
        yes, no = (following[:, words].logsumexp(1) for words in self._words)
        return yes - no
