"use strict";
const { choices, most } = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);
const FIRST = ["seed", "steps", "solver", "guidance"];  // the others stand under `more settings`
const SOLVERS = ["adams2", "heun", "euler"];
const WHOLE = ["seed", "steps", "passes"];

function element(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

// The settings that any of the models has, with the values of the first that has it.
const defaults = {};
for (const { settings } of choices) {
  for (const [name, value] of Object.entries(settings)) if (!(name in defaults)) defaults[name] = value;
}

function field(name) {
  const box = element("div", { className: "field" }, element("label", { textContent: name, htmlFor: name }));
  const number = (id) => element("input", { id, type: "number", step: WHOLE.includes(name) ? "1" : "any" });
  if (name === "solver") {
    box.append(element("select", { id: name }, ...SOLVERS.map((value) => new Option(value, value))));
  } else if (name === "interval") {
    const high = element("input", { id: "interval_high", type: "number", step: "any" });
    high.setAttribute("aria-label", "interval, upper end");
    box.append(element("div", { className: "pair" }, number(name), high));
    box.title = "times between which guidance acts; empty: everywhere";
  } else {
    box.append(number(name));
  }
  return box;
}

function reset() {
  for (const [name, value] of Object.entries(defaults)) {
    if (name === "interval") [by(name).value, by("interval_high").value] = value ?? ["", ""];
    else by(name).value = value;
  }
}

function asked(settings) {
  const out = new URLSearchParams();
  for (const name of Object.keys(settings)) {
    const low = by(name).value, high = name === "interval" ? by("interval_high").value : "";
    if (name === "interval") out.set(name, low || high ? `${low},${high}` : "none"); else out.set(name, low);
  }
  return out;
}

class Side {
  constructor(number) {
    this.choice = element("select", { ariaLabel: "model" },
      ...choices.map((c, k) => new Option(`${c.run} · ${c.weights}`, k)));
    this.told = element("p", { className: "told" });
    this.images = element("div", { className: "images" });
    this.link = element("a", { textContent: "save", hidden: true });
    this.root = element("section", { className: "card side" },
      element("header", {}, this.choice, this.link), this.told, this.images);
    // the second side begins with the second run, or else with the next weights of the one run
    const second = choices.findIndex((c) => c.path === 1);
    this.choice.value = number ? (second > 0 ? second : Math.min(1, choices.length - 1)) : 0;
    by("sides").append(this.root);
  }

  async draw(classes, signal) {
    const number = +this.choice.value, about = choices[number], per = +by("per_class").value;
    const there = classes.filter((k) => k < about.classes.length);
    const query = asked(about.settings);
    query.set("choice", number);
    query.set("classes", there.join(","));
    query.set("per_class", by("per_class").value);
    this.root.classList.add("busy");
    this.told.textContent = "drawing";
    try {
      const answer = await fetch(`draw?${query}`, { signal });
      if (!answer.ok) throw new Error((await answer.json()).error);
      await this.show(await answer.blob(), there, per, about);
      const nimg = Number(answer.headers.get("X-Nimg"));
      this.told.textContent = `${about.system}${nimg ? `, image ${nimg.toLocaleString("en")}` : ""}, ` +
        `${there.length * per} images in ${Number(answer.headers.get("X-Seconds")).toFixed(1)} s`;
    } catch (error) {
      this.told.textContent = signal.aborted ? "stopped" : "nothing drawn";
      if (!signal.aborted) throw error;
    } finally {
      this.root.classList.remove("busy");
    }
  }

  async show(png, classes, per, about) {
    const sheet = await createImageBitmap(png), size = about.size;
    const titled = classes.some((k) => about.classes[k].length > 4);
    this.images.classList.toggle("titled", titled);
    this.images.style.gridTemplateColumns = `${titled ? "" : "auto "}repeat(${per}, minmax(0, ${Math.max(size, 96)}px))`;
    this.images.replaceChildren();
    classes.forEach((k, row) => {
      this.images.append(element("span", { textContent: about.classes[k] }));
      for (let column = 0; column < per; column++) {
        const canvas = element("canvas", { width: size, height: size, className: size < 96 ? "small" : "" });
        canvas.getContext("2d").drawImage(sheet, column * size, row * size, size, size, 0, 0, size, size);
        canvas.onclick = () => enlarge(row * per + column);
        this.images.append(canvas);
      }
    });
    URL.revokeObjectURL(this.link.href);
    Object.assign(this.link, { href: URL.createObjectURL(png), download: `${about.run}_${about.weights}.png`,
      hidden: false });
  }
}

// The image of this number on every side that shows one.
function enlarge(number) {
  by("large").replaceChildren();
  for (const side of sides) {
    const small = side.root.hidden ? null : side.images.querySelectorAll("canvas")[number];
    if (!small) continue;
    const copy = element("canvas", { width: small.width, height: small.height, className: small.className });
    copy.getContext("2d").drawImage(small, 0, 0);
    const name = side.choice.selectedOptions[0].textContent;
    by("large").append(element("figure", {}, copy, element("figcaption", { textContent: name })));
  }
  by("dialog").showModal();
}
by("dialog").onclick = () => by("dialog").close();

// Classes are those of the model with the most of them.
const names = choices.map((c) => c.classes).reduce((a, b) => (b.length > a.length ? b : a));
names.forEach((name, k) => {
  const box = element("input", { type: "checkbox", value: k, checked: k < Math.min(4, names.length) });
  by("classes").append(element("label", { title: name }, box, name));
});
const boxes = [...by("classes").querySelectorAll("input")];
const shown = () => boxes.filter((box) => !box.parentNode.hidden);
by("filter").hidden = names.length <= 20;
by("filter").oninput = () => {
  const text = by("filter").value.toLowerCase();
  boxes.forEach((box, k) => {
    box.parentNode.style.display = names[k].toLowerCase().includes(text) ? "" : "none";
    box.parentNode.hidden = !names[k].toLowerCase().includes(text);
  });
};
for (const button of document.querySelectorAll("[data-pick]")) {
  button.onclick = () => {
    const pick = button.dataset.pick, rows = Math.max(1, Math.floor(most / (+by("per_class").value || 1)));
    boxes.forEach((box) => { box.checked = false; });
    const from = pick === "none" ? [] : pick === "all" ? shown() : shown().sort(() => Math.random() - 0.5).slice(0, 4);
    from.slice(0, rows).forEach((box) => { box.checked = true; });
  };
}

for (const name of new Set([...FIRST, ...Object.keys(defaults)])) if (name in defaults) by(FIRST.includes(name) ? "first" : "more").append(field(name));
by("more").parentNode.hidden = !by("more").children.length;
reset();
by("defaults").onclick = reset;
by("reseed").onclick = () => { by("seed").value = Math.floor(Math.random() * 1e9); by("form").requestSubmit(); };

const sides = [new Side(0), new Side(1)];
const several = () => { sides[1].root.hidden = !by("compare").checked; };
by("compare").checked = choices.some((c) => c.path === 1);
by("compare").parentNode.hidden = choices.length < 2;
by("compare").onchange = several;
several();

let running = null;
by("stop").onclick = () => running?.abort();
by("form").onsubmit = async (event) => {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  by("draw").disabled = true;
  by("stop").disabled = false;
  by("error").textContent = "";
  const classes = boxes.filter((box) => box.checked).map((box) => +box.value);
  try {
    for (const side of sides) {
      if (!side.root.hidden && !running.signal.aborted) await side.draw(classes, running.signal);
    }
  } catch (error) {
    by("error").textContent = error.message;
  } finally {
    running = null;
    by("draw").disabled = false;
    by("stop").disabled = true;
  }
};
