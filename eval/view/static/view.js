// What is asked and told: slides, heatmaps, regions, spots, areas; keys and addresses.
"use strict";

// ---------------------------------------------------------------- slide, heatmaps, regions
async function openSlide(id) {
  const facts = cohort.slides.find((one) => one.id === id);
  if (!facts) throw new Error(`no slide ${id}`);
  tell(`opening ${id}`);
  const slide = await source.slide(id);
  Object.assign(state, { slide, spot: null, area: null });
  $("slide").value = id;
  $("spot").hidden = $("area").hidden = true;
  $("region-area").disabled = true;
  $("facts").textContent = `patient ${facts.patient}, ${slide.spots} spots, ${facts.trained ? "trained on" : "never trained on"}`;
  const missing = Object.entries(cohort.missing).map(([what, why]) => `No prediction of ${what}: ${why}.`);
  const more = [slide.verdict, slide.tiles.words && `Shown is ${slide.tiles.words}.`, cohort.reliability_words && `Reliability: ${cohort.reliability_words}.`];
  $("words").textContent = [...more, ...missing].filter(Boolean).join(" ");
  for (const letter of "ab") {
    const kind = $(`kind-${letter}`);
    kind.options[0].disabled = !facts.counts;
    kind.options[1].disabled = !facts.image;
    if (kind.selectedOptions[0].disabled) kind.value = facts.counts ? "measured" : "predicted";
  }
  const shown = panes.filter((pane) => !pane.root.hidden);
  await Promise.all(shown.map((pane) => pane.open()));
  await regions();
  for (const pane of shown) await heat(pane.letter);
  tell("");
}

async function heat(letter) {
  const pane = panes["ab".indexOf(letter)], name = $(`name-${letter}`).value.trim();
  remember();
  if (!name) return pane.show(null);
  const id = state.slide.id, began = performance.now();
  const found = await source.heat(id, name, $(`kind-${letter}`).value).catch((error) => {
    pane.show(null);
    compare();
    throw error;
  });
  if (id !== state.slide.id) return;
  pane.show(found);
  document.documentElement.dataset.heatMs = Math.round(performance.now() - began);
  compare();
  tell(`${found.about.title}, ${found.about.kind}: shown over ${found.values.length} spots`);
}

function compare() {
  const [a, b] = panes.map((pane) => pane.heat);
  $("compare").hidden = !(state.two && a && b);
  if ($("compare").hidden) return;
  const canvas = $("scatter"), to = canvas.getContext("2d");
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink");
  to.clearRect(0, 0, canvas.width, canvas.height);
  to.fillStyle = ink;
  to.globalAlpha = a.values.length > 2000 ? 0.15 : 0.5;
  const [ax, bx] = [limits(a.values), limits(b.values)];
  const at = (v, [low, high], n) => 6 + (n - 12) * Math.min(Math.max((v - low) / (high - low), 0), 1);
  const step = Math.max(1, Math.floor(a.values.length / 20000));
  for (let i = 0; i < a.values.length; i += step)
    to.fillRect(at(a.values[i], ax, canvas.width) - 1, canvas.height - at(b.values[i], bx, canvas.height) - 1, 2, 2);
  const r = number(pearson(a.values, b.values));
  const words = `Pearson r = ${r} over ${a.values.length} spots: across ${a.about.title} (${a.about.kind}), up ${b.about.title} (${b.about.kind}).`;
  $("correlation").textContent = words;
  canvas.setAttribute("aria-label", words);
}

async function regions() {
  const level = cohort.levels[state.level - 1], id = state.slide.id;
  $("level").value = state.level;
  $("level-name").textContent = level || "off";
  $("level").setAttribute("aria-valuetext", level || "off");
  const found = level ? await source.regions(id, level) : { outlines: new Float32Array(), codes: null };
  if (id !== state.slide.id || level !== cohort.levels[state.level - 1]) return;
  state.codes = found.codes;
  panes.forEach((pane) => pane.layer.setOutlines(found.outlines));
  $("region-area").disabled = !(state.codes && state.spot !== null);
  remember();
  redraw();
}

