"use strict";
// Curves over images seen. All charts of a page share `view`, the part of the run that is shown.
const COLORS = ["#2256a8", "#e08a1e", "#4b9b6c", "#a8518a", "#7a7f89"];
const PAD = { left: 64, right: 12, top: 8, bottom: 24 };
const HEIGHT = 210;

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e12 || (size > 0 && size < 1e-3)) return value.toExponential(1).replace("e+", "e");
  for (const [unit, name] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit) return +(value / unit).toPrecision(4) + name;
  }
  return String(+value.toPrecision(4));
}

function spoken(value, unit) {
  if (value === null || value === undefined) return "not finite";
  if (unit === "share") return +(100 * value).toPrecision(3) + " %";
  if (unit === "bytes") return +(value / 1e9).toPrecision(3) + " GB";
  return short(value);
}

// Values at round places between two numbers.
function ticks(low, high, count, logarithmic) {
  const found = [];
  if (logarithmic) {
    const from = Math.floor(Math.log10(low)), to = Math.ceil(Math.log10(high));
    const factors = to - from > 3 ? [1] : high / low > 4 ? [1, 2, 5] : [1, 2, 3, 4, 5, 6, 7, 8, 9];
    for (let k = from; k <= to; k++) for (const f of factors) found.push(+(f * 10 ** k).toPrecision(1));
  }
  if (!logarithmic || high / low < 1.5) {
    const rough = (high - low) / count, base = 10 ** Math.floor(Math.log10(rough));
    const step = base * [1, 2, 5, 10].find((f) => f * base >= rough);
    for (let k = Math.ceil(low / step); k * step <= high; k++) found.push(k * step);
  }
  return [...new Set(found)].filter((value) => value >= low && value <= high);
}

// Centred mean over 2 half + 1 values, of those that are there.
function smoothed(values, half) {
  const sums = [0], counts = [0];
  values.forEach((v, i) => { sums.push(sums[i] + (v ?? 0)); counts.push(counts[i] + (v === null ? 0 : 1)); });
  return values.map((_, i) => {
    const a = Math.max(0, i - half), b = Math.min(values.length, i + half + 1);
    return counts[b] > counts[a] ? (sums[b] - sums[a]) / (counts[b] - counts[a]) : null;
  });
}

class Chart {
  constructor(holder, panel, columns, events, view, redraw) {
    Object.assign(this, { panel, columns, events, view, redraw, half: 0, logarithmic: false, chosen: null });
    this.x = columns.nimg;
    holder.insertAdjacentHTML("beforeend",
      `<div class="chart"><header><h3></h3><button aria-pressed="false" title="logarithmic axis">log</button></header>
       <svg role="img"></svg><div class="keys"></div></div>`);
    this.root = holder.lastElementChild;
    this.svg = this.root.querySelector("svg");
    this.keys = this.root.querySelector(".keys");
    this.root.querySelector("h3").textContent = panel.title;
    this.svg.setAttribute("aria-label", panel.title);
    const button = this.root.querySelector("button");
    button.onclick = () => {
      this.logarithmic = !this.logarithmic;
      button.setAttribute("aria-pressed", this.logarithmic);
      this.draw();
    };
    this.listen();
  }

  listen() {
    const svg = this.svg;
    svg.addEventListener("wheel", (e) => {
      e.preventDefault();
      const at = this.image(e), factor = Math.exp(e.deltaY * 0.002);
      this.zoom(at - (at - this.view.low) * factor, at + (this.view.high - at) * factor);
    }, { passive: false });
    svg.onpointerdown = (e) => { this.from = this.image(e); svg.setPointerCapture(e.pointerId); };
    svg.onpointermove = (e) => {
      this.view.at = this.image(e);
      this.chosen = this.from === undefined ? null : [this.from, this.view.at].sort((a, b) => a - b);
      this.redraw();
    };
    svg.onpointerup = () => {
      const chosen = this.chosen, whole = this.view.high - this.view.low;
      this.from = undefined;
      this.chosen = null;
      if (chosen && chosen[1] - chosen[0] > 0.01 * whole) this.zoom(...chosen); else this.redraw();
    };
    svg.onpointerleave = () => { this.view.at = null; this.redraw(); };
    svg.ondblclick = () => this.zoom(-Infinity, Infinity);
  }

  zoom(low, high) {
    const [first, last] = this.view.whole;
    low = Math.max(first, low); high = Math.min(last, high);
    if (high - low < 1e-4 * (last - first)) return;
    Object.assign(this.view, { low, high });
    this.redraw();
  }

  image(event) {
    const box = this.svg.getBoundingClientRect(), { low, high } = this.view;
    const share = (event.clientX - box.left - PAD.left) / (box.width - PAD.left - PAD.right);
    return low + Math.min(1, Math.max(0, share)) * (high - low);
  }

