"use strict";
// Asks the server and paints its answers. No window, tile or share is computed here.

const ROWS = {
  shape: "size", kernel: "kernel", dilation: "dilation", stride: "stride", causal: "causal", border: "border", tile: "tile",
};
const BORDERS = ["shift", "clip", "wrap"];
const START = {
  shape: [16, 16], kernel: [5, 5], dilation: [2, 2], stride: [1, 1], causal: [0, 0],
  border: ["shift", "shift"], tile: [4, 4],
  dilations: [1, 2, 1, 2], depth: 4, view: "keys", token: 136,
};
const LISTS = ["shape", "kernel", "dilation", "stride", "causal", "tile", "dilations"];
const $ = (id) => document.getElementById(id);
const form = $("controls");
const map = $("map");
let state = readAddress();
let cells = [];
let drawn = "";
let pinned = false;
let asked = 0;
let timer = null;

function readAddress() {
  const found = structuredClone(START);
  const address = new URLSearchParams(location.search);
  for (const name of LISTS) {
    const values = (address.get(name) ?? "").split(/[ ,]+/).filter((v) => /^\d{1,6}$/.test(v)).map(Number);
    if (values.length) found[name] = values.slice(0, name === "dilations" ? 24 : 3);
  }
  const borders = (address.get("border") ?? "").split(/[ ,]+/).filter((v) => BORDERS.includes(v));
  if (borders.length) found.border = borders.slice(0, 3);
  if (/^\d{1,4}$/.test(address.get("token") ?? "")) found.token = Number(address.get("token"));
  if (/^\d{1,2}$/.test(address.get("depth") ?? "")) found.depth = Number(address.get("depth"));
  if (["keys", "queries", "field", "tiles"].includes(address.get("view"))) found.view = address.get("view");
  for (const name of Object.keys(ROWS)) found[name] = fit(found[name], found.shape.length);
  return found;
}

function fit(values, rank) {
  return Array.from({ length: rank }, (_, axis) => values[Math.min(axis, values.length - 1)]);
}

function writeAddress() {
  const address = new URLSearchParams();
  for (const name of [...LISTS, "border"]) address.set(name, state[name].join(","));
  for (const name of ["depth", "view", "token"]) address.set(name, state[name]);
  history.replaceState(null, "", "?" + address.toString().replaceAll("%2C", ","));
}

function buildControls() {
  const rank = state.shape.length;
  const axes = rank === 1 ? ["length"] : ["depth", "height", "width"].slice(3 - rank);
  $("axes").innerHTML = "<tr><th></th>" + axes.map((axis) => `<th scope="col">${axis}</th>`).join("") + "</tr>";
  $("window").replaceChildren(...Object.entries(ROWS).map(([name, title]) => {
    const row = document.createElement("tr");
    row.innerHTML = `<th scope="row">${title}</th>`;
    axes.forEach((axis, index) => {
      const input = document.createElement(name === "border" ? "select" : "input");
      input.name = `${name}-${index}`;
      input.setAttribute("aria-label", `${title} along ${axis}`);
      if (name === "causal") {
        input.type = "checkbox";
        input.checked = state.causal[index] === 1;
      } else if (name === "border") {
        input.append(...BORDERS.map((border) => new Option(border, border)));
        input.value = state.border[index];
      } else {
        Object.assign(input, { type: "number", min: 1, max: 999999, value: state[name][index] });
      }
      const place = document.createElement("td");
      place.append(input);
      row.append(place);
    });
    return row;
  }));
  form.elements.rank.value = rank;
  form.elements.dilations.value = state.dilations.join(" ");
  Object.assign(form.elements.depth, { max: Math.max(state.depth, state.dilations.length), value: state.depth });
  form.elements.view.value = state.view;
}

function readControls() {
  for (const name of Object.keys(ROWS)) {
    state[name] = state[name].map((old, axis) => {
      const input = form.elements[`${name}-${axis}`];
      if (name === "border") return input.value;
      return name === "causal" ? Number(input.checked) : input.value === "" ? old : Math.trunc(Number(input.value));
    });
  }
  const dilations = form.elements.dilations.value.split(/[ ,]+/).filter(Boolean);
  const grew = dilations.length !== state.dilations.length;
  state.dilations = dilations;
  state.depth = grew ? dilations.length : Number(form.elements.depth.value);
  state.view = form.elements.view.value;
}

async function ask(path, names) {
  const question = new URLSearchParams(names.map((name) => [name, [state[name]].flat().join(",")]));
  const response = await fetch(`api/${path}?${question}`);
  const body = await response.json();
  if (!response.ok) throw new Error(body.error);
  return body;
}

const WINDOW = ["shape", "kernel", "dilation", "stride", "causal", "border"];

