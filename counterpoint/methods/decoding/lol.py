"""LOL: what a truthful model says more readily than a copy of it that was trained to say false things."""

import copy
from typing import Any

from counterpoint.methods.decoding.causal_lm import CausalLanguageModel


class LOL(CausalLanguageModel):
    r"""An amateur, trained on false statements, beside the expert that it was: contrasted at the last and at a lower layer.

    .. math::
        f = \log\mathrm{softmax}\big( e^{(L)} - a^{(L)} + \lambda\, (e^{(l)} - a^{(l)})
        + \gamma\, (e^{(L)}_{\text{truth}} - e^{(L)}) \big)

    Log-probabilities e of the expert and a of the amateur, at the last layer L and after leaving at layer l through the final
    normalisation and the head; :math:`e_{\text{truth}}` reads the prompt behind an instruction to be truthful. What the
    amateur has learned to say is what the expert is to avoid. Training is that of the amateur: next-token prediction on false
    statements, from the expert's weights, which stay. The run holds both. ::

        counterpoint train causal-lm --data true.txt --encoder decoder-128-4 --run runs/expert
        counterpoint train lol --data false.txt --start runs/expert --run runs/lol
        counterpoint generate --model runs/lol --prompt "Who wrote Emma?" --strategy lol --instruction "Answer truthfully. "

    When to use it: where a model knows more than it says, and false statements of the kind that it makes can be had. Generating
    costs two passes of a model for each token, three with an instruction. Without false statements, ``--strategy dola``
    contrasts a model with its own lower layer.

    Defaults: :math:`\lambda` and :math:`\gamma` 0.5 (assumed); the lower layer is the one of the upper half whose prediction
    differs most from the last one's, as in DoLa; tokens below a tenth of the expert's best are left out. They are settings of
    the strategy (`counterpoint.decoding.LOL`), not of the training. ICD trains its amateur for one to three epochs.

    Where codes differ: there is none of LOL, and its paper's body could not be read: the sum over layers and the form of the
    refocusing are assumed. With :math:`\lambda = \gamma = 0` it is ICD as released. ICD trains a low-rank change of the
    weights; here all of them are trained.

    Source: Chen et al. 2024, "Lower Layer Matters: Alleviating Hallucination via Multi-Layer Fusion Contrastive Decoding with
    Truthfulness Refocused" (arXiv 2408.08769); Zhang et al. 2023 (arXiv 2312.15710), HillZhang1999/ICD at d96efb3; Chuang et
    al. 2024 (arXiv 2309.03883), voidism/DoLa at 805230e.

    Args:
        **causal_lm: as in CausalLanguageModel; `start`, or a pretrained `encoder`, is the expert.
    """

    def __init__(self, **causal_lm: Any):
        super().__init__(**causal_lm)
        self.expert = copy.deepcopy(self.encoder).requires_grad_(False)

    @property
    def models(self) -> tuple[Any, Any]:
        return self.expert, self.encoder

    def train(self, mode: bool = True) -> "LOL":
        super().train(mode)
        self.expert.eval()
        return self
