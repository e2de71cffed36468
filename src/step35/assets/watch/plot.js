// One chart of one metric family, as SVG: lines, bands from low to high, alarms, read-out, zoom.
// A series is { name, colour, dash, first, last?, mean, low?, high?, bad } with one entry a bucket of steps.

import { brief, element, number } from "./text.js";

const NAMESPACE = "http://www.w3.org/2000/svg";
const [HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [176, 46, 6, 8, 18];
const KEY_ZOOM = 2;
const SMOOTH_POINTS = 400;

function svg(name, attributes, parent) {
  const made = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent?.append(made);
  return made;
}

// Exponential moving average, corrected for its start; a gap stays a gap. `strength` from 0 to 1 is the weight of the
// past when a curve has SMOOTH_POINTS points: a curve of fewer is smoothed over the same share of the chart.
export function smoothed(values, strength) {
  const weight = strength ** (SMOOTH_POINTS / values.length);
  let [average, mass] = [0, 0];
  return values.map((value) => {
    if (value === null) return null;
    average = weight * average + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return average / mass;
  });
}

// About `count` round numbers from low to high; powers of ten on a log scale that spans at least two.
export function ticks(low, high, count, log = false) {
  if (log && high / low >= 100) {
    const every = Math.ceil(Math.log10(high / low) / count);
    const found = [];
    for (let power = Math.ceil(Math.log10(low)); 10 ** power <= high; power += every) found.push(10 ** power);
    return found;
  }
  const rough = (high - low) / count;
  const scale = 10 ** Math.floor(Math.log10(rough));
  const step = scale * [1, 2, 5, 10].find((factor) => factor * scale >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) found.push(Number((n * step).toPrecision(12)));
  return found;
}

export class Chart {
  // `act` has zoom(first, last) and point(step or null), shared by all charts.
  constructor(family, act) {
    this.act = act;
    this.svg = svg("svg", { tabindex: 0, role: "img" });
    this.caption = element("figcaption", { "aria-live": "off" });
    this.figure = element("figure", {}, element("h3", {}, family), this.svg, this.caption);
    this.figure.dataset.family = family;
    this.family = family;
    this.listen();
  }

  draw(series, options) {
    this.series = series.filter((one) => one.first.length);
    this.options = options;
    this.width = Math.max(this.svg.clientWidth, LEFT + RIGHT + 1);
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.svg.replaceChildren();
    this.scales();
    this.grid();
    for (const step of options.alarms) if (step >= this.x0 && step <= this.x1) this.vertical(step, "alarm");
    for (const one of this.series) this.line(one);
    this.cursorLine = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" }, this.svg);
    this.selection = svg("rect", { class: "selection", y: TOP, height: HEIGHT - TOP - BOTTOM, visibility: "hidden" }, this.svg);
    this.point(options.cursor);
  }

  scales() {
    const steps = this.series.flatMap((one) => [one.first[0], (one.last ?? one.first).at(-1)]);
    [this.x0, this.x1] = [Math.min(...steps, Infinity), Math.max(...steps, -Infinity)];
    if (!(this.x1 > this.x0)) [this.x0, this.x1] = Number.isFinite(this.x0) ? [this.x0 - 1, this.x0 + 1] : [0, 1];
    const values = this.series.flatMap((one) => [...one.mean, ...(one.low ?? []), ...(one.high ?? [])]);
    const positive = values.filter((value) => value > 0);
    this.log = this.options.log && positive.length > 0;
    const shown = this.log ? positive : values.filter((value) => value !== null);
    let [low, high] = shown.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    if (!Number.isFinite(low)) [low, high] = [0, 1];
    if (low === high) [low, high] = this.log ? [low / 2, high * 2] : [low - (Math.abs(low) / 10 || 1), high + (Math.abs(high) / 10 || 1)];
    [this.y0, this.y1] = [low, high];
  }

  x(step) {
    return LEFT + (step - this.x0) / (this.x1 - this.x0) * (this.width - LEFT - RIGHT);
  }

  y(value) {
    const share = this.log ? Math.log(value / this.y0) / Math.log(this.y1 / this.y0) : (value - this.y0) / (this.y1 - this.y0);
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM);
  }

  grid() {
    for (const value of ticks(this.y0, this.y1, 4, this.log)) {
      const y = this.y(value);
      svg("line", { class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: y, y2: y }, this.svg);
      svg("text", { x: LEFT - 4, y: y + 3, "text-anchor": "end" }, this.svg).textContent = brief(value);
    }
    for (const step of ticks(this.x0, this.x1, 5)) {
      if (!Number.isInteger(step)) continue;
      svg("text", { x: this.x(step), y: HEIGHT - 5, "text-anchor": "middle" }, this.svg).textContent = brief(step);
    }
  }

  vertical(step, kind) {
    svg("line", { class: kind, x1: this.x(step), x2: this.x(step), y1: TOP, y2: HEIGHT - BOTTOM }, this.svg);
  }

  line(one) {
    const style = { stroke: one.colour, "stroke-dasharray": one.dash };
    if (one.low) svg("path", { class: "band", fill: one.colour, d: this.band(one) }, this.svg);
    const means = smoothed(one.mean, this.options.smooth);
    if (this.options.smooth && !one.low) svg("path", { ...style, class: "raw", d: this.path(one, one.mean) }, this.svg);
    svg("path", { ...style, class: "line", d: this.path(one, means) }, this.svg);
    for (const step of one.bad) {
      const mark = svg("text", { class: "bad-value", x: this.x(step), y: TOP + 8, "text-anchor": "middle" }, this.svg);
      mark.textContent = "×";
    }
  }

  // A gap where there is no value; a value alone between gaps becomes a dot (round caps draw a line of no length).
  path(one, values) {
    let [text, pen] = ["", "M"];
    values.forEach((value, i) => {
      if (value === null || (this.log && value <= 0)) { pen = "M"; return; }
      const [x, y] = [this.x(one.first[i]).toFixed(1), this.y(value).toFixed(1)];
      text += pen === "M" ? `M${x} ${y}h0.01` : `L${x} ${y}`;
      pen = "L";
    });
    return text;
  }

  band(one) {
    const floor = (value) => this.y(this.log ? Math.max(value, this.y0) : value).toFixed(1);
    return one.mean.map((value, i) => {
      if (value === null) return "";
      const [left, right] = [this.x(one.first[i]), Math.max(this.x(one.last[i]), this.x(one.first[i]) + 0.7)];
      return `M${left.toFixed(1)} ${floor(one.low[i])}H${right.toFixed(1)}V${floor(one.high[i])}H${left.toFixed(1)}Z`;
    }).join("");
  }

  // Shows the read-out at `step`, or the last values when it is null.
  point(step) {
    this.cursor = step;
    const shown = step !== null && step >= this.x0 && step <= this.x1;
    this.cursorLine.setAttribute("visibility", shown ? "visible" : "hidden");
    if (shown) for (const end of ["x1", "x2"]) this.cursorLine.setAttribute(end, this.x(step));
    this.caption.replaceChildren(...this.series.map((one) => this.readOut(one, shown ? step : Infinity)));
    this.svg.setAttribute("aria-label", `${this.family}: ${this.caption.textContent}`);
  }

  readOut(one, step) {
    const i = bucketAt(one, step);
    const steps = one.last && one.last[i] > one.first[i] ? `${number(one.first[i])}–${number(one.last[i])}` : number(one.first[i]);
    const range = one.low && one.mean[i] !== null ? ` (${number(one.low[i])} to ${number(one.high[i])})` : "";
    const text = element("span", {}, `${one.name ? `${one.name}: ` : ""}${number(one.mean[i])}${range} at ${steps}`);
    text.style.color = one.colour;
    return text;
  }

  stepAt(event) {
    const box = this.svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * this.width - LEFT) / (this.width - LEFT - RIGHT);
    return Math.round(this.x0 + Math.min(1, Math.max(0, share)) * (this.x1 - this.x0));
  }

  listen() {
    let from = null;
    this.svg.addEventListener("pointerdown", (event) => {
      from = this.stepAt(event);
      this.svg.setPointerCapture(event.pointerId);
    });
    this.svg.addEventListener("pointermove", (event) => {
      const step = this.stepAt(event);
      this.act.point(step);
      if (from !== null) this.select(Math.min(from, step), Math.max(from, step));
    });
    this.svg.addEventListener("pointerup", (event) => {
      const to = this.stepAt(event);
      if (from !== null && Math.abs(this.x(to) - this.x(from)) > 8) this.act.zoom(Math.min(from, to), Math.max(from, to));
      from = null;
      this.selection.setAttribute("visibility", "hidden");
    });
    this.svg.addEventListener("pointercancel", () => { from = null; });
    this.svg.addEventListener("pointerleave", () => { if (from === null) this.act.point(null); });
    this.svg.addEventListener("dblclick", () => this.act.zoom(null, null));
    this.svg.addEventListener("focus", () => this.caption.setAttribute("aria-live", "polite"));
    this.svg.addEventListener("blur", () => this.caption.setAttribute("aria-live", "off"));
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  select(first, last) {
    this.selection.setAttribute("visibility", "visible");
    this.selection.setAttribute("x", this.x(first));
    this.selection.setAttribute("width", this.x(last) - this.x(first));
  }

  key(event) {
    const one = this.series[0];
    const turns = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (!one || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in turns) {
      const place = bucketAt(one, this.cursor ?? Infinity) + turns[event.key];
      this.act.point(one.first[Math.min(one.first.length - 1, Math.max(0, place))]);
    } else if (event.key === "+" || event.key === "=" || event.key === "-") {
      const centre = this.cursor ?? this.x1;
      const half = (this.x1 - this.x0) / 2 * (event.key === "-" ? KEY_ZOOM : 1 / KEY_ZOOM);
      this.act.zoom(Math.max(0, Math.round(centre - half)), Math.round(centre + half));
    } else if (event.key === "0" || event.key === "Escape") {
      this.act.point(null);
      this.act.zoom(null, null);
    } else {
      return;
    }
    event.preventDefault();
  }
}

// The last bucket that begins at or before `step`.
function bucketAt(one, step) {
  let [low, high] = [0, one.first.length - 1];
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (one.first[middle] <= step) low = middle; else high = middle - 1;
  }
  return low;
}
