"""Plain words for the report: tasks, metrics, kinds of models, and which way is better.

Names come from outside (results.json), so every lookup has an honest answer for an unknown one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hibio.keys import MAIN

TASKS: dict[str, str] = {
    "expression": "Gene expression of held-out patients' spots, predicted from H&E: frozen image "
    "embeddings, a ridge (or neighbour) read-out fitted on the training patients.",
    "retrieval": "Given a spot's image, find its own expression profile among those of a fixed "
    "pool, and the reverse; within one slide unless a metric says pooled.",
    "regions": "Region trees cut on held-out slides, compared with the contiguous pieces of the "
    "labels; coordinates is the control that knows positions alone.",
    "domains": "Clusters of the embedding compared with annotated tissue domains or cell niches; "
    "the number of clusters is the number of labels, and labels are used for scoring only.",
    "annotation": "A linear probe on frozen embeddings predicts the pathologist's or planted "
    "label, or the type of a cell, in patients it was not fitted on; without such patients in "
    "spatial blocks of the slide it was not fitted on.",
    "imputation": "Random genes are removed from the counts before anything is computed and "
    "predicted back from the rest: by ridge on each embedding, fitted on training patients (or "
    "other spatial blocks of the slide), and by decoders that need no fit.",
    "outcome": "Slide embeddings predict a patient-level outcome of patients not fitted on.",
    "pathway_query": "A gene set, also one never trained on, is scored on H&E alone and compared "
    "with the set's measured score on the same spots.",
    "hest_bench": "HEST-Bench: 50 genes of held-out sections predicted from frozen patch "
    "embeddings by the published PCA and ridge; what is not published stands beside it.",
    "identity": "Can a probe tell the slide or patient from an embedding? High values mean that "
    "stain or depth shortcuts are kept; lower is better.",
}

# Looked up in the parts of a metric's name between slashes; every pattern that fits is explained.
METRICS: tuple[tuple[str, str], ...] = (
    (
        r"^soft_recall@",
        "soft_recall@k: share of the first k items whose measured expression is among the 5 % of "
        "the slide most like the query's own",
    ),
    (
        r"^(pooled_)?recall@",
        "recall@k: share of queries whose partner is among the first k (k % of the pool)",
    ),
    (
        r"median_rank",
        "median_rank: where the right partner stands in the ranked pool, in the unit "
        "stated with the values; lower is better",
    ),
    (r"mrr", "mrr: mean of 1/rank of the right partner, 1 is perfect"),
    (
        r"(^|_)pooled",
        "pooled: over all test spots of a fold together, so differences between slides "
        "count as well",
    ),
    (
        r"random_graph",
        "random_graph: items averaged over random spots instead of neighbours; a "
        "niche gains only what it has beyond this",
    ),
    (
        r"csls|sinkhorn",
        "csls, sinkhorn: similarities re-scaled with the whole test slide (transductive)",
    ),
    (
        r"pearson|^pcc",
        "pearson: correlation of predicted and measured values, 1 is perfect; "
        "constant genes have none and are left out",
    ),
    (r"^hidden_genes$", "hidden_genes: genes whose counts no input holds a trace of"),
    (r"_median$", "median: over genes; otherwise their mean"),
    (r"_hest$", "hest: ridge with the fixed penalty of HEST-Bench"),
    (r"_bleep$", "bleep: mean expression of the nearest training spots"),
    (r"_both$", "both: ridge on raw features and embedding side by side"),
    (r"^pearson.*_combined$", "combined: z-scored mean of ridge and nearest training spots"),
    (
        r"_via_omics",
        "via_omics: ridge on raw features and embedding to the spot vector, and from there to "
        "genes by least squares on training spots",
    ),
    (
        r"^recall.*_combined$",
        "combined: cosine of the embeddings plus cosine of the spot vector and its ridge "
        "prediction from the raw image features",
    ),
    (r"spearman", "spearman: correlation of ranks, 1 is perfect"),
    (r"held_out", "held_out: gene sets that were not used in training"),
    (r"planted", "planted: compared with the simulated truth instead of the measured score"),
    (r"^anchor$", "anchor: cosine of the image embedding and the gene set's own embedding"),
    (r"(^|_)ari($|_)", "ari: adjusted Rand index of two partitions, 0 is chance, 1 is identical"),
    (r"(^|_)nmi($|_)", "nmi: normalised mutual information of two partitions, 1 is identical"),
    (
        r"(^|_)ami($|_)",
        "ami: mutual information of two partitions adjusted for chance, 0 is chance, 1 identical",
    ),
    (
        r"_label_smooth$",
        "label_smooth: cluster labels replaced by the majority among the neighbours afterwards",
    ),
    (
        r"^few_shot@",
        "few_shot@k: balanced accuracy of a probe fitted on k labelled spots of each class, "
        "several random draws",
    ),
    (
        r"^(published|varying_genes|per_slide|nested_alpha|training_genes)$",
        "published: the published protocol; beside it varying_genes (constant ones left out), "
        "per_slide (within each section), nested_alpha (penalty from inner folds), training_genes "
        "(genes chosen on training sections alone)",
    ),
    (r"log_hazard", "log_hazard: predicted risk of a test patient, higher is earlier"),
    (
        r"(?<!label)_smooth$",
        "smooth: embeddings averaged over neighbouring spots before clustering",
    ),
    (
        r"(kmeans|gmm)_graph($|_)",
        "graph: axes of the embedding that vary most over the tissue beside what differs between "
        "neighbours (minimum noise fraction); fitted on the slide, without labels",
    ),
    (r"balanced_accuracy", "balanced_accuracy: mean recall over classes"),
    (r"macro_f1", "macro_f1: F1 averaged over classes, so rare classes count as much"),
    (r"^mean$", "mean: the patient is the mean of the embeddings of its spots"),
    (r"^attention$", "attention: the patient is a learned weighted mean of its spots"),
    (r"auroc_(low|high)", "auroc_low, auroc_high: 95 % bootstrap interval over patients"),
    (
        r"probability_of_outcome",
        "probability_of_outcome: what the true class of a test patient was given",
    ),
    (r"auroc|^auc", "auroc: probability that a case is ranked above a non-case, 0.5 is chance"),
    (r"auprc|average_precision", "average precision: chance is the share of cases"),
    (
        r"c_index(?!_)|concordance",
        "c_index: share of comparable pairs in the right order, 0.5 is chance",
    ),
    (
        r"identity",
        "identity: accuracy of a probe that tells slide or patient from the embedding; "
        "lower is better",
    ),
    (
        r"^pearson_ridge$|^pearson_ridge_pooled$",
        "pearson_ridge: ridge on the embedding of a model that predicts expression itself, whose "
        "own prediction is plain pearson",
    ),
    (r"^r2|explained", "r2: explained share of variance, 0 is the mean"),
    (r"mse|mae", "mse, rmse, mae: errors of predicted values; lower is better"),
)

LOWER = re.compile(
    r"median_rank|mean_rank|constant_genes|identity|leak|mse|rmse|mae|brier|(^|[/_])(loss|error)($|[/_@])"
)


@dataclass(frozen=True)
class Kind:
    """What role a model plays in a comparison.

    Attributes:
        name: "this checkpoint", "baseline", "control", "oracle" or "transductive".
        meaning: One plain sentence.
        is_checkpoint: Whether it is the checkpoint under test.
        competes: Whether it may be called best; oracles and transductive read-outs use what a
            prediction does not have.
    """

    name: str
    meaning: str
    is_checkpoint: bool = False
    competes: bool = True


CHECKPOINT = Kind("this checkpoint", "The frozen model of this run.", is_checkpoint=True)

TRANSDUCTIVE = Kind(
    "transductive",
    "A read-out that uses all spots of the test slide at once. Not comparable with the others.",
    competes=False,
)

ORACLE = Kind(
    "oracle",
    "Uses measured test values that no prediction has. A ceiling, not a rival.",
    competes=False,
)

CONTROL = Kind(
    "control", "Something is shuffled or random on purpose. A good result here is a warning."
)

BASELINE = Kind("baseline", "Another method, fitted and scored on the same splits.")

VARIANT = Kind("variant", "A read-out or average that builds on this run's embeddings.")

KINDS: tuple[tuple[str, Kind], ...] = (
    (r"csls|sinkhorn|transductive", TRANSDUCTIVE),
    (r"oracle|ceiling", ORACLE),
    (r"shuffl|random(?!_?forest)|permut|facts", CONTROL),
    (rf"^{MAIN}\W|^{MAIN}_", VARIANT),
)

# What a baseline does, by patterns in its name; several may apply to one name.
METHODS: tuple[tuple[str, str], ...] = (
    (r"_decoder$", "predicts hidden genes by the model itself, no read-out is fitted"),
    (r"_tower$", "the omics tower before the projection to the shared space"),
    (r"^knn$", "mean of the nearest training cells in principal components of the visible genes"),
    (r"^mean|_mean$|train_mean", "predicts the training mean"),
    (r"coord|^xy", "sees spot coordinates only"),
    (r"handcrafted|colou?r_texture", "classical colour and texture features of the patch"),
    (r"raw|backbone", "stored image features, not trained here"),
    (r"ridge", "ridge regression"),
    (r"^ridge_to", "ridge from image features to the omics vector"),
    (r"depth", "sequencing depth only"),
    (r"pseudobulk", "mean expression of the patient"),
    (r"facts", "number of spots and mean depth, no expression"),
    (r"lsa|spot_vector", "TF-IDF with SVD (LSA), the model's own input vector"),
    (r"neighbou?r.*oracle", "measured expression of the neighbouring test spots"),
    (r"neighbou?rs$", "with the mean of the neighbouring spots"),
    (r"(^|_)pca", "principal components"),
    (r"flat", "spot-level alignment only, without pathways and regions"),
    (r"(^|_)clip", "plain contrastive alignment"),
    (r"mlp(?!_regression)", "a multi-layer perceptron tower"),
    (r"^mlp_regression", "predicts expression from frozen image features by two hidden layers"),
    (r"^st_net", "predicts expression by one linear layer on image features (ST-Net)"),
    (r"^triplex", "predicts expression from patch, neighbours and whole slide (TRIPLEX)"),
    (r"^omiclip", "contrast of image and the bag of the 50 most expressed genes (OmiCLIP)"),
    (r"^nicheformer", "contrast of image and genes ranked over their usual level (Nicheformer)"),
    (r"^st_align", "contrast of spots, niches and both fused (ST-Align)"),
    (r"^stagate", "graph attention autoencoder fitted on the slide itself (STAGATE)"),
    (r"^stagate_tfidf", "which reconstructs TF-IDF rows instead of log expression"),
    (r"_preprojection", "targets from similarities before the projection"),
    (r"bleep", "contrast with smoothed targets; mean expression of nearest spots (BLEEP)"),
    (r"shuffl", "image and expression pairs shuffled"),
    (r"matched_random", "random gene sets matched in size and mean expression"),
    (r"ensemble|average", "average over seeds or read-outs"),
    (r"csls|sinkhorn", "similarity re-scaled with the whole test slide"),
)


def kind_of(model: str) -> Kind:
    """Role of a model by its name; an unknown name is a baseline."""
    name = model.lower()
    if name == MAIN:
        return CHECKPOINT
    return next((kind for pattern, kind in KINDS if re.search(pattern, name)), BASELINE)


def describe_model(model: str) -> str:
    """What a model does, as far as its name tells; empty when it tells nothing."""
    name = model.lower()
    return "; ".join(text for pattern, text in METHODS if re.search(pattern, name))


def is_transductive(metric: str) -> bool:
    """Whether a metric's name says that the whole test slide was used."""
    return re.search(r"csls|sinkhorn|transductive", metric.lower()) is not None


def lower_is_better(metric: str, task: str = "") -> bool:
    """Whether smaller values of a metric are better (ranks, identity probes, errors).

    Args:
        metric: For example "image_to_omics/median_rank".
        task: Task of the metric; every metric of "identity" is better when low.
    """
    return LOWER.search(f"{task}/{metric}".lower()) is not None


def describe_task(task: str) -> str:
    """One line on a task, or a plain statement that none is known."""
    return TASKS.get(
        task.split("/")[0], "No description of this task is known to the report; see its notes."
    )


def describe_metrics(metrics: list[str]) -> list[str]:
    """One line for each kind of metric among the names, in the glossary's order."""
    parts = [part for metric in metrics for part in metric.lower().split("/")]
    return [text for pattern, text in METRICS if any(re.search(pattern, part) for part in parts)]
