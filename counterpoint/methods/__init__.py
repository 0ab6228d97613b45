"""The registry: which methods there are, and where each one lives. Imports no method until one is asked for."""

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from counterpoint.errors import InputError, nearest

ENTRY_POINTS = "counterpoint.methods"


@dataclass(frozen=True)
class Entry:
    """One method: a line of the registry.

    Attributes:
        number: its place in the catalogue of 49 papers; None for the baselines that the papers extend.
        slug: its name on the command line, in recipes and in records.
        title: its name for people.
        domain: the folder under ``methods/`` that it belongs to.
        implementation: ``"module:Class"``, or None while it is planned.
    """

    number: int | None
    slug: str
    title: str
    domain: str
    implementation: str | None = None

    @property
    def status(self) -> str:
        """``"ready"`` or ``"planned"``."""
        return "planned" if self.implementation is None else "ready"


BASELINES: tuple[Entry, ...] = (
    Entry(None, "simclr", "SimCLR", "vision", "counterpoint.methods.vision.simclr:SimCLR"),
    Entry(None, "moco", "MoCo v2", "vision", "counterpoint.methods.vision.moco:MoCo"),
    Entry(None, "byol", "BYOL", "vision", "counterpoint.methods.vision.byol:BYOL"),
    Entry(None, "simsiam", "SimSiam", "vision", "counterpoint.methods.vision.simsiam:SimSiam"),
    Entry(None, "fine-tuning", "Fine-tuning", "vision", "counterpoint.methods.vision.fine_tuning:FineTuning"),
    Entry(None, "barlow-twins", "Barlow Twins", "vision", "counterpoint.methods.vision.barlow_twins:BarlowTwins"),
    Entry(None, "simcse", "SimCSE", "language", "counterpoint.methods.language.simcse:SimCSE"),
    Entry(
        None,
        "fine-tuning-text",
        "Fine-tuning on text",
        "language",
        "counterpoint.methods.language.fine_tuning_text:FineTuningText",
    ),
    Entry(None, "clip", "CLIP", "image_text", "counterpoint.methods.image_text.clip:CLIP"),
    Entry(None, "sasrec", "SASRec", "recommendation", "counterpoint.methods.recommendation.sasrec:SASRec"),
    Entry(None, "cl4srec", "CL4SRec", "recommendation", "counterpoint.methods.recommendation.cl4srec:CL4SRec"),
    Entry(
        None,
        "causal-lm",
        "Causal language model",
        "decoding",
        "counterpoint.methods.decoding.causal_lm:CausalLanguageModel",
    ),
)
"""Published methods that the papers of the catalogue extend."""