  // Lowest and highest value that is in view; a spike of one row in a hundred may leave the axes.
  range(lines) {
    const seen = [], means = [];
    for (const { raw, mean } of lines) this.x.forEach((n, i) => {
      if (n < this.view.low || n > this.view.high) return;
      if (raw[i] !== null && !(this.logarithmic && raw[i] <= 0)) seen.push(raw[i]);
      if (mean[i] !== null && !(this.logarithmic && mean[i] <= 0)) means.push(mean[i]);
    });
    if (!seen.length) return null;
    seen.sort((a, b) => a - b);
    let low = seen[0], high = Math.max(seen[Math.floor(0.99 * (seen.length - 1))], ...means);
    if (this.logarithmic) return high > 1.001 * low ? [low / 1.1, high * 1.1] : [low / 2, high * 2];
    const flat = high - low <= 1e-6 * Math.abs(high);  // all the same, but for the rounding of a mean
    const room = 0.06 * (flat ? Math.abs(high) || 1 : high - low);
    return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
  }

  draw() {
    const width = this.svg.clientWidth || 460, { low, high, at } = this.view, unit = this.panel.unit;
    const lines = this.panel.series.map(([name]) => {
      const raw = this.columns[name];
      return { raw, mean: smoothed(raw, this.half) };
    });
    const range = this.range(lines), inner = HEIGHT - PAD.top - PAD.bottom;
    if (!range) { this.svg.innerHTML = ""; this.tell(null, unit); return; }
    const bend = this.logarithmic ? Math.log : (v) => v, [bottom, top] = range.map(bend);
    const X = (n) => PAD.left + (n - low) / (high - low || 1) * (width - PAD.left - PAD.right);
    const Y = (v) => PAD.top + (top - bend(v)) / (top - bottom) * inner;
    const right = width - PAD.right, floor = HEIGHT - PAD.bottom, clip = `clip${this.panel.series[0][0]}`;
    const parts = [`<clipPath id="${clip}"><rect x="${PAD.left}" y="${PAD.top}" width="${right - PAD.left + 4}"
      height="${inner}"/></clipPath>`];
    for (const v of ticks(...range, 5, this.logarithmic)) {
      parts.push(`<line class="rule" x1="${PAD.left}" x2="${right}" y1="${Y(v)}" y2="${Y(v)}"/>
        <text x="${PAD.left - 7}" y="${Y(v) + 4}" text-anchor="end">${spoken(v, unit)}</text>`);
    }
    for (const n of ticks(low, high, Math.max(2, width / 110), false)) {
      parts.push(`<text x="${X(n)}" y="${HEIGHT - 7}" text-anchor="middle">${short(n)}</text>`);
    }
    parts.push(`<g clip-path="url(#${clip})">`);
    for (const [n, what] of this.events) {
      if (n >= low && n <= high) {
        parts.push(`<line class="event" x1="${X(n)}" x2="${X(n)}" y1="${PAD.top}" y2="${floor}"><title>image ${n}:
          ${what}</title></line>`);
      }
    }
    lines.forEach(({ raw, mean }, k) => {
      const color = COLORS[k % COLORS.length];
      if (this.half) parts.push(`<path class="raw" stroke="${color}" d="${this.path(raw, X, Y)}"/>`);
      parts.push(`<path class="mean" stroke="${color}" d="${this.path(mean, X, Y)}"/>`, ...this.dots(mean, color, X, Y));
    });
    if (this.chosen) {
      const [a, b] = this.chosen.map(X);
      parts.push(`<rect class="chosen" x="${a}" width="${b - a}" y="${PAD.top}" height="${inner}"/>`);
    }
    const near = at === null ? null : this.nearest(at);
    if (near !== null) parts.push(`<line class="cursor" x1="${X(this.x[near])}" x2="${X(this.x[near])}"
      y1="${PAD.top}" y2="${floor}"/>`);
    this.svg.innerHTML = parts.join("") + "</g>";
    this.tell(near, unit);
  }

  // A value between gaps, which no line shows.
  dots(values, color, X, Y) {
    const there = (i) => (values[i] ?? null) !== null && !(this.logarithmic && values[i] <= 0);
    const alone = this.x.map((_, i) => i).filter((i) => there(i) && !there(i - 1) && !there(i + 1));
    return alone.map((i) => `<circle fill="${color}" r="3" cx="${X(this.x[i])}" cy="${Y(values[i])}"/>`);
  }

  path(values, X, Y) {
    let out = "", pen = false;
    values.forEach((v, i) => {
      if (v === null || (this.logarithmic && v <= 0)) { pen = false; return; }
      out += `${pen ? "L" : "M"}${X(this.x[i]).toFixed(1)} ${Y(v).toFixed(1)}`;
      pen = true;
    });
    return out;
  }

  nearest(image) {
    let best = null;
    this.x.forEach((n, i) => { if (best === null || Math.abs(n - image) < Math.abs(this.x[best] - image)) best = i; });
    return best;
  }

  // Names of the series, and their values under the pointer.
  tell(row, unit) {
    const several = this.panel.series.length > 1;
    this.keys.replaceChildren();
    if (row !== null) this.keys.append(`image ${this.x[row].toLocaleString("en")}`);
    this.panel.series.forEach(([name, label], k) => {
      if (!several && row === null) return;
      const entry = document.createElement("span"), mark = document.createElement("i");
      mark.style.background = COLORS[k % COLORS.length];
      if (several) entry.append(mark, label);
      if (row !== null) entry.append(` ${spoken(this.columns[name][row], unit)}`);
      this.keys.append(entry);
    });
  }
}
