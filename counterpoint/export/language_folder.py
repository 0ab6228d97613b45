"""A causal language model as a folder that transformers loads."""

from pathlib import Path

import torch

from counterpoint.encoders.causal import CausalLM, causal
from counterpoint.encoders.text import quiet
from counterpoint.export.checks import SENTENCES, largest_difference
from counterpoint.export.folder import description, replacing


def save(encoder: CausalLM, path: str | Path, **about: str) -> float:
    """Write model and tokeniser for ``AutoModelForCausalLM.from_pretrained(path)`` and load them back.

    Args:
        encoder: the language model.
        path: of the folder.
        about: further words for its counterpoint.json.

    Returns:
        The largest difference between the log-probabilities of both.

    Raises:
        InputError: a path that is taken, or a model that answers differently or reads other tokens.
    """
    with replacing(path, description(encoder, **about)) as folder:
        with quiet():
            encoder.model.save_pretrained(folder)
        encoder.tokenizer.save_pretrained(folder)
        stock = causal(str(folder)).eval()
        sentences = [sentence for sentence in SENTENCES if encoder.tokenizer(sentence)["input_ids"]]
        answers: list[list[torch.Tensor]] = [[], []]
        device = next(encoder.parameters()).device
        with torch.no_grad():
            for lm, found, place in ((encoder.eval(), answers[0], device), (stock, answers[1], torch.device("cpu"))):
                for sentence in sentences:
                    ids = torch.tensor([lm.tokenizer(sentence)["input_ids"][: lm.positions]], device=place)
                    found.append(lm(ids).logits.float().log_softmax(-1).flatten().cpu())
        return largest_difference(torch.cat(answers[0]), torch.cat(answers[1]), "transformers")