// ---------------------------------------------------------------- a spot and its likes
const chooseAt = guard(async (pane, point) => {
  const [x, y] = pane.place(point), xy = state.slide.xy;
  let best = null, least = (state.slide.diameter * 0.8) ** 2;
  for (let i = 0; i < xy.length / 2; i++) {
    const far = (xy[2 * i] - x) ** 2 + (xy[2 * i + 1] - y) ** 2;
    if (far < least) [best, least] = [i, far];
  }
  if (best === null) tell("no spot there");
  else await choose(best);
});

async function choose(i) {
  const id = state.slide.id;
  state.spot = i;
  redraw();
  remember();
  const found = await source.spot(id, i);
  if (state.slide.id !== id || state.spot !== i) return;
  const facts = cohort.slides.find((one) => one.id === id), root = $("spot");
  const rows = [["Place", `${found.um[0]}, ${found.um[1]} µm`],
    ...panes.filter((p) => p.heat && !p.root.hidden).map((p) => [`${p.heat.about.title}, ${p.heat.about.kind}`, number(p.heat.values[i])])];
  const labels = Object.entries(found.labels).map(([name, value]) => [name, typeof value === "number" ? number(value) : value ?? ""]);
  const genes = found.keywords.map(([gene, value]) => el("button", { type: "button", title: `TF-IDF ${value}`, onclick: guard(() => typed("a", gene)) }, gene));
  root.replaceChildren(el("h2", {}, `Spot ${found.barcode}`),
    el("div", { className: "beside" }, ...(facts.patches ? [source.patch(id, i, 128)] : []), table(["", ""], rows)),
    el("h3", {}, "Keyword genes (largest TF-IDF)"),
    el("div", { className: "genes" }, ...(genes.length ? genes : [el("span", { className: "soft" }, "no counts")])),
    ...(labels.length ? [el("details", {}, el("summary", {}, `${labels.length} labels`), table(["", ""], labels))] : []));
  root.hidden = false;
  $("region-area").disabled = !state.codes;
  const elsewhere = cohort.slides.length > 1 ? "in other slides" : "in this slide";
  const likes = (list) => el("div", { className: "near" }, ...list.map((one) => likeness(one)));
  later("regions", i, "Regions", () => source.within(id, i), (codes) => table(["", ""], Object.entries(codes).map(([level, code]) => [level, String(code)])));
  if (facts.image) later("image", i, `Nearest ${elsewhere} by image`, () => source.near(id, i, "image"), likes);
  if (facts.counts) later("omics", i, `Nearest ${elsewhere} by omics`, () => source.near(id, i, "omics"), likes);
}

// A part of what is told of a spot that waits for embeddings. Of one kind one question is asked at a
// time, and none of a spot that was left meanwhile: a server that is at work is not asked forty times.
const asked = {};
function later(kind, i, title, ask, show) {
  const id = state.slide.id, words = el("p", { className: "soft" }, "not there yet; the line at the top tells what is being done");
  $("spot").append(el("h3", {}, title), words);
  const chosen = () => state.slide.id === id && state.spot === i && words.isConnected;
  asked[kind] = (asked[kind] || Promise.resolve()).then(async () => {
    if (!chosen()) return;
    const found = await ask().then(show).catch((error) => el("p", { className: "bad" }, error.message));
    if (chosen()) words.replaceWith(found);
  });
}

function likeness({ slide, spot, cosine }) {
  const words = el("span", {}, `${slide} #${spot}`, el("br"), `cosine ${cosine.toFixed(3)}`);
  const facts = cohort.slides.find((one) => one.id === slide);
  const go = guard(async () => {
    if (slide !== state.slide.id) await openSlide(slide);
    await choose(spot);
    centre(spot);
  });
  return el("button", { type: "button", onclick: go }, ...(facts.patches ? [source.patch(slide, spot, 64)] : []), el("br"), words);
}

