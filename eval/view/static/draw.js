// Spots and outlines over a deep zoom: WebGL 2, or a 2D canvas where there is none.
"use strict";

// What is drawn lies in textures, filled once a slide or heatmap, whose cells a vertex finds by its
// own number: no work a spot and frame in JavaScript, and no instances, which are a call each where
// the processor draws. A small spot is one vertex, a large one and a piece of outline are six.
const CELLS = 2048; // in a row of a texture
const TEXTURES = { // values a cell, and what WebGL calls them
  places: [2, "RG32F", "RG", "FLOAT"],
  levels: [1, "R8UI", "RED_INTEGER", "UNSIGNED_BYTE"],
  palette: [4, "RGBA", "RGBA", "UNSIGNED_BYTE"],
  segments: [4, "RGBA32F", "RGBA", "FLOAT"],
};
const HEAD = `#version 300 es
precision highp float; precision highp sampler2D; precision highp usampler2D;
uniform vec3 view; uniform vec2 size; uniform float radius;
const vec2 CORNERS[6] = vec2[](vec2(-1, -1), vec2(1, -1), vec2(-1, 1), vec2(-1, 1), vec2(1, -1), vec2(1, 1));
ivec2 cell(int i) { return ivec2(i % ${CELLS}, i / ${CELLS}); }
vec4 onto(vec2 p) { return vec4(p.x / size.x * 2.0 - 1.0, 1.0 - p.y / size.y * 2.0, 0.0, 1.0); }
vec4 inked(vec4 paint, float far) { // its edge is half a pixel on either side
  float a = paint.a * clamp(radius + 0.5 - far, 0.0, 1.0);
  return vec4(paint.rgb * a, a);
}`;
const SPOT_SHAPE = `${HEAD}
uniform sampler2D places, palette; uniform usampler2D levels; uniform bool points;
out vec2 at; out vec4 paint;
void main() {
  int i = points ? gl_VertexID : gl_VertexID / 6;
  at = points ? vec2(0) : CORNERS[gl_VertexID % 6] * (radius + 0.5);
  paint = texelFetch(palette, ivec2(texelFetch(levels, cell(i), 0).r, 0), 0);
  gl_Position = onto(view.xy + view.z * texelFetch(places, cell(i), 0).xy + at);
  gl_PointSize = 2.0 * radius + 1.0;
}`;
const SPOT_PAINT = `${HEAD}
uniform bool points; uniform float opacity; in vec2 at; in vec4 paint; out vec4 ink;
void main() {
  vec2 off = points ? (gl_PointCoord - 0.5) * (2.0 * radius + 1.0) : at;
  ink = inked(paint, length(off)) * opacity;
}`;
const LINE_SHAPE = `${HEAD}
uniform sampler2D segments; out float off;
void main() {
  vec4 ends = view.xyxy + view.z * texelFetch(segments, cell(gl_VertexID / 6), 0);
  vec2 along = ends.zw - ends.xy, corner = CORNERS[gl_VertexID % 6];
  vec2 aside = length(along) > 0.0 ? normalize(vec2(-along.y, along.x)) : vec2(0);
  off = corner.y * (radius + 0.5);
  gl_Position = onto((corner.x < 0.0 ? ends.xy : ends.zw) + aside * off);
}`;
const LINE_PAINT = `${HEAD}
uniform vec4 paint; in float off; out vec4 ink;
void main() { ink = inked(paint, abs(off)); }`;
const LINES = [[2.2, [1, 1, 1, 0.9]], [1.0, [0.05, 0.05, 0.05, 1]]]; // half width in pixels, ink

class Layer {
  constructor(canvas) {
    this.canvas = canvas;
    this.gl = canvas.getContext("webgl2", { antialias: false });
    this.kind = this.gl ? "webgl" : "canvas";
    this.spots = 0;
    this.segments = 0;
    if (this.gl) this.start();
    else this.flat = canvas.getContext("2d");
    canvas.dataset.drawn = this.kind;
  }

