// Spots and outlines over a deep zoom: WebGL 2, or a 2D canvas where there is none.
"use strict";

const VERSION = "#version 300 es\n";
const SPOT_SHAPE = VERSION + `
in vec2 corner; in vec2 place; in vec4 colour;
uniform vec3 view; uniform vec2 size; uniform float radius;
out vec2 at; out vec4 paint;
void main() {
  at = corner; paint = colour;
  vec2 p = view.xy + view.z * place + corner * radius;
  gl_Position = vec4(p.x / size.x * 2.0 - 1.0, 1.0 - p.y / size.y * 2.0, 0.0, 1.0);
}`;
const SPOT_PAINT = VERSION + `
precision mediump float;
in vec2 at; in vec4 paint; uniform float opacity; out vec4 ink;
void main() {
  if (dot(at, at) > 1.0) discard;
  float a = paint.a * opacity;
  ink = vec4(paint.rgb * a, a);
}`;
const LINE_SHAPE = VERSION + `
in vec2 corner; in vec4 segment;
uniform vec3 view; uniform vec2 size; uniform float radius;
void main() {
  vec2 a = view.xy + view.z * segment.xy, b = view.xy + view.z * segment.zw, d = b - a;
  vec2 n = length(d) > 0.0 ? normalize(vec2(-d.y, d.x)) : vec2(0.0);
  vec2 p = mix(a, b, corner.x * 0.5 + 0.5) + n * corner.y * radius;
  gl_Position = vec4(p.x / size.x * 2.0 - 1.0, 1.0 - p.y / size.y * 2.0, 0.0, 1.0);
}`;
const LINE_PAINT = VERSION + `
precision mediump float;
uniform vec4 paint; out vec4 ink;
void main() { ink = vec4(paint.rgb * paint.a, paint.a); }`;
const LINES = [[2.2, [1, 1, 1, 0.9]], [1.0, [0.05, 0.05, 0.05, 1]]]; // half width in pixels, ink

class Layer {
  constructor(canvas) {
    this.canvas = canvas;
    this.gl = canvas.getContext("webgl2", { antialias: true });
    this.kind = this.gl ? "webgl" : "canvas";
    this.spots = 0;
    this.segments = 0;
    if (this.gl) this.start();
    else this.flat = canvas.getContext("2d");
    canvas.dataset.drawn = this.kind;
  }

