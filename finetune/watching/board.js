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
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

function listTicks(low, high) {
  const rough = (high - low) / 5 || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((one) => one * power).find((one) => one >= rough);
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) ticks.push(tick);
  return ticks;
}

// The standard error of a point is drawn as a bar from one error below it to one above.
function listErrorBars(curve) {
  const errors = new Map(curve.errors);
  return curve.points.filter(([step]) => errors.has(step)).map(([step, value]) =>
    ({ step, low: value - errors.get(step), high: value + errors.get(step), colour: curve.colour }));
}

function drawChart(title, curves) {
  const points = curves.flatMap((curve) => curve.points);
  const bars = curves.flatMap((curve) => listErrorBars(curve));
  const steps = points.map((point) => point[0]);
  const values = [...points.map((point) => point[1]), ...bars.flatMap((bar) => [bar.low, bar.high])];
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
  for (const bar of bars)
    svg.append(shape("line", { x1: x(bar.step), x2: x(bar.step), y1: y(bar.low), y2: y(bar.high), stroke: `var(${bar.colour})`, opacity: 0.6 }));
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

function drawSpoken(name, text) {
  return make("div", {}, make("div", { class: "quiet" }, name), make("div", { class: "text" }, text || "(nothing)"));
}

function nameSteps(stretch) {
  const [first, last] = [stretch.first, stretch.last].map((step) => step.toLocaleString("en"));
  return first === last ? `step ${first}` : `steps ${first} to ${last}`;
}

// The answers at the evaluations, one line for equal ones in a row.
function drawCourse(answer) {
  const rows = answer.course.map((stretch) => {
    const text = stretch.like ? make("td", { class: "quiet" }, `as ${stretch.like}`) : make("td", { class: "text" }, stretch.text || "(nothing)");
    return make("tr", {}, make("th", {}, nameSteps(stretch)), text);
  });
  const rest = answer.unshown ? [make("p", { class: "quiet" }, `${answer.unshown.toLocaleString("en")} more are in answers_by_step.jsonl.`)] : [];
  return make("div", {}, make("div", { class: "quiet" }, "at the evaluations"), make("table", { class: "course" }, make("tbody", {}, ...rows)), ...rest);
}

// Before and after stand side by side; while the run trains, the newest evaluation takes the place of the end.
function drawAnswers(title, answers) {
  if (!answers.length) return [];
  const cards = answers.map((answer) => {
    const newest = answer.course.at(-1);
    const pair = [drawSpoken("before", answer.before === null ? "(not known)" : answer.before)];
    if (answer.after !== null) pair.push(drawSpoken("after", answer.after));
    else if (newest) pair.push(drawSpoken(`now, step ${newest.last.toLocaleString("en")}`, newest.like ? answer[newest.like] : newest.text));
    const course = answer.course.length ? [drawCourse(answer)] : [];
    return make("article", { class: "card" }, make("h3", {}, answer.origin), drawSpoken("asked", answer.prompt),
      make("div", { class: "pair" }, ...pair), ...course);
  });
  return [make("h2", {}, title), make("div", { class: "stack" }, ...cards)];
}

function drawCompletions(title, answers) {
  if (!answers.length) return [];
  const cards = answers.map((answer) => make("article", { class: "card" }, make("h3", {}, answer.origin),
    drawSpoken("asked", answer.prompt), drawSpoken("answer", answer.before)));
  return [make("h2", {}, title), make("div", { class: "grid" }, ...cards)];
}

function drawText(text) {
  const pieces = text.pieces.map(([piece, isTrained]) => isTrained ? make("mark", {}, piece) : document.createTextNode(piece));
  return make("article", { class: "card" }, make("h3", {}, text.title), make("div", { class: "text" }, ...pieces));
}

function drawLengths(lengths) {
  const most = lengths.reduce((a, b) => Math.max(a, b[1]), 1);
  const rows = lengths.map(([upper, count]) => make("tr", {}, make("td", {}, `up to ${upper.toLocaleString("en")} tokens`),
    make("td", { class: "bars" }, make("i", { style: `width: ${(100 * count / most).toFixed(1)}%` })), make("td", {}, count.toLocaleString("en"))));
  return make("div", { class: "card" }, make("h3", {}, "Lengths of the rows"), make("table", { class: "lengths" }, make("tbody", {}, ...rows)));
}

function drawRows(rows, of) {
  const parts = rows.groups.flatMap((group) => [make("h2", {}, `${group.title}${of}`),
    ...(group.texts.some((text) => text.pieces.some((piece) => piece[1])) ? [make("p", { class: "quiet" }, "Trained text is marked.")] : []),
    make("div", { class: "grid" }, ...group.texts.map(drawText))]);
  const left = Object.entries(rows.left_out);
  if (rows.sources.length) parts.push(make("h2", {}, `Sources of the rows${of}`), drawTable(rows.sources[0], rows.sources.slice(1)));
  const cards = [];
  if (rows.lengths.length) cards.push(drawLengths(rows.lengths));
  if (left.length) cards.push(drawTable(["rows left out or cut", "number"], left.map(([reason, count]) => [reason, count.toLocaleString("en")])));
  if (cards.length) parts.push(make("h2", {}, `Lengths, and what was left out${of}`), make("div", { class: "grid" }, ...cards));
  return parts;
}

function drawRecipe(recipe) {
  return [make("h2", {}, "Recipe"), drawTable(["key", "value"], Object.entries(recipe))];
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

// What has not changed stays as it is in the page, with the place to which a person has scrolled it and the text that is selected.
const kept = new Map();

function keep(key, data, drawPart) {
  const text = JSON.stringify(data);
  if (kept.get(key)?.text !== text) kept.set(key, { text, nodes: drawPart() });
  return kept.get(key).nodes;
}

function show(parts) {
  const main = document.getElementById("main");
  for (const node of [...main.childNodes]) if (!parts.includes(node)) node.remove();
  parts.forEach((node, place) => {
    if (main.childNodes[place] !== node) main.insertBefore(node, main.childNodes[place] ?? null);
  });
}

function draw(board) {
  const isAlone = board.runs.length === 1;
  const parts = board.runs.flatMap((run) => drawRun(run, isAlone));
  for (const fault of board.left_out) parts.push(make("p", { class: "quiet" }, `left out: ${fault}`));
  const differences = Object.entries(board.differences);
  if (differences.length) {
    parts.push(make("h2", {}, "What differs in the recipes"));
    parts.push(drawTable(["key", ...board.runs.map((run) => run.name)], differences.map(([key, values]) => [key, ...values])));
  }
  if (board.runs.some((run) => run.charts.length)) parts.push(make("h2", {}, "Curves"), drawCharts(board.runs));
  else parts.push(make("p", { class: "quiet" }, "Nothing was logged yet."));
  board.runs.forEach((run, place) => {
    const of = isAlone ? "" : ` of ${run.name}`;
    parts.push(...keep(`answers ${place}`, [of, run.answers], () => drawAnswers(`Answers before, during and after the training${of}`, run.answers)));
    parts.push(...keep(`completions ${place}`, [of, run.completions], () => drawCompletions(`The newest answers${of}`, run.completions)));
    parts.push(...keep(`rows ${place}`, [of, run.rows], () => drawRows(run.rows, of)));
  });
  if (isAlone) parts.push(...keep("recipe", board.runs[0].recipe, () => drawRecipe(board.runs[0].recipe)));
  show(parts);
}

const state = document.getElementById("state");
let shown = document.getElementById("data").textContent;
draw(JSON.parse(shown));

async function refresh() {
  const began = performance.now();
  try {
    const answer = document.hidden ? null : await fetch("data");
    if (!answer) return;  // nobody looks
    if (!answer.ok) throw new Error(answer.statusText);
    const text = await answer.text();
    const board = JSON.parse(text);
    state.textContent = "live";
    if (text !== shown) draw(board);
    shown = text;
  } catch {
    state.textContent = "the server has ended; this is the last state that it sent, and report.html in the run directory shows a finished run";
  } finally {
    // Reading a long run takes a moment of the machine that trains it: at most one part in fifty goes there.
    setTimeout(refresh, Math.max(1000 * Number(document.body.dataset.live), 50 * (performance.now() - began)));
  }
}
if (document.body.dataset.live) {
  state.textContent = "live";
  setTimeout(refresh, 1000 * Number(document.body.dataset.live));
}