CATALOGUE: tuple[Entry, ...] = (
    Entry(1, "mmhcl", "MMHCL: multi-modal hypergraph contrast", "recommendation"),
    Entry(2, "cace-net", "CACE-Net: co-guided attention and contrast for audio-visual events", "audio_visual"),
    Entry(3, "mutdet", "MutDet: detection pre-training for remote sensing", "detection"),
    Entry(4, "clip-baselines", "Improved vision-language baselines: SiamLIP, BarLIP, SwALIP", "image_text"),
    Entry(
        5,
        "whitenedcse",
        "WhitenedCSE: whitened sentence embeddings",
        "language",
        "counterpoint.methods.language.whitenedcse:WhitenedCSE",
    ),
    Entry(6, "sepclr", "SepCLR: common and salient patterns apart", "vision"),
    Entry(
        7,
        "primer",
        "Primer on contrastive pretraining for language",
        "language",
        "counterpoint.methods.language.primer:InputLabel",
    ),
    Entry(
        8,
        "feature-transformation",
        "Feature transformation of positives and negatives",
        "vision",
        "counterpoint.methods.vision.feature_transformation:FeatureTransformation",
    ),
    Entry(
        9,
        "mclrec",
        "MCLRec: meta-optimised contrast for sequences",
        "recommendation",
        "counterpoint.methods.recommendation.mclrec:MCLRec",
    ),
    Entry(
        10,
        "mcl",
        "MCL: multistage contrast against feature suppression",
        "vision",
        "counterpoint.methods.vision.mcl:MCL",
    ),
    Entry(
        11,
        "debcse",
        "DebCSE: debiased sentence embeddings",
        "language",
        "counterpoint.methods.language.debcse:DebCSE",
    ),
    Entry(12, "clip-lit", "CLIP-LIT: iterative prompts for backlit images", "restoration"),
    Entry(
        13,
        "hydra",
        "Hydra (SimLAP): arbitrary positive pairs",
        "vision",
        "counterpoint.methods.vision.hydra:Hydra",
    ),
    Entry(14, "rave", "RAVE: residual vector guidance for backlit images", "restoration"),
    Entry(15, "pixpro", "PixPro: pixel-level consistency", "vision", "counterpoint.methods.vision.pixpro:PixPro"),
    Entry(
        16,
        "supremix",
        "SupReMix: mixed pairs for regression",
        "vision",
        "counterpoint.methods.vision.supremix:SupReMix",
    ),
    Entry(17, "swav", "SwAV: swapped cluster assignments", "vision", "counterpoint.methods.vision.swav:SwAV"),
    Entry(18, "mochi", "MoCHi: hard negative mixing", "vision", "counterpoint.methods.vision.mochi:MoCHi"),
    Entry(19, "pcl-sr", "PCL-SR: contrast for super-resolution", "restoration"),
    Entry(20, "customcontrast", "CustomContrast: subject-driven text-to-image", "generation"),
    Entry(21, "cmim", "cMIM: contrastive mutual information machine", "vision"),
    Entry(22, "close", "CLOSE: visual tasks from language supervision alone", "image_text"),
    Entry(23, "clhe", "CLHE: bundle construction", "recommendation"),
    Entry(24, "ctp-tft", "CTP-TFT: mutual learning of prompts and features", "image_text"),
    Entry(
        25,
        "core-tuning",
        "Core-tuning: contrast-regularised fine-tuning",
        "vision",
        "counterpoint.methods.vision.core_tuning:CoreTuning",
    ),
    Entry(
        26,
        "cacr",
        "CACR: contrastive attraction and repulsion",
        "vision",
        "counterpoint.methods.vision.cacr:CACR",
    ),
    Entry(
        27,
        "projection-head",
        "Benefits of the projection head",
        "vision",
        "counterpoint.methods.vision.projection_head:ProjectionHead",
    ),
    Entry(28, "dcl", "DCL: decoupled contrastive learning", "vision", "counterpoint.methods.vision.dcl:DCL"),
    Entry(
        29,
        "lol",
        "LOL: multi-layer contrastive decoding",
        "decoding",
        "counterpoint.methods.decoding.lol:LOL",
    ),
    Entry(30, "doco", "DoCo: document objects for visual document understanding", "image_text"),
    Entry(31, "autotcl", "AutoTCL: parametric augmentation of time series", "series"),
    Entry(
        32,
        "contrastive-search",
        "Contrastive search and SimCTG",
        "decoding",
        "counterpoint.methods.decoding.contrastive_search:SimCTG",
    ),
    Entry(
        33,
        "moe-embeddings",
        "Mixture-of-experts embeddings",
        "language",
        "counterpoint.methods.language.moe_embeddings:MoEEmbeddings",
    ),
    Entry(34, "fac", "FAC: foreground-aware contrast of point clouds", "points"),
    Entry(35, "tip-clip", "TIP-CLIP: visualness of text", "image_text"),
    Entry(
        36,
        "vega",
        "Vega v1: tricks for language model pretraining",
        "language",
        "counterpoint.methods.language.vega:Vega",
    ),
    Entry(37, "amcl", "AMCL: adaptive multi-head contrast", "vision", "counterpoint.methods.vision.amcl:AMCL"),
    Entry(38, "contrastive-gap", "Contrastive gap (CUA, CUAXU)", "image_text"),
    Entry(39, "cocosoda", "CoCoSoDa: code search", "language", "counterpoint.methods.language.cocosoda:CoCoSoDa"),
    Entry(40, "scalecap", "ScaleCap: contrastive sentence rating for captions", "decoding"),
    Entry(
        41,
        "hallucinator",
        "Hallucinator: extra positives in feature space",
        "vision",
        "counterpoint.methods.vision.hallucinator:Hallucinator",
    ),
    Entry(
        42,
        "peft-augmentation",
        "Data augmentation for parameter-efficient tuning",
        "language",
        "counterpoint.methods.language.peft_augmentation:PEFTAugmentation",
    ),
    Entry(43, "adainf", "AdaInf: generated data for contrast", "vision", "counterpoint.methods.vision.adainf:AdaInf"),
    Entry(44, "cones", "ConES: concept embedding search", "image_text"),
    Entry(45, "sprc", "SPRC: sentence prompts for composed retrieval", "image_text"),
    Entry(46, "coca", "CoCa: contrastive captioners", "image_text"),
    Entry(47, "laclip", "LaCLIP: language rewrites", "image_text"),
    Entry(48, "dito", "DITO: detection-oriented image-text pretraining", "detection"),
    Entry(
        49,
        "esimcse",
        "ESimCSE: enhanced sample building for sentences",
        "language",
        "counterpoint.methods.language.esimcse:ESimCSE",
    ),
)
"""The 49 papers, in the order of their numbers."""


def entry(name: str) -> Entry:
    """The registry line called `name` (a slug).

    Raises:
        InputError: no method of the catalogue has that name; the message suggests the nearest.
    """
    known = {line.slug: line for line in (*BASELINES, *CATALOGUE)}
    if name not in known:
        raise InputError(f'no method named "{name}"{nearest(name, known)}')
    return known[name]


def names() -> list[str]:
    """Slugs of every method that can be trained now: baselines, ready catalogue entries, third parties' methods."""
    ours = [line.slug for line in (*BASELINES, *CATALOGUE) if line.implementation is not None]
    return [*ours, *(name for name in _third_party() if name not in ours)]


def get(name: str) -> Any:
    """The class of the method called `name`; only its own module is imported.

    Methods of this package come first; then those that installed packages register under the entry point group
    ``counterpoint.methods``.

    Raises:
        InputError: no method has that name, or it is planned and has no implementation yet.
    """
    ours = {line.slug: line for line in (*BASELINES, *CATALOGUE)}
    if name in ours:
        implementation = ours[name].implementation
        if implementation is None:
            raise InputError(f'method "{name}" is planned and not implemented yet; ready are {", ".join(names())}')
        module, _, attribute = implementation.partition(":")
        return getattr(import_module(module), attribute)
    module, colon, attribute = name.partition(":")
    if colon:
        try:
            return getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise InputError(f'method "{name}" cannot be imported: {error}') from error
    others = _third_party()
    if name not in others:
        raise InputError(f'no method named "{name}"{nearest(name, names())}')
    try:
        return others[name].load()
    except (ImportError, AttributeError) as error:
        raise InputError(f'method "{name}" of {others[name].value} cannot be imported: {error}') from error


def _third_party() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def name_of(cls: type) -> str:
    """The slug of a method's class, or ``"module:Class"`` for a class that is not registered."""
    path = f"{cls.__module__}:{cls.__qualname__}"
    ours = {line.implementation: line.slug for line in (*BASELINES, *CATALOGUE)}
    registered = {f"{point.module}:{point.attr}": name for name, point in _third_party().items()}
    return ours.get(path) or registered.get(path) or path