// Asks what the current view needs and paints it, unless a later request overtook this one.
async function update() {
  const turn = ++asked;
  map.dataset.state = "busy";
  document.body.dataset.view = state.view;
  try {
    const about = await ask("about", WINDOW);
    if (turn !== asked) return;
    buildMap(about.shape);
    state.token = Math.min(state.token, about.tokens - 1);
    $("about").textContent = `${counted(about.tokens, "token")}, ${counted(about.pairs, "attending pair")}, bias table ${about.bias.join(" x ")} per head`;
    const paint = { keys: paintNeighbors, queries: paintNeighbors, field: paintField, tiles: paintTiles }[state.view];
    const extra = { keys: [], queries: [], field: ["dilations"], tiles: ["tile"] }[state.view];
    const path = { keys: "neighbors", queries: "neighbors", field: "field", tiles: "plan" }[state.view];
    const answer = await ask(path, [...WINDOW, "token", ...extra]);
    if (turn !== asked) return;
    clear();
    paint(answer);
    say("");
    writeAddress();
    map.dataset.state = "ready";
  } catch (error) {
    if (turn !== asked) return;
    stop();
    say(error instanceof TypeError ? "The server does not answer. Is it still running?" : error.message);
    map.dataset.state = "error";
  }
}

function say(message) {
  $("message").textContent = message;
  $("message").hidden = message === "";
  map.classList.toggle("stale", message !== "");
}

function buildMap(shape) {
  if (drawn === shape.join()) return;
  drawn = shape.join();
  const [depth, height, width] = [1, 1, 1, ...shape].slice(-3);
  cells = [];
  map.replaceChildren(...Array.from({ length: depth }, (_, plane) => {
    const slice = document.createElement("div");
    slice.className = "slice" + (width > 40 ? " many" : "");
    slice.style.setProperty("--columns", width);
    slice.style.setProperty("--width", depth > 1 ? "150px" : "100%");
    if (depth > 1) slice.append(Object.assign(document.createElement("h2"), { textContent: `slice ${plane}` }));
    for (let i = 0; i < height * width; i++) {
      const cell = document.createElement("div");
      cell.className = "cell";
      cell.dataset.token = cells.length;
      cells.push(cell);
      slice.append(cell);
    }
    return slice;
  }));
}

function clear() {
  for (const cell of cells) {
    cell.className = "cell";
    cell.removeAttribute("style");
    cell.textContent = "";
  }
}

function mark(tokens, name) {
  for (const token of tokens) cells[token].classList.add(name);
}

function where(position) {
  return `(${position.join(", ")})`;
}

// 1 tile, 2 tiles, 2 classes, 2 queries.
function counted(number, noun) {
  return `${number} ${number === 1 ? noun : noun.endsWith("ry") ? noun.slice(0, -1) + "ies" : noun + (noun.endsWith("s") ? "es" : "s")}`;
}

// Styles are set one by one: those in markup are what the page's policy forbids.
function legend(...entries) {
  $("legend").replaceChildren(...entries.flatMap(([colour, text]) => {
    const patch = document.createElement("i");
    patch.style.background = colour;
    return [patch, text];
  }));
}

function list(tokens) {
  $("tokens").textContent = tokens.join(" ");
}

function paintNeighbors(answer) {
  const forward = state.view === "keys";
  const tokens = forward ? answer.keys : answer.queries;
  mark(tokens.filter((token) => token !== state.token), forward ? "key" : "query");
  cells[state.token].classList.add(forward ? "query" : "key", "here");
  const count = counted(tokens.length, forward ? "key" : "query");
  $("readout").textContent = forward
    ? `The query at ${where(answer.position)} sees ${count}.`
    : `The key at ${where(answer.position)} is seen by ${count}.`;
  legend(["var(--query)", forward ? "the query" : "queries"], ["var(--key)", forward ? "its keys" : "the key"]);
  list(tokens);
}

function paintField(answer) {
  state.depth = Math.max(1, Math.min(state.depth, answer.layers.length));
  Object.assign(form.elements.depth, { max: answer.layers.length, value: state.depth });
  const layer = answer.layers[state.depth - 1];
  $("reached").textContent = `${state.depth} of ${answer.layers.length}`;
  layer.tokens.forEach((token, index) => {
    cells[token].style.background = `color-mix(in oklab, var(--high) ${100 * layer.share[index]}%, var(--low))`;
  });
  cells[state.token].classList.add("here");
  $("readout").textContent =
    `After ${counted(state.depth, "layer")} the token has heard from ${counted(layer.tokens.length, "token")}, ` +
    `${layer.coverage} % of the map.`;
  legend(["var(--high)", "contributes most"], ["var(--low)", "contributes little"], ["var(--cell)", "not reached"]);
  list(layer.tokens);
}

