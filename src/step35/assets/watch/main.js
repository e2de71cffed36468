// Joins the parts: which run, what has changed, what to draw. Asks the server again every two seconds.

import { showFacts } from "./facts.js";
import { HeatMap } from "./heat.js";
import { fetchJson } from "./net.js";
import { Chart } from "./plot.js";
import { element } from "./text.js";

const POLL_MS = 2000;
const RUNS_EVERY = 5; // polls between looks for new runs
const HEADLINES = ["loss", "val_loss", "reward", "mtp_loss", "grad_norm", "lr", "tokens_per_s"];
const COLOURS = [0, 1, 2, 3, 4, 5].map((n) => `var(--c${n})`);
const DASHES = ["", "5 3", "1.5 2.5", "7 2 1.5 2"];
const LAST_STEP = 2 ** 32 - 2;
const ASKED = ""; // the first choice of the selector: the run asked for, or the newest of its stages

const by = (id) => document.getElementById(id);
const state = {
  runs: null, name: null, facts: null, compared: new Map(), // compared: run -> { curves }
  curves: {}, view: [null, null], cursor: null, charts: new Map(), maps: new Map(), atNewest: true,
  stale: true, // draw anew even if the server says that nothing has changed: another run, or the first answer after an error
};

async function poll(count = 0) {
  const started = performance.now();
  let soon = false;
  try {
    if (!document.hidden || count === 0) soon = await update(count % RUNS_EVERY === 0); // a hidden tab asks nothing
  } catch (error) {
    by("notice").textContent = error.message;
    console.error(error);
    state.stale = true;
  }
  // A long log takes the server longer to sum up, and is asked for less often: at most a tenth of its time.
  const wait = soon ? 0 : Math.max(POLL_MS, 10 * (performance.now() - started));
  setTimeout(() => poll(count + 1), wait);
}

// Brings the page up to date; returns whether the server still has much of the log to read.
async function update(lookForRuns) {
  if (lookForRuns || state.stale) await updateRuns();
  const name = state.name;
  const facts = await fetchJson("api/facts", { run: name });
  if (name !== state.name) return true; // another run was chosen meanwhile
  const changed = facts.changed || state.stale;
  Object.assign(state, { facts: facts.body, stale: false });
  if (changed) {
    showFacts(state.facts);
    const curves = await fetchCurves(name);
    if (name !== state.name) return true;
    state.curves = curves;
    drawCharts();
    await updatePanels();
  }
  const others = await Promise.all([...state.compared.keys()].map((other) => updateCompared(other)));
  if (others.includes(true)) drawCharts();
  return facts.body.behind_bytes > 1e6;
}

async function updateRuns() {
  const { changed, body } = await fetchJson("api/runs");
  state.runs = body;
  if (changed) fillSelector();
  const chosen = by("run").value || body.newest;
  if (chosen !== state.name) choose(chosen);
  else if (changed) fillOthers();
}

function fillSelector() {
  const { runs, asked, newest } = state.runs;
  const before = by("run").value;
  const names = runs.map((run) => run.name);
  const options = [element("option", { value: ASKED }, asked === newest ? asked : `newest in ${asked}: ${newest}`)];
  for (const name of names) if (name !== asked || name !== newest) options.push(element("option", { value: name }, name));
  by("run").replaceChildren(...options);
  by("run").value = names.includes(before) ? before : ASKED;
}

function choose(name) {
  Object.assign(state, { name, facts: null, stale: true, curves: {}, view: [null, null], cursor: null, atNewest: true });
  state.compared.delete(name);
  for (const shown of [state.charts, state.maps]) shown.clear();
  by("charts").replaceChildren();
  by("panels").replaceChildren();
  by("whole").disabled = true;
  document.title = `${name} · step35`;
  fillOthers();
}

function fillOthers() {
  const names = state.runs.runs.filter((run) => run.has_metrics && run.name !== state.name).map((run) => run.name);
  by("compare").hidden = names.length === 0;
  by("others").replaceChildren(...names.map((name) => {
    const box = element("input", { type: "checkbox", value: name });
    box.checked = state.compared.has(name);
    box.addEventListener("change", async () => {
      if (box.checked) state.compared.set(name, { curves: null }); else state.compared.delete(name);
      if (box.checked) await updateCompared(name);
      drawCharts();
    });
    return element("label", {}, box, ` ${name}`);
  }));
}