function centre(i) {
  const { xy, tiles } = state.slide;
  const point = new OpenSeadragon.Point(xy[2 * i] / tiles.size_px0[0], xy[2 * i + 1] / tiles.size_px0[0]);
  panes.filter((pane) => !pane.root.hidden).forEach((pane) => pane.viewer.viewport.panTo(point));
}

function table(head, rows) {
  const cells = (tag, row) => row.map((text) => el(tag, {}, text));
  const made = el("table");
  if (head.some(Boolean)) made.append(el("thead", {}, el("tr", {}, ...cells("th", head))));
  made.append(el("tbody", {}, ...rows.map((row) => el("tr", {}, ...cells("td", row)))));
  return made;
}

// ---------------------------------------------------------------- an area
function lasso(on) {
  $("lasso").setAttribute("aria-pressed", on);
  panes.forEach((pane) => pane.root.classList.toggle("drawing", on));
  if (on) tell("draw around spots with the pointer held down");
}

function inside(ring) {
  const { xy } = state.slide, found = [];
  for (let s = 0; s < xy.length / 2; s++) {
    const x = xy[2 * s], y = xy[2 * s + 1];
    let within = false;
    for (let i = 0, j = ring.length - 1; i < ring.length; j = i++) {
      const [ax, ay] = ring[i], [bx, by] = ring[j];
      if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) within = !within;
    }
    if (within) found.push(s);
  }
  return found;
}

async function showArea(ring, spots) {
  state.area = { ring, spots };
  redraw();
  $("area").hidden = true;
  if (!spots.length) return tell("the area holds no spot", true);
  const found = await source.area(state.slide.id, spots);
  const part = (columns) => columns.name
    .map((name, i) => ({ name, in: columns.inside[i], out: columns.outside[i], sd: columns.sd[i] }))
    .map((row) => ({ ...row, effect: row.sd > 0 ? (row.in - row.out) / row.sd : 0 }));
  const genes = part(found.genes), sets = found.sets ? part(found.sets) : [];
  const top = (rows) => table(["name", "inside", "outside", "sd apart"], rows.filter((row) => row.effect > 0).sort((a, b) => b.effect - a.effect)
    .slice(0, 10).map((row) => [row.name, number(row.in), number(row.out), number(row.effect)]));
  const name = `${state.slide.id}-area`;
  const save = (text, kind, ending) => el("button", { type: "button", onclick: () => download(`${name}.${ending}`, text(), kind) }, ending.toUpperCase());
  $("area").replaceChildren(el("h2", {}, `Area of ${found.spots} spots, ${found.kind}`),
    ...(sets.length ? [el("h3", {}, "Gene sets highest above the rest"), top(sets)] : []),
    el("h3", {}, FILES ? "Exported genes highest above the rest" : "Genes highest above the rest"), top(genes),
    el("div", { className: "row" }, "Download", save(() => csv(genes, sets), "text/csv", "csv"), save(() => geojson(name, ring, spots, sets), "application/geo+json", "geojson")));
  $("area").hidden = false;
  tell(`area of ${found.spots} spots`);
}

