// A panel, layer x expert or layer x EP group, as a heat map on a canvas, one pixel-sharp rectangle a cell.

import { element, number } from "./text.js";

// Dark blue to yellow: rising lightness, so that it reads without colour vision too.
const STOPS = [[35, 32, 90], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

function colour(share) {
  const place = Math.min(1, Math.max(0, share)) * (STOPS.length - 1);
  const [from, to] = [STOPS[Math.floor(place)], STOPS[Math.ceil(place)]];
  return from.map((part, i) => part + (to[i] - part) * (place % 1));
}

export function median(values) {
  const sorted = values.filter((value) => value !== null).sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

export class HeatMap {
  constructor(name) {
    this.name = name;
    this.canvas = element("canvas", { tabindex: 0, role: "img" });
    this.caption = element("figcaption", { "aria-live": "polite" });
    this.ends = [element("span"), element("span")];
    const bar = element("i");
    bar.style.background = `linear-gradient(90deg, ${STOPS.map((stop) => `rgb(${stop})`).join(", ")})`;
    const legend = element("div", { class: "legend" }, this.ends[0], bar, this.ends[1]);
    this.figure = element("figure", {}, element("h3", {}, name), this.canvas, legend, this.caption);
    this.figure.dataset.panel = name;
    this.cell = null;
    this.canvas.addEventListener("pointermove", (event) => this.over(event));
    this.canvas.addEventListener("pointerleave", () => this.read(null));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  // `panel` is { column, rows, low, high }; `shade` is "value" or "ratio" (to the layer's median).
  draw(panel, layers, { shade, fixed }) {
    this.layers = layers;
    this.column = panel.column;
    this.raw = panel.rows;
    this.ratio = shade === "ratio";
    this.rows = this.ratio ? panel.rows.map(overMedian) : panel.rows;
    const [low, high] = this.range(panel, fixed);
    this.ends.forEach((end, i) => { end.textContent = (this.ratio ? "×" : "") + number([low, high][i]); });
    const [width, height] = [Math.max(...this.rows.map((row) => row.length)), this.rows.length];
    Object.assign(this.canvas, { width, height });
    this.canvas.style.height = `${Math.min(22, Math.max(4, 300 / height)) * height}px`;
    const image = this.canvas.getContext("2d").createImageData(width, height);
    this.rows.forEach((row, y) => row.forEach((value, x) => {
      const paint = value === null ? [214, 64, 79] : colour(high > low ? (value - low) / (high - low) : 0.5);
      image.data.set([...paint, 255], 4 * (y * width + x));
    }));
    this.canvas.getContext("2d").putImageData(image, 0, 0);
    this.read(this.cell);
  }

  // Ratios always run from 0 to 2 or more: 1 is healthy, and a dead expert (0) must stand out.
  range(panel, fixed) {
    const values = this.rows.flat().filter((value) => value !== null);
    const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    if (this.ratio) return [0, Math.max(2, high)];
    if (fixed && panel.low !== null) return [panel.low, panel.high];
    return [values.reduce((a, b) => Math.min(a, b), Infinity), high];
  }

  read(cell) {
    this.cell = cell;
    const [y, x] = cell ?? [];
    const value = cell && this.rows[y]?.[x];
    const where = cell && `layer ${this.layers?.[y] ?? `${y + 1} of those with experts`}, ${this.column} ${x}`;
    this.caption.textContent = value === undefined || !cell ? `${this.rows.length} layers × ${this.rows[0].length} ${this.column}s`
      : `${where}: ${number(this.raw[y][x])}${this.ratio ? ` (×${number(value)} of the median)` : ""}`;
    this.canvas.setAttribute("aria-label", `${this.name}: ${this.caption.textContent}`);
  }

  over(event) {
    const box = this.canvas.getBoundingClientRect();
    const place = (offset, size, count) => Math.min(count - 1, Math.max(0, Math.floor(offset / size * count)));
    this.read([place(event.clientY - box.top, box.height, this.rows.length),
      place(event.clientX - box.left, box.width, this.rows[0].length)]);
  }

  key(event) {
    const turns = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!(event.key in turns)) return;
    const [down, right] = turns[event.key];
    const [y, x] = this.cell ?? [0, -right];
    const limit = (value, count) => Math.min(count - 1, Math.max(0, value));
    this.read([limit(y + (this.cell ? down : 0), this.rows.length), limit(x + right, this.rows[0].length)]);
    event.preventDefault();
  }
}

function overMedian(row) {
  const middle = median(row);
  return row.map((value) => (value === null || !(middle > 0) ? null : value / middle));
}