// Fetches what a compared run has that is new; returns whether there was anything.
async function updateCompared(name, always = false) {
  const other = state.compared.get(name);
  const { changed } = await fetchJson("api/facts", { run: name });
  if (!changed && other.curves && !always) return false;
  other.curves = await fetchCurves(name);
  return true;
}

async function fetchCurves(run) {
  const [first, last] = state.view;
  const filter = by("filter").value.trim();
  return (await fetchJson("api/curves", { run, filter, first: first ?? 0, last: last ?? LAST_STEP })).body;
}

async function refetch() {
  state.curves = await fetchCurves(state.name);
  await Promise.all([...state.compared.keys()].map((name) => updateCompared(name, true)));
  drawCharts();
}

function drawCharts() {
  const families = new Map(); // "mtp_loss" -> ["mtp_loss/1", "mtp_loss/2"]
  for (const key of Object.keys(state.curves)) {
    const family = key.split("/")[0];
    families.set(family, [...(families.get(family) ?? []), key]);
  }
  const rank = (family) => (HEADLINES.includes(family) ? HEADLINES.indexOf(family) : HEADLINES.length);
  const order = [...families.keys()].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  for (const family of order) if (!state.charts.has(family)) state.charts.set(family, new Chart(family, act));
  const figures = order.map((family) => state.charts.get(family).figure);
  const shown = [...by("charts").children];
  if (figures.length !== shown.length || figures.some((figure, i) => figure !== shown[i])) by("charts").replaceChildren(...figures);
  for (const family of order) state.charts.get(family).draw(seriesOf(families.get(family)), options());
}

// A run alone: a colour for each key. Several: a colour for each run, a dash for each key.
function seriesOf(keys) {
  const runs = [[state.name, state.curves], ...[...state.compared].map(([name, other]) => [name, other.curves ?? {}])];
  return runs.flatMap(([run, curves], r) => keys.filter((key) => key in curves).map((key, k) => ({
    ...curves[key],
    name: [runs.length > 1 ? run : "", keys.length > 1 ? key.split("/").slice(1).join("/") : ""].filter(Boolean).join(" "),
    colour: COLOURS[(runs.length > 1 ? r : k) % COLOURS.length],
    dash: runs.length > 1 ? DASHES[k % DASHES.length] : "",
  })));
}

function options() {
  const alarms = [...new Set(state.facts?.alarms.map((alarm) => alarm.step))];
  return { smooth: Number(by("smooth").value), log: by("log").checked, alarms, cursor: state.cursor };
}

const act = {
  zoom(first, last) {
    state.view = [first, last];
    by("whole").disabled = first === null;
    refetch();
  },
  point(step) {
    state.cursor = step;
    for (const chart of state.charts.values()) chart.point(step);
  },
};

async function updatePanels() {
  const count = state.facts?.panel_records ?? 0;
  by("experts-section").hidden = count === 0;
  if (count === 0) return;
  by("place").max = count - 1;
  if (state.atNewest) by("place").value = count - 1;
  const name = state.name;
  const { body } = await fetchJson("api/panels", { run: name, place: by("place").value });
  if (body && name === state.name) drawPanels(body);
}

function drawPanels({ step, layers, panels }) {
  by("place-step").textContent = step;
  for (const [key, panel] of Object.entries(panels)) {
    if (!state.maps.has(key)) {
      state.maps.set(key, new HeatMap(key));
      by("panels").append(state.maps.get(key).figure);
    }
    state.maps.get(key).draw(panel, layers, { shade: by("shade").value, fixed: by("fixed").checked });
  }
}

by("run").addEventListener("change", () => { choose(by("run").value || state.runs.newest); update(false); });
by("filter").addEventListener("input", refetch);
by("smooth").addEventListener("input", drawCharts);
by("log").addEventListener("change", drawCharts);
by("whole").addEventListener("click", () => act.zoom(null, null));
by("place").addEventListener("input", () => {
  state.atNewest = by("place").value === by("place").max;
  updatePanels();
});
window.addEventListener("resize", drawCharts);
for (const id of ["shade", "fixed"]) by(id).addEventListener("change", updatePanels);
poll();