const quoted = (text) => `"${(/^[=+\-@\t\r]/.test(text) ? `'${text}` : text).replaceAll('"', '""')}"`;

function csv(genes, sets) {
  const rows = [["gene", genes], ["gene set", sets]].flatMap(([kind, list]) => list.map((row) => [kind, quoted(row.name), row.in, row.out, row.sd, row.effect].join(",")));
  return `kind,name,mean_inside,mean_outside,sd_of_slide,sd_apart\n${rows.join("\n")}\n`;
}

// As QuPath opens it: places in pixels of level 0.
function geojson(name, ring, spots, sets) {
  const { xy, diameter, id } = state.slide;
  const round = ([x, y]) => [+x.toFixed(1), +y.toFixed(1)];
  const circle = (s) => Array.from({ length: 17 }, (_, i) => round([xy[2 * s] + (diameter / 2) * Math.cos((i * Math.PI) / 8), xy[2 * s + 1] + (diameter / 2) * Math.sin((i * Math.PI) / 8)]));
  const feature = (type, coordinates, properties) => ({ type: "Feature", geometry: { type: "Polygon", coordinates: [coordinates] }, properties: { objectType: type, ...properties } });
  const measurements = Object.fromEntries(sets.map((row) => [row.name, row.in]));
  const outline = ring.length ? [feature("annotation", [...ring, ring[0]].map(round), { name, measurements })] : [];
  const values = (s) => Object.fromEntries(panes.filter((p) => p.heat).map((p) => [`${p.heat.about.title} (${p.heat.about.kind})`, +p.heat.values[s].toPrecision(6)]));
  const all = [...outline, ...spots.map((s) => feature("detection", circle(s), { name: `${id} #${s}`, measurements: values(s) }))];
  return JSON.stringify({ type: "FeatureCollection", made_by: "hibio", features: all });
}

