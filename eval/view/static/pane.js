// A slide with a heatmap over it, and how it is coloured.
"use strict";

const GREY = [150, 150, 150];

function el(tag, more = {}, ...inside) {
  const made = Object.assign(document.createElement(tag), more);
  made.append(...inside);
  return made;
}

function blank(px) {
  const made = el("span", { className: "patch" });
  made.style.width = made.style.height = `${px}px`;
  return made;
}

function tell(words, bad = false) {
  $("status").textContent = words;
  $("status").classList.toggle("bad", bad);
}

const guard = (work) => async (...given) => {
  try {
    await work(...given);
  } catch (error) {
    tell(error.message, true);
  }
};
const number = (v) => (v === null || !Number.isFinite(v) ? "not known" : String(+v.toPrecision(3)));

function pearson(a, b) {
  let n = 0, sa = 0, sb = 0, aa = 0, bb = 0, ab = 0;
  for (let i = 0; i < a.length; i++) {
    if (!Number.isFinite(a[i]) || !Number.isFinite(b[i])) continue;
    n++; sa += a[i]; sb += b[i]; aa += a[i] * a[i]; bb += b[i] * b[i]; ab += a[i] * b[i];
  }
  const size = Math.sqrt((aa - (sa * sa) / n) * (bb - (sb * sb) / n));
  return size > 0 ? (ab - (sa * sb) / n) / size : NaN;
}

// Limits of the colours: the 2nd and 98th percentile.
function limits(values) {
  const sorted = Float32Array.from(values.filter(Number.isFinite)).sort();
  if (!sorted.length) return [0, 1];
  const at = (q) => sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))];
  const [low, high] = [at(0.02), at(0.98)];
  return high > low ? [low, high] : [sorted[0], Math.max(sorted[sorted.length - 1], sorted[0] + 1e-6)];
}

// Level of every value in the palette: 1 to 255 from low to high, 0 where it is not known.
function levels(values, [low, high]) {
  const made = new Uint8ClampedArray(values.length); // rounds, and cuts off above
  for (let i = 0; i < values.length; i++)
    made[i] = Number.isFinite(values[i]) ? Math.max((254 * (values[i] - low)) / (high - low), 0) + 1 : 0;
  return made;
}

function palette() {
  const map = cohort.maps[$("map").value], made = new Uint8ClampedArray(1024).fill(255);
  for (let i = 1; i < 256; i++) made.set(map.slice(3 * i, 3 * i + 3), 4 * i);
  made.set([...GREY, 90]);
  return made;
}

function reliability(about) {
  if (about.reliability === undefined) return "";
  const [r, low, high] = ["reliability", "reliability_low", "reliability_high"].map((n) => about[n]);
  const range = low === null ? "" : ` (95 %: ${number(low)} to ${number(high)})`;
  const note = about.note ? `; ${about.note}` : "";
  return `reliability r = ${number(r)}${range}, ${about.reliability_n} held out${note}`;
}

class Pane {
  constructor(letter) {
    this.letter = letter;
    this.root = $(`pane-${letter}`);
    const ground = el("div", { className: "osd" });
    this.layerCanvas = el("canvas", { className: "layer" });
    this.top = el("canvas", { className: "top" });
    this.legend = el("div", { className: "legend", hidden: true });
    this.scale = el("div", { className: "scale" });
    this.root.append(ground, this.layerCanvas, this.top, this.legend, this.scale);
    this.viewer = OpenSeadragon({
      element: ground, drawer: "canvas", showNavigationControl: false, animationTime: 0.4,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      gestureSettingsTouch: { clickToZoom: false }, maxZoomPixelRatio: 8, visibilityRatio: 0.3,
      minZoomImageRatio: 0.5, crossOriginPolicy: false,
    });
    this.layer = new Layer(this.layerCanvas);
    this.viewer.addHandler("update-viewport", () => this.draw());
    this.viewer.addHandler("open", () => this.draw());
    this.viewer.addHandler("canvas-click", (event) => {
      if (event.quick) chooseAt(this, event.position);
    });
    for (const name of ["pointerenter", "focusin"])
      this.root.addEventListener(name, () => { Pane.leading = this; });
    this.viewer.addHandler("viewport-change", () => this.lead());
    new ResizeObserver(() => this.draw()).observe(this.root);
    this.lassoBy();
  }

  lead() { // the other pane goes where this one went
    if (Pane.leading !== this || !state.two) return;
    for (const other of panes)
      if (other !== this && other.viewer.isOpen())
        other.viewer.viewport.fitBounds(this.viewer.viewport.getBounds(), true);
  }