  start() {
    const gl = this.gl;
    const program = (shape, paint) => {
      const made = gl.createProgram();
      for (const [type, text] of [[gl.VERTEX_SHADER, shape], [gl.FRAGMENT_SHADER, paint]]) {
        const shader = gl.createShader(type);
        gl.shaderSource(shader, text);
        gl.compileShader(shader);
        gl.attachShader(made, shader);
      }
      gl.linkProgram(made);
      if (!gl.getProgramParameter(made, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(made));
      return made;
    };
    this.corner = gl.createBuffer();
    gl.bindBuffer(gl.ARRAY_BUFFER, this.corner);
    gl.bufferData(gl.ARRAY_BUFFER, new Float32Array([-1, -1, 1, -1, -1, 1, 1, 1]), gl.STATIC_DRAW);
    this.spotProgram = program(SPOT_SHAPE, SPOT_PAINT);
    this.lineProgram = program(LINE_SHAPE, LINE_PAINT);
    this.buffers = Object.fromEntries(["place", "colour", "segment"].map((n) => [n, gl.createBuffer()]));
    this.spotArray = this.arrays(this.spotProgram, [["place", 2, gl.FLOAT], ["colour", 4, gl.UNSIGNED_BYTE]]);
    this.lineArray = this.arrays(this.lineProgram, [["segment", 4, gl.FLOAT]]);
  }

  arrays(program, instanced) {
    const gl = this.gl, made = gl.createVertexArray();
    gl.bindVertexArray(made);
    const add = (name, buffer, n, type, each) => {
      const place = gl.getAttribLocation(program, name);
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      gl.enableVertexAttribArray(place);
      gl.vertexAttribPointer(place, n, type, type !== gl.FLOAT, 0, 0);
      gl.vertexAttribDivisor(place, each);
    };
    add("corner", this.corner, 2, gl.FLOAT, 0);
    for (const [name, n, type] of instanced) add(name, this.buffers[name], n, type, 1);
    gl.bindVertexArray(null);
    return made;
  }

  fill(name, values) {
    if (!this.gl) return;
    this.gl.bindBuffer(this.gl.ARRAY_BUFFER, this.buffers[name]);
    this.gl.bufferData(this.gl.ARRAY_BUFFER, values, this.gl.DYNAMIC_DRAW);
  }

  // places: (x, y) of every spot; colours: R, G, B, A of every spot.
  setPlaces(places) {
    this.places = places;
    this.spots = 0;
    this.fill("place", places);
  }

  setColours(colours) {
    this.colours = colours;
    this.spots = colours ? colours.length / 4 : 0;
    if (colours) this.fill("colour", colours);
  }

  // outlines: closed rings, each (x, y, x, y, ...).
  setOutlines(outlines) {
    this.outlines = outlines;
    const n = outlines.reduce((sum, ring) => sum + ring.length / 2 - 1, 0);
    const segments = new Float32Array(n * 4);
    let at = 0;
    for (const ring of outlines)
      for (let i = 0; i + 3 < ring.length; i += 2)
        for (let j = 0; j < 4; j++) segments[at++] = ring[i + j];
    this.segments = n;
    this.fill("segment", segments);
  }

  // view: x, y of the origin in pixels of the page, and pixels per unit; radius in units.
  draw(view, radius, opacity) {
    const ratio = window.devicePixelRatio || 1;
    const width = this.canvas.clientWidth, height = this.canvas.clientHeight;
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
    }
    const least = Math.max(radius * view[2], 1);
    if (this.gl) this.drawGl(view, [width, height], least, opacity);
    else this.drawFlat(view, ratio, least, opacity);
  }

  drawGl(view, size, radius, opacity) {
    const gl = this.gl;
    gl.viewport(0, 0, this.canvas.width, this.canvas.height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    const use = (program, array, half) => {
      const at = (name) => gl.getUniformLocation(program, name);
      gl.useProgram(program);
      gl.bindVertexArray(array);
      gl.uniform3fv(at("view"), view);
      gl.uniform2fv(at("size"), size);
      gl.uniform1f(at("radius"), half);
      return at;
    };
    if (this.spots) {
      gl.uniform1f(use(this.spotProgram, this.spotArray, radius)("opacity"), opacity);
      gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, this.spots);
    }
    if (this.segments)
      for (const [half, ink] of LINES) {
        gl.uniform4fv(use(this.lineProgram, this.lineArray, half)("paint"), ink);
        gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, this.segments);
      }
    gl.bindVertexArray(null);
  }

  drawFlat(view, ratio, radius, opacity) {
    const to = this.flat, [left, top, k] = view;
    to.setTransform(ratio, 0, 0, ratio, 0, 0);
    to.clearRect(0, 0, this.canvas.width, this.canvas.height);
    for (let i = 0; i < this.spots; i++) {
      const c = this.colours;
      to.fillStyle = `rgba(${c[4 * i]},${c[4 * i + 1]},${c[4 * i + 2]},${(c[4 * i + 3] / 255) * opacity})`;
      to.beginPath();
      to.arc(left + k * this.places[2 * i], top + k * this.places[2 * i + 1], radius, 0, 7);
      to.fill();
    }
    for (const [half, ink] of this.segments ? LINES : []) {
      to.lineWidth = 2 * half;
      to.strokeStyle = `rgba(${ink.slice(0, 3).map((v) => 255 * v)},${ink[3]})`;
      to.beginPath();
      for (const ring of this.outlines)
        for (let i = 0; i < ring.length; i += 2)
          to[i ? "lineTo" : "moveTo"](left + k * ring[i], top + k * ring[i + 1]);
      to.stroke();
    }
  }
}