  start() {
    const gl = this.gl;
    this.largest = gl.getParameter(gl.ALIASED_POINT_SIZE_RANGE)[1];
    Object.keys(TEXTURES).forEach((name, unit) => {
      gl.activeTexture(gl.TEXTURE0 + unit);
      gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
      for (const side of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER])
        gl.texParameteri(gl.TEXTURE_2D, side, gl.NEAREST);
    });
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    this.spotProgram = this.program(SPOT_SHAPE, SPOT_PAINT);
    this.lineProgram = this.program(LINE_SHAPE, LINE_PAINT);
  }

  program(shape, paint) {
    const gl = this.gl, made = gl.createProgram();
    for (const [type, text] of [[gl.VERTEX_SHADER, shape], [gl.FRAGMENT_SHADER, paint]]) {
      const shader = gl.createShader(type);
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      gl.attachShader(made, shader);
    }
    gl.linkProgram(made);
    if (!gl.getProgramParameter(made, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(made));
    gl.useProgram(made);
    Object.keys(TEXTURES).forEach((name, unit) => gl.uniform1i(gl.getUniformLocation(made, name), unit));
    return made;
  }

  fill(name, values) {
    const gl = this.gl, [n, kept, form, type] = TEXTURES[name];
    if (!gl) return;
    const rows = Math.ceil(values.length / n / CELLS) || 1, whole = new values.constructor(rows * CELLS * n);
    whole.set(values);
    gl.activeTexture(gl.TEXTURE0 + Object.keys(TEXTURES).indexOf(name));
    gl.texImage2D(gl.TEXTURE_2D, 0, gl[kept], CELLS, rows, 0, gl[form], gl[type], whole);
  }

  // places: (x, y) of every spot.
  setPlaces(places) {
    this.places = places;
    this.spots = 0;
    this.fill("places", places);
  }

  // levels: place in the palette, a byte for every spot, or null; palette: R, G, B, A of each level.
  setColours(levels, palette) {
    Object.assign(this, { levels, palette, spots: levels ? levels.length : 0 });
    if (!levels) return;
    this.fill("levels", levels);
    this.fill("palette", palette);
  }

  // segments: the pieces of the outlines, (x, y) from and (x, y) to of each.
  setOutlines(segments) {
    this.outlines = segments;
    this.segments = segments.length / 4;
    this.fill("segments", segments);
  }

  // view: x, y of the origin in pixels of the page, and pixels per unit; radius in units.
  draw(view, radius, opacity) {
    const ratio = window.devicePixelRatio || 1, canvas = this.canvas;
    for (const [side, long] of [["width", canvas.clientWidth], ["height", canvas.clientHeight]])
      if (canvas[side] !== Math.round(long * ratio)) canvas[side] = Math.round(long * ratio);
    const scaled = view.map((one) => one * ratio), least = Math.max(radius * scaled[2], ratio);
    this[this.gl ? "drawGl" : "drawFlat"](scaled, least, opacity, ratio);
  }

  drawGl(view, radius, opacity, ratio) { // from here on in pixels of the canvas
    const gl = this.gl, size = [this.canvas.width, this.canvas.height];
    const points = 2 * radius + 1 <= Math.min(this.largest, 64); // some drop one whose middle is out of sight
    gl.viewport(0, 0, ...size);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    const run = (program, kind, vertices, given) => {
      gl.useProgram(program);
      for (const [name, value] of Object.entries({ view, size, ...given }))
        gl[`uniform${value.length}fv`](gl.getUniformLocation(program, name), value);
      gl.drawArrays(kind, 0, vertices);
    };
    if (this.spots)
      run(this.spotProgram, points ? gl.POINTS : gl.TRIANGLES, this.spots * (points ? 1 : 6),
        { radius: [radius], opacity: [opacity], points: [+points] });
    for (const [half, paint] of this.segments ? LINES : [])
      run(this.lineProgram, gl.TRIANGLES, 6 * this.segments, { radius: [half * ratio], paint });
  }

  drawFlat([left, top, k], radius, opacity, ratio) {
    const to = this.flat, { places, levels, palette, outlines } = this;
    to.clearRect(0, 0, this.canvas.width, this.canvas.height);
    for (let i = 0; i < this.spots; i++) {
      const [r, g, b, a] = palette.subarray(4 * levels[i], 4 * levels[i] + 4);
      to.fillStyle = `rgba(${r},${g},${b},${(a / 255) * opacity})`;
      to.beginPath();
      to.arc(left + k * places[2 * i], top + k * places[2 * i + 1], radius, 0, 7);
      to.fill();
    }
    to.lineCap = "round";
    for (const [half, ink] of this.segments ? LINES : []) {
      to.lineWidth = 2 * half * ratio;
      to.strokeStyle = `rgba(${ink.slice(0, 3).map((v) => 255 * v)},${ink[3]})`;
      to.beginPath();
      for (let i = 0; i < outlines.length; i += 2)
        to[i % 4 ? "lineTo" : "moveTo"](left + k * outlines[i], top + k * outlines[i + 1]);
      to.stroke();
    }
  }
}