function download(name, text, kind) {
  const link = el("a", { download: name, href: URL.createObjectURL(new Blob([text], { type: kind })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// ---------------------------------------------------------------- what the page remembers
function remember() {
  const kept = new URLSearchParams({ slide: state.slide.id });
  for (const letter of state.two ? "ab" : "a")
    if ($(`name-${letter}`).value) {
      kept.set(letter, $(`name-${letter}`).value);
      kept.set(`${letter}-kind`, $(`kind-${letter}`).value);
    }
  if (state.level) kept.set("level", state.level);
  if (state.spot !== null) kept.set("spot", state.spot);
  if (state.two) kept.set("two", 1);
  history.replaceState(null, "", `#${kept}`);
}

async function typed(letter, name) {
  $(`name-${letter}`).value = name;
  await heat(letter);
}

function otherKind() {
  const [now, other] = $("kind-a").value === "measured" ? ["measured", "predicted"] : ["predicted", "measured"];
  return [...$("kind-a").options].some((one) => one.value === other && one.disabled) ? now : other;
}

async function two(on) {
  state.two = on;
  $("two").setAttribute("aria-pressed", on);
  $("pane-b").hidden = $("form-b").hidden = !on;
  panes[0].viewer.addOnceHandler("resize", () => setTimeout(whole));
  if (on && !panes[1]) {
    panes.push(new Pane("b"));
  }
  if (on) {
    if (!$("name-b").value) [$("name-b").value, $("kind-b").value] = [$("name-a").value, otherKind()];
    await panes[1].open();
    Pane.leading = panes[0];
    await regions();
    await heat("b");
  }
  compare();
  remember();
}

async function against() {
  $("name-b").value = $("name-a").value;
  $("kind-a").value = "measured";
  $("kind-b").value = "predicted";
  if (!state.two) await two(true);
  else await heat("b");
  await heat("a");
}

function theme() {
  const dark = document.documentElement.dataset.theme !== "dark";
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  compare();
}

function whole() {
  panes.filter((pane) => pane.viewer.isOpen()).forEach((pane) => pane.viewer.viewport.goHome(true));
}

const step = (by) => guard(async () => {
  const i = Math.min(Math.max((state.spot ?? -by) + by, 0), state.slide.spots - 1);
  await choose(i);
  centre(i);
});
const turn = (by) => guard(async () => {
  const ids = cohort.slides.map((one) => one.id), i = ids.indexOf(state.slide.id) + by;
  if (ids[i]) await openSlide(ids[i]);
});
const level = (by) => guard(async () => {
  state.level = Math.min(Math.max(state.level + by, 0), cohort.levels.length);
  await regions();
});
const KEYS = {
  "/": () => $("name-a").focus(), b: () => $("two").click(), l: () => $("lasso").click(), t: theme,
  "[": level(-1), "]": level(1), n: step(1), p: step(-1), ",": turn(-1), ".": turn(1),
  0: whole,
  "+": () => panes.forEach((pane) => pane.viewer.viewport.zoomBy(1.4)),
  "-": () => panes.forEach((pane) => pane.viewer.viewport.zoomBy(1 / 1.4)),
  m: guard(async () => {
    $("kind-a").value = otherKind();
    await heat("a");
  }),
  Escape() { lasso(false); state.area = state.spot = null; $("area").hidden = $("spot").hidden = true; redraw(); },
};

function connect() {
  document.addEventListener("keydown", (event) => {
    const typing = /INPUT|SELECT|TEXTAREA/.test(event.target.tagName) && event.key !== "Escape";
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  $("slide").addEventListener("change", guard(() => openSlide($("slide").value)));
  for (const letter of "ab") {
    const name = $(`name-${letter}`);
    $(`form-${letter}`).addEventListener("submit", (event) => { event.preventDefault(); guard(heat)(letter); });
    $(`kind-${letter}`).addEventListener("change", guard(() => heat(letter)));
    name.addEventListener("input", () => suggest(name.value));
    name.addEventListener("paste", (event) => { // an input would join the lines of a list
      const text = event.clipboardData.getData("text");
      if (!text.includes("\n")) return;
      event.preventDefault();
      name.value = text.trim().split(/\s*\n\s*/).join(", ");
    });
  }
  $("two").addEventListener("click", guard(() => two(!state.two)));
  $("against").addEventListener("click", guard(against));
  $("theme").addEventListener("click", theme);
  $("lasso").addEventListener("click", () => lasso($("lasso").getAttribute("aria-pressed") !== "true"));
  $("region-area").addEventListener("click", guard(() => {
    const code = state.codes[state.spot], spots = [];
    state.codes.forEach((one, i) => { if (one === code) spots.push(i); });
    return showArea([], spots);
  }));
  $("level").addEventListener("input", guard(() => { state.level = +$("level").value; return regions(); }));
  $("map").addEventListener("change", () => panes.forEach((pane) => { pane.colour(); pane.draw(); }));
  for (const name of ["opacity", "size"]) $(name).addEventListener("input", redraw);
}

function suggest(text) {
  const wanted = text.toLowerCase(), all = [...Object.keys(cohort.sets), ...cohort.genes];
  const starts = all.filter((name) => name.toLowerCase().startsWith(wanted));
  const holds = starts.length < 20 ? all.filter((name) => !starts.includes(name) && name.toLowerCase().includes(wanted)) : [];
  const known = (name) => {
    const r = (cohort.known.reliability || [])[cohort.genes.indexOf(name)];
    return r === undefined ? "" : `reliability ${number(r)}`;
  };
  $("names").replaceChildren(...[...starts, ...holds].slice(0, 20).map((name) => el("option", { value: name, label: known(name) ? `${name}: ${known(name)}` : name })));
}

const start = guard(async () => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  cohort = await source.cohort();
  $("slide").append(...cohort.slides.map((one) => el("option", { value: one.id }, one.id)));
  $("map").append(...Object.keys(cohort.maps).map((name) => el("option", {}, name)));
  $("level").max = cohort.levels.length;
  const kept = new URLSearchParams(location.hash.slice(1));
  for (const letter of "ab") {
    $(`name-${letter}`).value = kept.get(letter) || "";
    if (kept.get(`${letter}-kind`)) $(`kind-${letter}`).value = kept.get(`${letter}-kind`);
  }
  if (!$("name-a").value) $("name-a").value = Object.keys(cohort.sets)[0] || cohort.genes[0];
  suggest("");
  state.level = Math.min(+kept.get("level") || 0, cohort.levels.length);
  panes = [new Pane("a")];
  Pane.leading = panes[0];
  connect();
  const spot = kept.get("spot"), both = kept.get("two");
  await openSlide(cohort.slides.some((one) => one.id === kept.get("slide")) ? kept.get("slide") : cohort.slides[0].id);
  if (both) await two(true);
  if (spot !== null && +spot < state.slide.spots) await choose(+spot);
  document.documentElement.dataset.ready = "yes";
});
start();
