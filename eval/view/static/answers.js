// Where answers come from: a server, or files beside the page.
"use strict";

const $ = (id) => document.getElementById(id);
const FILES = "files" in document.documentElement.dataset;
const PART = 1024, EDGE = 64, ACROSS = 32; // spots in a file, pixels of a patch, patches in a row
const state = { slide: null, spot: null, area: null, level: 0, two: false };
let cohort = null;
let panes = [];

const waiting = new Map(); // address of a script -> what takes its value
window.hibioFile = (value) => waiting.get(document.currentScript.src)(value);
const read = new Map();

function file(path) {
  if (!read.has(path))
    read.set(path, new Promise((done, fail) => {
      const script = document.createElement("script");
      script.src = `data/${path}.js`;
      waiting.set(script.src, done);
      script.onerror = () => fail(new Error(`${path}: this file is missing in the export`));
      document.head.append(script);
    }));
  return read.get(path);
}

async function ask(path, options) {
  let words = "", done = false;
  const waiting = setInterval(async () => { // what the server does meanwhile
    const doing = await fetch("data/doing.json").then((told) => told.json()).catch(() => []);
    if (doing.length && !done) tell(words = doing.join("; "));
  }, 1000);
  try {
    const answer = await fetch(`data/${path}`, options);
    if (answer.ok) return answer;
    const told = await answer.json().catch(() => ({ error: `${answer.status} ${answer.statusText}` }));
    throw new Error(told.error);
  } finally {
    done = true; // what is still on its way comes too late
    clearInterval(waiting);
    if (words && $("status").textContent === words) tell("");
  }
}

const json = async (path, options) => (await ask(path, options)).json();
const of = (slide) => `slides/${encodeURIComponent(slide)}`;
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
const regionsOf = (n, buffer) => ({ codes: new Uint32Array(buffer, 0, n), outlines: new Float32Array(buffer, 4 * n) });

const server = {
  cohort: () => json("cohort.json"),
  async slide(id) {
    const facts = await json(`${of(id)}/slide.json`), places = await ask(`${of(id)}/places`);
    return { ...facts, xy: new Float32Array(await places.arrayBuffer()) };
  },
  regions: async (id, level) => regionsOf(state.slide.spots, await (await ask(`${of(id)}/regions/${level}`)).arrayBuffer()),
  tile: (id, level, x, y) => `data/${of(id)}/tiles/${level}/${x}_${y}.jpg`,
  async heat(id, name, kind) {
    const answer = await ask(`${of(id)}/heat?${new URLSearchParams({ q: name, kind })}`);
    const values = new Float32Array(await answer.arrayBuffer());
    return { values, about: JSON.parse(answer.headers.get("hibio-about")) };
  },
  spot: (id, i) => json(`${of(id)}/spots/${i}.json`),
  within: (id, i) => json(`${of(id)}/within/${i}.json`),
  near: (id, i, by) => json(`${of(id)}/near/${by}/${i}.json`),
  patch(id, i, px) {
    const made = blank(px);
    made.style.backgroundImage = `url("data/${of(id)}/patches/${i}.jpg")`;
    made.style.backgroundSize = "100%";
    return made;
  },
  area: (id, spots) => json(`${of(id)}/area`, { method: "POST", body: JSON.stringify({ spots }) }),
};

const files = {
  cohort: () => file("cohort"),
  slide: (id) => file(`${of(id)}/slide`),
  regions: async (id, level) => regionsOf(state.slide.spots, bytes(await file(`${of(id)}/regions/${level}`))),
  tile: server.tile,
  async heat(id, name, kind) {
    const found = await file(`${of(id)}/${kind}`);
    if (name in found.missing) throw new Error(found.missing[name]);
    const row = found.names.indexOf(name), n = state.slide.spots;
    if (row < 0)
      throw new Error(`${name} was not exported; there are ${cohort.exported.slice(0, 8).join(", ")}${cohort.exported.length > 8 ? " ..." : ""}`);
    found.all = found.all || new Float32Array(bytes(found.values));
    return { values: found.all.subarray(row * n, (row + 1) * n), about: found.about[name] };
  },
  spot: async (id, i) => (await file(`${of(id)}/spots/${Math.floor(i / PART)}`))[i % PART],
  within: async (id, i) => (await files.spot(id, i)).within,
  near: async (id, i, by) => (await files.spot(id, i))[`near_${by}`],
  patch(id, i, px) {
    const made = blank(px), k = i % PART, unit = px / EDGE;
    made.style.backgroundImage = `url("data/${of(id)}/spots/${Math.floor(i / PART)}.jpg")`;
    made.style.backgroundSize = `${ACROSS * EDGE * unit}px auto`;
    made.style.backgroundPosition = `${-(k % ACROSS) * px}px ${-Math.floor(k / ACROSS) * px}px`;
    return made;
  },
  async area(id, spots) {
    const facts = cohort.slides.find((one) => one.id === id);
    const kind = facts.counts ? "measured" : "predicted", inside = new Set(spots);
    const answer = { kind, spots: spots.length };
    for (const [part, of] of [["genes", "gene"], ["sets", "gene set"]]) {
      const columns = { name: [], inside: [], outside: [], sd: [] };
      for (const name of cohort.exported) {
        const { values, about } = await files.heat(id, name, kind);
        if (about.of !== of) continue;
        let within = 0, total = 0, square = 0;
        values.forEach((v, i) => { total += v; square += v * v; if (inside.has(i)) within += v; });
        const n = values.length, k = inside.size;
        columns.name.push(name);
        columns.inside.push(within / k);
        columns.outside.push(n > k ? (total - within) / (n - k) : null);
        columns.sd.push(Math.sqrt(Math.max(square / n - (total / n) ** 2, 0)));
      }
      answer[part] = columns;
    }
    return answer;
  },
};
const source = FILES ? files : server;
