"""SimCTG: a language model whose token states can be told apart, so that contrastive search can choose by them."""

from typing import Any

from torch import Tensor

from counterpoint.contrast.tokens import token_margin
from counterpoint.errors import InputError
from counterpoint.methods.decoding.causal_lm import CausalLanguageModel, next_token_loss
from counterpoint.train.method import Batch


class SimCTG(CausalLanguageModel):
    r"""Next-token prediction, and a contrast between the states of a text's tokens: the trainable side of contrastive search.

    .. math::
        \mathcal{L} = \mathcal{L}_{MLE} + \frac{\sum_b \sum_{i \ne j} [\rho - 1 + \cos(h_i^b, h_j^b)]_+}{\sum_b n_b (n_b - 1)}

    Contrastive search takes, of the k most probable tokens, the one with the largest
    :math:`(1 - \alpha)\, p(v) - \alpha \max_j \cos(h_v, h_j)`: probable, and in a state unlike those of all tokens before it.
    That needs a space in which states differ. This loss makes one where training alone has not. ::

        counterpoint train causal-lm --data text.txt --encoder decoder-256-6 --run runs/lm
        counterpoint evaluate runs/lm --protocol isotropy perplexity
        counterpoint train contrastive-search --data text.txt --start runs/lm --run runs/simctg
        counterpoint generate --model runs/simctg --prompt "Once upon a time" --strategy contrastive-search

    When to use it: contrastive search itself needs no training, and the later paper finds that among 38 language models only
    the two smaller GPT-2s need this loss. Measure `isotropy` first: below about 0.5, train with it; above, just generate.

    Defaults: margin 0.5 as released; generation with k = 5 and alpha = 0.6. The papers' training: GPT-2, AdamW at 2e-5 with a
    tenth of the steps as warm-up and a linear schedule, 128 rows of 256 tokens, 40,000 steps on WikiText-103.

    Where codes differ: the release adds gradients up over accumulated batches without dividing; here they are averaged. Rows of
    `packed` text have no padding; its loss on padded rows is the same.

    Source: Su et al. 2022, "A Contrastive Framework for Neural Text Generation" (arXiv 2202.06417); Su and Xu 2023, "Contrastive
    Search Is What You Need For Neural Text Generation" (arXiv 2210.14140); yxuansu/SimCTG at 3a91449.

    Args:
        margin: :math:`\rho`, by how much less alike two states are to be than a state is to itself; 0 asks for no pair above 1.
        contrast_weight: of the second term; 0 is the language model alone.
        **causal_lm: as in CausalLanguageModel.
    """

    def __init__(self, margin: float = 0.5, contrast_weight: float = 1.0, **causal_lm: Any):
        super().__init__(**causal_lm)
        if not 0 <= margin <= 2 or contrast_weight < 0:
            raise InputError(
                f"margin lies between 0 and 2, contrast_weight is not negative, got {margin} and {contrast_weight}"
            )
        self.margin, self.contrast_weight = margin, contrast_weight

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        answer, mask = self.answer(batch), batch["attention_mask"]
        return {
            "next token": next_token_loss(answer.logits, batch["input_ids"], mask),
            "token contrast": self.contrast_weight * token_margin(answer.hidden, mask, margin=self.margin),
        }
