"use strict";
// Draws the runs that the data block holds, and on a live page asks for them anew. Texts of runs become text nodes, never mark-up.
const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 560, HEIGHT = 230, LEFT = 58, RIGHT = 10, TOP = 8, BOTTOM = 24;

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function shape(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function write(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : Number(value.toPrecision(4)).toLocaleString("en");
}

function listTicks(low, high) {
  const rough = (high - low) / 4 || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough);
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) ticks.push(tick);
  return ticks;
}

function drawChart(title, curves) {
  const points = curves.flatMap((curve) => curve.points);
  const steps = points.map((point) => point[0]), values = points.map((point) => point[1]);
  let [first, last] = [steps.reduce((a, b) => Math.min(a, b)), steps.reduce((a, b) => Math.max(a, b))];
  let [low, high] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  if (first === last) [first, last] = [first - 1, last + 1];
  if (low === high) [low, high] = low === 0 ? [-1, 1] : [low - Math.abs(low) / 2, high + Math.abs(high) / 2];
  const x = (step) => LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT);
  const y = (value) => TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM);
  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
  for (const tick of listTicks(low, high)) {
    svg.append(shape("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick) }));
    const text = shape("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" });
    text.textContent = write(tick);
    svg.append(text);
  }
  for (const tick of listTicks(first, last).filter(Number.isInteger)) {
    const anchor = x(tick) > WIDTH - 30 ? "end" : "middle";
    const text = shape("text", { x: x(tick) + (anchor === "end" ? RIGHT : 0), y: HEIGHT - 6, "text-anchor": anchor });
    text.textContent = write(tick);
    svg.append(text);
  }
  for (const curve of curves) {
    const join = (points) => points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    const stroke = `var(${curve.colour})`;
    if (curve.points.length < 40) {
      for (const [step, value] of curve.points)
        svg.append(shape("circle", { cx: x(step), cy: y(value), r: 2.5, fill: `var(${curve.colour})` }));
    }
    const dashes = curve.dashed ? { "stroke-dasharray": "5 3" } : {};
    const paleness = curve.trend.length ? { opacity: 0.3 } : {};
    svg.append(shape("polyline", { class: "curve", points: join(curve.points), stroke, ...dashes, ...paleness }));
    if (curve.trend.length) svg.append(shape("polyline", { class: "curve", points: join(curve.trend), stroke, ...dashes }));
  }
  const readout = make("div", { class: "readout" });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const step = first + ((event.clientX - box.left) / box.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * (last - first);
    const near = (curve) => curve.points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
    readout.textContent = curves.map((curve) => `${curve.label}: ${write(near(curve)[1])} at step ${near(curve)[0]}`).join("   ");
  });
  const legend = make("div", { class: "legend" });
  for (const curve of curves)
    legend.append(make("span", {}, make("i", { style: `border-color: var(${curve.colour})`, class: curve.dashed ? "dashed" : "" }), curve.label));
  return make("section", { class: "card" }, make("h3", {}, title), svg, legend, readout);
}

function drawCharts(runs) {
  const titles = [...new Set(runs.flatMap((run) => run.charts.map((chart) => chart.title)))];
  const grid = make("div", { class: "grid" });
  for (const title of titles) {
    const curves = runs.flatMap((run, place) => {
      const chart = run.charts.find((one) => one.title === title);
      return Object.entries(chart ? chart.curves : {}).map(([label, curve], number) => ({
        label: runs.length > 1 ? `${run.name}, ${label}` : label,
        colour: `--c${(runs.length > 1 ? place : number) % 8}`,
        dashed: runs.length > 1 && number > 0,
        ...curve,
      }));
    });
    grid.append(drawChart(title, curves));
  }
  return grid;
}

function drawTable(head, rows) {
  const line = (cells, tag) => make("tr", {}, ...cells.map((cell) => make(tag, {}, cell)));
  const body = make("tbody", {}, ...rows.map((row) => line(row, "td")));
  return make("div", { class: "card" }, make("table", {}, make("thead", {}, line(head, "th")), body));
}

function drawAnswers(title, answers, names) {
  if (!answers.length) return [];
  const cards = answers.map((answer) => {
    const card = make("article", { class: "card" }, make("h3", {}, answer.origin));
    for (const [name, text] of [["asked", answer.prompt], [names[0], answer.before], [names[1], answer.after]]) {
      if (text === null || !name) continue;
      card.append(make("div", { class: "quiet" }, name), make("div", { class: "text" }, text || "(nothing)"));
    }
    return card;
  });
  return [make("h2", {}, title), make("div", { class: "grid" }, ...cards)];
}

function drawRun(run, isAlone) {
  const parts = isAlone ? [] : [make("h2", {}, run.name)];
  if (run.share !== null && run.share < 1)
    parts.push(make("progress", { max: 1, value: run.share, "aria-label": "share of the run that is done" }));
  const figures = make("dl", { class: "figures" });
  for (const [name, value] of Object.entries({ status: run.status, step: run.step.toLocaleString("en"), ...run.figures }))
    figures.append(make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  parts.push(figures);
  for (const caution of run.cautions)
    parts.push(make("p", { class: "caution" }, make("b", {}, caution.text), make("br"), caution.advice));
  for (const note of run.notes) parts.push(make("p", { class: "caution" }, note));
  return parts;
}

function draw(board) {
  const isAlone = board.runs.length === 1;
  const parts = board.runs.flatMap((run) => drawRun(run, isAlone));
  const differences = Object.entries(board.differences);
  if (differences.length) {
    parts.push(make("h2", {}, "What differs in the recipes"));
    parts.push(drawTable(["key", ...board.runs.map((run) => run.name)], differences.map(([key, values]) => [key, ...values])));
  }
  if (board.runs.some((run) => run.charts.length)) parts.push(make("h2", {}, "Curves"), drawCharts(board.runs));
  else parts.push(make("p", { class: "quiet" }, "Nothing was logged yet."));
  for (const run of board.runs) {
    const of = isAlone ? "" : ` of ${run.name}`;
    parts.push(...drawAnswers(`Answers before and after${of}`, run.answers, ["before", "after"]));
    parts.push(...drawAnswers(`The newest answers${of}`, run.completions, ["answer", ""]));
  }
  if (isAlone) parts.push(make("h2", {}, "Recipe"), drawTable(["key", "value"], Object.entries(board.runs[0].recipe)));
  document.getElementById("main").replaceChildren(...parts);
}

const state = document.getElementById("state");
let shown = document.getElementById("data").textContent, speed = null;
draw(JSON.parse(shown));

// The time left follows from the shares that two answers of the server tell.
function estimate(board) {
  const run = board.runs[0], now = Date.now() / 1000;
  if (board.runs.length > 1 || run.share === null || run.share >= 1) return "";
  if (!speed || run.share < speed.share) speed = { share: run.share, at: now };
  const left = run.share > speed.share ? (1 - run.share) * (now - speed.at) / (run.share - speed.share) : null;
  return left === null ? "" : `, about ${left < 120 ? `${Math.ceil(left)} s` : `${Math.ceil(left / 60)} min`} left`;
}

async function refresh() {
  try {
    const answer = await fetch("data");
    if (!answer.ok) throw new Error(answer.statusText);
    const text = await answer.text();
    const board = JSON.parse(text);
    state.textContent = `live${estimate(board)}`;
    if (text !== shown) draw(board);
    shown = text;
  } catch {
    state.textContent = "the server has ended; this is the last state that it sent";
  }
}
if (document.body.dataset.live) {
  state.textContent = "live";
  setInterval(refresh, 1000 * Number(document.body.dataset.live));
}