function paintTiles(answer) {
  const most = Math.max(1, answer.count.classes - 1);
  answer.classes.forEach((number, token) => {
    cells[token].style.background = `color-mix(in oklab, var(--cell) ${100 - (45 * number) / most}%, var(--soft))`;
  });
  for (const token of [...answer.columns, ...answer.rows]) cells[token].removeAttribute("style");
  mark(answer.columns.filter((token) => !answer.rows.includes(token)), "key");
  mark(answer.rows, "query");
  mark(answer.rows, "here");
  $("readout").textContent =
    `A tile of class ${answer.class}: ${counted(answer.rows.length, "query")}, ${counted(answer.columns.length, "key")} loaded; ` +
    `${answer.useful} of ${counted(answer.evaluated, "score")} attend. ` +
    `${counted(answer.count.tiles, "tile")} in ${counted(answer.count.classes, "class")}.`;
  legend(["var(--query)", "queries of the tile"], ["var(--key)", "keys it loads"], ["var(--soft)", "shades: other classes"]);
  list(answer.columns);
  paintCosts(answer);
}

function paintCosts(answer) {
  const own = answer.tile.join("x");
  const costs = answer.costs.some((cost) => cost.tile.join("x") === own) ? answer.costs : [...answer.costs, answer.cost];
  const [scores, loads] = ["scores", "loads"].map((name) => Math.max(...costs.map((cost) => cost[name])));
  $("costs").tBodies[0].replaceChildren(...costs.map((cost) => {
    const row = document.createElement("tr");
    const name = cost.tile.join("x");
    row.className = name === own ? "chosen" : "";
    row.innerHTML = `<td><button type="button">${name}</button></td><td>${cost.scores}</td><td>${cost.loads}</td>`;
    row.cells[1].style.setProperty("--share", `${(90 * cost.scores) / scores}%`);
    row.cells[2].style.setProperty("--share", `${(90 * cost.loads) / loads}%`);
    row.querySelector("button").addEventListener("click", () => {
      state.tile = cost.tile;
      buildControls();
      update();
    });
    return row;
  }));
  $("useful").textContent = `${answer.cost.useful} scores per query attend.`;
}

// A map of another rank, small enough to draw, with the token in its middle.
function setRank(rank) {
  const size = { 1: 40, 2: 16, 3: 8 }[rank];
  for (const name of Object.keys(ROWS)) state[name] = fit(state[name], rank);
  state.shape = Array(rank).fill(size);
  state.kernel = state.kernel.map((kernel) => Math.min(kernel, rank === 3 ? 3 : 5));
  state.stride = state.stride.map(() => 1);
  state.token = state.shape.reduce((token, n) => token * n + Math.floor(n / 2), 0);
}

function choose(token) {
  if (token === state.token || map.dataset.state === "error") return;
  state.token = token;
  update();
}

function stop() {
  clearInterval(timer);
  timer = null;
  $("play").textContent = "Fill";
}

$("play").addEventListener("click", () => {
  if (timer) return stop();
  state.depth = 1;
  update();
  $("play").textContent = "Stop";
  timer = setInterval(() => {
    if (state.depth >= state.dilations.length) return stop();
    state.depth += 1;
    update();
  }, 700);
});

form.addEventListener("input", (event) => {
  if (event.target.name === "rank") {
    setRank(Number(event.target.value));
    buildControls();
  } else {
    readControls();
  }
  update();
});
form.addEventListener("submit", (event) => event.preventDefault());

map.addEventListener("pointerover", (event) => {
  const token = event.target.dataset.token;
  if (token !== undefined && !pinned) choose(Number(token));
});
map.addEventListener("click", (event) => {
  const token = event.target.dataset.token;
  if (token === undefined) return;
  pinned = !pinned || Number(token) !== state.token;
  choose(Number(token));
});
map.addEventListener("keydown", (event) => {
  const [height, width] = [1, ...state.shape].slice(-2);
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -width, ArrowDown: width, PageUp: -width * height, PageDown: width * height };
  if (event.key === "Enter") {
    pinned = !pinned;
  } else if (event.key in steps) {
    event.preventDefault();
    const token = state.token + steps[event.key];
    if (token >= 0 && token < cells.length) choose(token);
  }
});
document.addEventListener("keydown", (event) => {
  const view = ["keys", "queries", "field", "tiles"][Number(event.key) - 1];
  if (!view || event.ctrlKey || event.metaKey || event.altKey || /^(number|text|select-one)$/.test(event.target.type ?? "")) return;
  state.view = view;
  form.elements.view.value = view;
  update();
});

buildControls();
update();
