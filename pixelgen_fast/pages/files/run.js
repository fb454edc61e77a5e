const DATA = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);

const clock = DATA.columns.nimg;
const whole = [clock.length > 1 ? clock[0] : 0, clock[clock.length - 1]];
const view = { whole, low: whole[0], high: whole[1], at: null };
const charts = [];
const redraw = () => charts.forEach((chart) => chart.draw());
for (const panel of DATA.panels) charts.push(new Chart(by("charts"), panel, DATA.columns, DATA.events, view, redraw));

// The smoothing is a share of the rows, in thousandths to either side.
function smooth() {
  const half = Math.round(by("smooth").value / 1000 * clock.length);
  charts.forEach((chart) => { chart.half = half; });
  redraw();
}
by("smooth").oninput = smooth;
by("reset").onclick = () => { [view.low, view.high] = whole; redraw(); };
new ResizeObserver(redraw).observe(by("charts"));
smooth();

function show(k) {
  const grid = DATA.grids[k];
  by("which").value = k;
  by("grid").src = grid.png;
  by("grid").alt = `grid of image ${grid.nimg}`;
  by("when").textContent = `image ${grid.nimg.toLocaleString("en")}`;
}
if (DATA.grids.length) {
  let playing = null;
  const stop = () => { clearInterval(playing); playing = null; by("play").setAttribute("aria-pressed", "false"); };
  by("which").max = DATA.grids.length - 1;
  by("slider").hidden = DATA.grids.length < 2;
  by("grid").hidden = false;
  by("which").oninput = () => { stop(); show(+by("which").value); };
  by("play").onclick = () => {
    if (playing) return stop();
    by("play").setAttribute("aria-pressed", "true");
    playing = setInterval(() => show((+by("which").value + 1) % DATA.grids.length), 400);
    show((+by("which").value + 1) % DATA.grids.length);
  };
  show(DATA.grids.length - 1);
}
