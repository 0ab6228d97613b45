"""Decoupled contrastive learning: SimCLR whose positives leave the denominator."""

from functools import partial

from counterpoint import contrast
from counterpoint.memory.mixing import Mixing
from counterpoint.methods.vision.simclr import SimCLR
from counterpoint.views import SIMCLR_SMALL, ImageViews, MultiCrop


class DCL(SimCLR):
    r"""SimCLR without the positive pair in the denominator, so that attraction and repulsion stop throttling each other.

    .. math:: \ell_i = -w_i \frac{s_{i,i'}}{\tau} + \log \sum_{j \notin \{i, i'\}} \exp(s_{ij}/\tau)

    Every gradient of NT-Xent carries the factor :math:`q_i = 1 - p_i(\text{positive})`, which is near 0 when the positive
    is easy or the batch small. Deleting the positive's own term deletes the factor. DCLW (``weighted``) also
    lets easy positives pull less: :math:`w_i = 2 - N\,\mathrm{softmax}_i(s_{i,i'}/\sigma)`, mean exactly 1.

    When to use it: instead of SimCLR whenever the batch is small (32 to 256); at large batches both agree.

    Defaults: temperature 0.1, sigma 0.5, projector 512-128 and views without blur, as in the CIFAR code that everyone
    points to (raminnakhli/Decoupled-Contrastive-Learning at 0b9b76d).

    Where codes differ: that code sums the two directions, lightly averages them; we average, which keeps the scale of
    NT-Xent. It lets gradient flow through w, lightly detaches it; a weight is a constant here. It masks the own row by adding
    log(1e-45), which leaks below temperature 0.01; we exclude it exactly.

    Source: Yeh et al. 2022, "Decoupled Contrastive Learning" (ECCV; arXiv 2110.06848), eq. 6 and 7.

    Args:
        encoder: "convnet", "convnet-32", or any timm model.
        image_size: side of the views in pixels.
        channels: 3 for colour, 1 for grey.
        projection: hidden and output width of the projector.
        temperature: of the softmax.
        weighted: DCLW instead of DCL.
        sigma: temperature of the DCLW weight.
        mixing: parts that make the pairs harder, by name ("mochi"); see `counterpoint.memory.mixing`.
        views: the random views.
        small_views: further small views (multi-crop), as in SimCLR.
        pretrained: start from timm's pretrained weights.
    """

    def __init__(
        self,
        encoder: str = "resnet18",
        image_size: int = 64,
        channels: int = 3,
        projection: tuple[int, int] = (512, 128),
        temperature: float = 0.1,
        weighted: bool = False,
        sigma: float = 0.5,
        mixing: tuple[Mixing, ...] = (),
        views: ImageViews = SIMCLR_SMALL,
        small_views: MultiCrop | None = None,
        pretrained: bool = False,
    ):
        super().__init__(
            encoder=encoder,
            image_size=image_size,
            channels=channels,
            projection=projection,
            temperature=temperature,
            mixing=mixing,
            views=views,
            small_views=small_views,
            pretrained=pretrained,
        )
        self.objective = partial(contrast.dcl, weighted=weighted, sigma=sigma)
