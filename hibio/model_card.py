"""The model card of a shared folder: what the hub shows, of what the files say and nothing more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hibio.artifacts import Artifacts
from hibio.backbones.registry import known_backbone
from hibio.checkpoint import BANK, READOUT, provenance
from hibio.config.run import RunConfig
from hibio.data.splits import PATIENT
from hibio.readout import MIN_RELIABILITY, read_readout
from preprocessing.files import atomic_path
from preprocessing.hdf5 import open_guarded

CARD = "README.md"
SHOWN = 20  # genes in the card


def write_card(
    folder: Path,
    run: RunConfig,
    artifacts: Artifacts,
    licence: str,
    told: Sequence[Sequence[str]],
    *,
    name: str,
    unfinished: bool,
) -> None:
    """Write the model card, which the hub shows, of what is in the folder."""
    from jinja2 import Environment, StrictUndefined

    seals = artifacts.seals
    trained = artifacts.train_slides
    vision = run.model.vision
    encoder = known_backbone(vision.timm_name if vision.name == "timm" else run.data.image or "")
    readout = read_readout(folder / READOUT) if (folder / READOUT).is_file() else None
    var = None if readout is None else readout.var(MIN_RELIABILITY)
    bank = 0
    if (folder / BANK).is_file():
        with open_guarded(folder / BANK) as file:
            bank = int(file["slide"].shape[0])
    patients = {seals[one].get(PATIENT, "") for one in trained if one in seals} - {""}
    text = Environment(undefined=StrictUndefined, trim_blocks=True).from_string(_CARD)
    card = text.render(
        name=name,
        run=run,
        artifacts=artifacts,
        licence=licence,
        told=told,
        unfinished=unfinished,
        versions=provenance()["packages"],
        slides=sorted({*trained, *seals}),
        seals=seals,
        trained=trained,
        n_patients=len(patients) or "an unknown number of",
        encoder=encoder,
        bank=bank,
        readout=readout,
        best=None if var is None else var.nlargest(SHOWN, "reliability").to_dict("index"),
        n_trusted=None if var is None else int(var["trusted"].sum()),
        median=None if var is None else var["reliability"].median(),
    )
    with atomic_path(folder / CARD) as temporary:
        temporary.write_text(card, encoding="utf-8")


_CARD = """---
library_name: hibio
license: {{ licence or "other" }}
tags: [histology, spatial-transcriptomics, pathology, multimodal]
---
# {{ name }}

Histology and spatial omics in one embedding space: a model of HiBio, pretrained on
{{ trained | length }} slides of {{ n_patients }} patients.
{% if unfinished %}
**Its training was stopped before its end.**
{% endif %}

## Use

```python
from hibio import HiBio

model = HiBio.from_pretrained("hf-hub:ORG/{{ name }}")  # or the path of this folder
{% if run.model.vision.name != "none" %}
image = model.encode_image(features)  # `{{ run.data.image }}` of the spots of one slide
{% endif %}
{% if readout %}
adata = model.predict(features)  # expression; what is known of each gene in adata.var
{% endif %}
omics = model.encode_omics(adata)  # raw counts of one slide, micrometres in adata.obsm
```
{% if readout %}

```bash
hibio predict --checkpoint hf-hub:ORG/{{ name }} --data slide.svs --out predictions
```
{% endif %}

Weights are safetensors, the rest is HDF5 and YAML: no code comes with it.

## What it is

| | |
|---|---|
| made with | HiBio {{ versions.hibio }}, torch {{ versions.torch }} |
| genes | {{ artifacts.n_genes }} ({{ artifacts.modality }}) |
{% if run.model.vision.name != "none" %}
| image | {{ run.data.image }}, tower {{ run.model.vision.name }} |
{% endif %}
{% if artifacts.settings.patch_um %}
| patch | {{ "%g" | format(artifacts.settings.patch_um) }} um |
{% endif %}
| omics tower | {{ run.model.omics.name }} |
| width of the embedding | {{ run.model.embed_dim }} |
| gene sets | {{ artifacts.database.name if artifacts.database else "none" }} |
| held-out patients, seed | {{ run.folds[0] }}, {{ run.seeds[0] }} |

## Data

Names are hashes with a salt that was not kept. The seal is the start of the SHA-256 of the counts:
who has a slide can tell whether it was trained on.

| slide | patient | used for | seal |
|---|---|---|---|
{% for slide in slides %}
| {{ slide }} | {{ seals.get(slide, {}).get("patient", "not known") }} | {{ "training"
 if slide in trained else "not trained on" }} | {{ seals.get(slide, {}).get("counts", "")[:12] }} |
{% endfor %}

## What was measured

{% if told %}
On the held-out patients of this model, by `hibio eval`; n values, mostly one a slide.

| task | metric | row | role | mean | n | chance |
|---|---|---|---|---|---|---|
{% for row in told %}
| {{ row | join(" | ") }} |
{% endfor %}
{% else %}
Nothing: `hibio eval` was not run on these weights before they were shared.
{% endif %}

## Reliability of predicted genes

{% if readout %}
Held-out Pearson r within a slide, {{ readout.words }}.
Median {{ "%.3f" | format(median) }}; {{ n_trusted }} of {{ readout.names | length }} genes are
marked as trusted. The {{ best | length }} best; all are in `predict(...).var`:

| gene | r | 95 % | n | interval held |
|---|---|---|---|---|
{% for gene, one in best.items() %}
| {{ gene }} | {{ "%.3f" | format(one.reliability) }} | {{ "%.3f to %.3f" | format(
one.reliability_low, one.reliability_high) }} | {{ one.reliability_n }} | {{ "%.2f" | format(
one.coverage) }} |
{% endfor %}
{% for one in readout.labels %}

Label {{ one.name }} ({{ one.classes | join(", ") }}): balanced accuracy
{{ "%.3f" | format(one.accuracy) }}, of chance {{ "%.3f" | format(1 / one.classes | length) }},
in {{ one.n_units }} held-out {{ one.unit }}; calibration error {{ "%.3f" | format(one.error) }}.
{% endfor %}
{% else %}
It predicts no genes: it was shared without a read-out.
{% endif %}

## Intended use and limits

- For research on histology and spatial expression. No medical device: no diagnosis and no decision
  on a patient may rest on it.
- It has seen {{ n_patients }} patients. On another organ, stain, scanner or protocol nothing of the
  above is promised; `obs["familiarity"]` of a prediction says how unlike the training slides a
  patch looks.
- Whom and what the cohort left out, the model does not know.
{% if bank %}
- `bank.h5` holds keyword profiles (TF-IDF) of {{ bank }} training spots, and every file was fitted
  on them: pass it on only as far as the consent of the patients goes.
{% endif %}

## Licence

- Weights: {{ licence or "not stated; ask who shared it" }}.
{% if artifacts.database %}
- Gene sets {{ artifacts.database.name }} {{ artifacts.database.version }}: {{
artifacts.database.licence or "not stated" }}.
{% endif %}
{% if encoder %}
- Encoder {{ encoder.encoder }}, whose weights are {{ "part of these" if
run.model.vision.name == "timm" else "not here" }}: {{ encoder.licence }}.
{% endif %}
"""