  open() {
    const { tiles, id } = state.slide;
    this.layer.setPlaces(new Float32Array(state.slide.xy));
    this.layer.setOutlines(new Float32Array());
    this.show(null);
    const opened = new Promise((done) => this.viewer.addOnceHandler("open", done));
    this.viewer.open({
      width: tiles.width, height: tiles.height, tileSize: tiles.tile, tileOverlap: tiles.overlap,
      minLevel: Math.max(0, Math.min(8, tiles.levels - 1)), maxLevel: tiles.levels - 1,
      getTileUrl: (level, x, y) => source.tile(id, level, x, y),
    });
    return opened;
  }

  view() { // x and y of level-0 pixel (0, 0) on the page, page pixels a level-0 pixel
    const at = (x, y) => this.viewer.viewport.pixelFromPoint(new OpenSeadragon.Point(x, y), true);
    const origin = at(0, 0);
    return [origin.x, origin.y, (at(1, 0).x - origin.x) / state.slide.tiles.size_px0[0]];
  }

  place(point) { // level-0 pixels of a place on the page
    const [x, y, k] = this.view();
    return [(point.x - x) / k, (point.y - y) / k];
  }

  draw() {
    if (!state.slide || !this.viewer.isOpen() || this.root.hidden) return;
    const view = this.view(), radius = (state.slide.diameter / 2) * $("size").value;
    this.layer.draw(view, radius, +$("opacity").value);
    this.drawTop(view, radius);
    this.drawScale(view[2]);
  }

  drawTop([left, top, k], radius) {
    const ratio = window.devicePixelRatio || 1, canvas = this.top;
    canvas.width = canvas.clientWidth * ratio;
    canvas.height = canvas.clientHeight * ratio;
    const to = canvas.getContext("2d");
    to.scale(ratio, ratio);
    const twice = () => [["#fff", 5], ["#d0006f", 2.5]].forEach(([ink, width]) => {
      to.strokeStyle = ink;
      to.lineWidth = width;
      to.stroke();
    });
    if (state.spot !== null) {
      const [x, y] = [0, 1].map((j) => state.slide.xy[2 * state.spot + j]);
      to.beginPath();
      to.arc(left + k * x, top + k * y, Math.max(radius * k, 3) + 2, 0, 7);
      twice();
    }
    if (state.area && state.area.ring.length) {
      to.beginPath();
      state.area.ring.forEach(([x, y]) => to.lineTo(left + k * x, top + k * y));
      if (state.area.spots) to.closePath();
      twice();
    }
  }

  drawScale(k) {
    const um = state.slide.mpp / k, wanted = 120 * um, power = 10 ** Math.floor(Math.log10(wanted));
    const length = [5, 2, 1].map((m) => m * power).find((one) => one <= wanted);
    this.scale.style.width = `${length / um}px`;
    this.scale.textContent = length >= 1000 ? `${length / 1000} mm` : `${length} µm`;
  }

  show(heat) {
    this.heat = heat;
    this.legend.hidden = !heat;
    this.legend.replaceChildren();
    if (!heat) this.layer.setColours(null);
    else this.colour();
    this.draw();
  }

  colour() {
    if (!this.heat) return;
    const { values, about } = this.heat, ends = limits(values), bar = el("canvas", { width: 255, height: 1 }), paint = palette();
    this.layer.setColours(levels(values, ends), paint);
    bar.getContext("2d").putImageData(new ImageData(paint.slice(4), 255, 1), 0, 0);
    bar.setAttribute("aria-hidden", "true");
    const lines = [el("strong", {}, about.title), ` ${about.kind}`];
    const trust = reliability(about);
    const parts = [el("p", {}, ...lines), bar,
      el("div", { className: "ends" }, el("span", {}, number(ends[0])), el("span", {}, number(ends[1]))),
      el("p", { className: "soft" }, about.from ? `${about.unit}; from ${about.from}` : about.unit)];
    if (trust) parts.push(el("p", { className: about.note ? "bad" : "soft" }, trust));
    if (about.genes) parts.push(el("p", { className: "soft" }, `${about.genes.length} genes: ${about.genes.slice(0, 8).join(", ")}${about.genes.length > 8 ? ", ..." : ""}`));
    this.legend.replaceChildren(...parts);
  }

  lassoBy() {
    const point = (event) => {
      const box = this.top.getBoundingClientRect();
      return this.place({ x: event.clientX - box.left, y: event.clientY - box.top });
    };
    this.top.addEventListener("pointerdown", (event) => {
      this.top.setPointerCapture(event.pointerId);
      state.area = { ring: [point(event)], spots: null };
    });
    this.top.addEventListener("pointermove", (event) => {
      if (!state.area || state.area.spots || !event.buttons) return;
      state.area.ring.push(point(event));
      redraw();
    });
    this.top.addEventListener("pointerup", guard(async () => {
      lasso(false);
      if (state.area && !state.area.spots) await showArea(state.area.ring, inside(state.area.ring));
    }));
  }
}

const redraw = () => panes.forEach((pane) => pane.draw());
