"use strict";
const $ = (id) => document.getElementById(id);
const runs = JSON.parse($("data").textContent);
const several = runs.length > 1;

// ---- text and numbers ----
const INVISIBLE = /[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/u;
const MARKS = { " ": "·", "\n": "↵", "\t": "→" };
const code = (char) => `\\u{${char.codePointAt(0).toString(16)}}`;
const markOf = (char) => MARKS[char] ?? (INVISIBLE.test(char) ? code(char) : char);
/** A token on one line, with nothing invisible in it. */
const visible = (text) => Array.from(text, markOf).join("");
/** A token as people type it into a search. */
const typed = (text) => text.trim() || (/[\n\r]/.test(text) ? "\\n" : text.includes("\t") ? "\\t" : "space");
const percent = (share) => share >= 0.1 ? `${(100 * share).toFixed(0)}%` : `${Number((100 * share).toPrecision(2))}%`;
const part = (share) => share >= 0.01 ? `${(100 * share).toFixed(0)}%` : "<1%";
const fixed = (value, digits = 2) => value == null ? "–" : value.toFixed(digits).replace(/^-(0\.0*)$/, "$1").replace("-", "−");
const whole = (value) => value.toLocaleString("en");
function median(values) {
  const sorted = values.filter((value) => value != null).sort((a, b) => a - b), half = sorted.length >> 1;
  return !sorted.length ? null : sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

/** An element: its class, what stands in it (text is always text), its attributes. */
function el(tag, className = "", content = [], attributes = {}) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...[content].flat().filter((item) => item != null));
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}
function drawing(tag, attributes = {}, content = []) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...[content].flat());
  return node;
}
function button(text, title, action) {
  const node = el("button", "", text, { type: "button", title, "aria-label": title });
  node.addEventListener("click", action);
  return node;
}

// ---- who made an explanation: a shape and a colour for each hand ----
const HANDS = {
  counted: { mark: "●", says: "counted: from the tokens it fires on, no model was asked" },
  text: { mark: "■", says: "text: an LLM read contexts with the firing tokens marked" },
  lines: { mark: "▲", says: "lines: an LLM read tokens and activations line by line" },
  unnamed: { mark: "◆", says: "made by a version that did not say how" },
};
function handMark(hand) {
  const { mark, says } = HANDS[hand] ?? HANDS.unnamed;
  return el("span", `hand ${hand}`, mark, { title: says, role: "img", "aria-label": hand });
}

// ---- runs and features ----
/** What tells the runs apart, in words. */
const TELLING = {
  model_name: "", layer_id: "layer ", layer_type: "", architecture: "", act_vec_size: "width ", dict_vec_size: "features ",
  l1_coefficient: "l1 ", k: "k ", target_l0: "target L0 ", learning_rate: "learning rate ", trained_batches: "batch ",
};
const differing = Object.keys(TELLING).filter((key) => new Set(runs.map(({ config }) => config[key])).size > 1);
runs.forEach((run, r) => {
  const { layer_type: type, skip_positions: skip } = run.config;
  const said = differing.filter((key) => run.config[key] != null).map((key) => TELLING[key] + `${run.config[key]}`.split("/").at(-1));
  Object.assign(run, { r, name: said.join(", ") || `run ${r + 1}`, layerType: type ?? "", skip: skip ?? 0 });
});

const features = runs.flatMap((run) => run.features.map(([dim, frequency, max, top, effects, about], index) => {
  const tokens = top.map(([token, share, fired, seen]) => ({ text: run.tokens[token], share, fired, seen }));
  const shares = new Map();
  for (const { text, share } of tokens) {
    const key = typed(text).toLowerCase();
    shares.set(key, (shares.get(key) ?? 0) + share);
  }
  const moved = ["promotes", "suppresses"].map((key, side) =>
    effects[side]?.map(([token, logit]) => ({ text: run.tokens[token], logit })) ?? (about[key] ?? []).map((text) => ({ text, logit: null })));
  const words = [`#${dim}`, about.interpretation ?? "", ...tokens.map(({ text }) => `${typed(text)} ${visible(text)}`)];
  return {
    run, dim, index, frequency, max, tokens, shares, about, moved, id: `${run.r ? `r${run.r}` : ""}f${dim}`,
    hand: about.interpretation == null ? null : about.explained_by in HANDS ? about.explained_by : "unnamed",
    interpretation: about.interpretation ?? null, score: about.score ?? null, control: about.control ?? null,
    first: tokens.length ? typed(tokens[0].text).toLowerCase() : null, text: words.join("\n").toLowerCase(),
  };
}));
features.forEach((feature, place) => { feature.place = place; });
const byId = new Map(features.map((feature) => [feature.id, feature]));
const explained = features.filter(({ hand }) => hand);
const scored = features.filter(({ score }) => score != null);

// ---- the list: what is in it, in which order ----
let shown = features, current = null, sort = null;
const LIMITS = ["score_from", "score_to", "fires_from", "fires_to"];
const CHOICES = ["hand", "layer_type", "run"];
const limit = (id) => $(id).value === "" || Number.isNaN(Number($(id).value)) ? null : Number($(id).value);
/** The filters that are set, as functions of a feature. */
function filters() {
  const [scoreFrom, scoreTo, firesFrom, firesTo] = LIMITS.map(limit), wanted = [];
  if (scoreFrom != null) wanted.push(({ score }) => score != null && score >= scoreFrom);
  if (scoreTo != null) wanted.push(({ score }) => score != null && score <= scoreTo);
  if (firesFrom != null) wanted.push(({ frequency }) => 100 * frequency >= firesFrom);
  if (firesTo != null) wanted.push(({ frequency }) => 100 * frequency <= firesTo);
  if ($("hand").value) wanted.push(({ hand }) => `${hand}` === $("hand").value);
  if ($("layer_type").value) wanted.push(({ run }) => run.layerType === $("layer_type").value);
  if ($("run").value) wanted.push(({ run }) => `${run.r}` === $("run").value);
  return wanted;
}

function order(words) {
  if (sort) return sort;
  if (words.length) return { key: "match", up: false };
  return scored.length ? { key: "score", up: false } : { key: "dim", up: true };
}

let planned = 0;
function refresh() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean), wanted = filters();
  const { key, up } = order(words);
  const match = (feature) => words.reduce((sum, word) => sum + (feature.shares.get(word) ?? 0), 0);
  const value = key === "match" ? match : (feature) => feature[key];
  shown = features.filter((feature) => words.every((word) => feature.text.includes(word)) && wanted.every((holds) => holds(feature)))
    .map((feature) => [value(feature), feature])
    .sort(([a, { place: i }], [b, { place: j }]) =>
      (a == null) - (b == null) || (a === b || a == null ? i - j : (a < b ? -1 : 1) * (up ? 1 : -1)))
    .map(([, feature]) => feature);
  for (const head of document.querySelectorAll("[data-sort]")) {
    const mine = head.dataset.sort === key;
    head.parentElement.setAttribute("aria-sort", mine ? (up ? "ascending" : "descending") : "none");
  }
  const all = whole(features.length);
  $("count").textContent = words.length || wanted.length
    ? `${whole(shown.length)} of ${all} features${key === "match" ? ", best match first" : ""}`
    : `${all} features`;
  $("none").hidden = shown.length > 0;
  $("reset").hidden = !wanted.length;
  $("list").setAttribute("aria-rowcount", shown.length + 1);
  drawn = null;
  draw();
  // The map follows a frame later: typing in the search does not wait for it.
  cancelAnimationFrame(planned);
  planned = requestAnimationFrame(plot);
}

function tokenChip(text) {
  return el("span", "chip", visible(text));
}

function row(feature, position) {
  const { dim, hand, interpretation, score, control, frequency, tokens, run, id } = feature;
  const says = el("span", hand ? "" : "faint", interpretation ?? "not explained");
  const cells = [
    el("span", "dim", [el("a", "", `${dim}`, { href: `#${id}`, tabindex: "-1" }), several ? el("small", "faint", run.name) : null], { role: "cell" }),
    el("span", "says", [hand ? handMark(hand) : null, says], { role: "cell" }),
    el("span", score == null ? "score num faint" : "score num", fixed(score), { role: "cell" }),
    el("span", "control num faint", fixed(control), { role: "cell" }),
    el("span", "frequency num", percent(frequency), { role: "cell" }),
    el("span", "tops", tokens.slice(0, 6).map(({ text }) => tokenChip(text)), { role: "cell" }),
  ];
  const node = el("div", feature === current ? "row current" : "row", cells, { role: "row", "aria-rowindex": position + 2 });
  node.style.top = `calc(${position} * var(--row))`;
  return node;
}

let drawn = null, printing = false;
const PRINTED = 500;
/** Only the rows in sight exist; on paper the first 500. */
function draw() {
  const rows = $("rows"), box = rows.getBoundingClientRect();
  const height = parseFloat(getComputedStyle(rows).getPropertyValue("--row"));
  rows.style.height = `${(printing ? Math.min(PRINTED, shown.length) : shown.length) * height}px`;
  const first = printing ? 0 : Math.max(0, Math.floor(-box.top / height) - 8);
  const last = printing ? PRINTED : Math.min(shown.length, Math.ceil((innerHeight - box.top) / height) + 8);
  const key = `${first} ${last} ${current?.id}`;
  if (key === drawn) return;
  drawn = key;
  rows.replaceChildren(...shown.slice(first, last).map((feature, i) => row(feature, first + i)));
}

function reveal() {
  const position = shown.indexOf(current), pane = $("list");
  if (position < 0 || getComputedStyle(pane).overflowY !== "auto") return;
  const height = parseFloat(getComputedStyle($("rows")).getPropertyValue("--row")), head = $("rows").offsetTop;
  const top = head + position * height;
  if (top - head < pane.scrollTop) pane.scrollTop = top - head;
  else if (top + height > pane.scrollTop + pane.clientHeight) pane.scrollTop = top + height - pane.clientHeight;
}

// ---- the map: score over frequency ----
const MARGIN = { left: 30, right: 10, top: 8, bottom: 22 }, LANE = 16;
const logs = features.map(({ frequency }) => Math.log10(frequency)).filter(Number.isFinite);
const domain = { low: Math.floor(10 * Math.min(...logs, 0)) / 10 - 0.05, high: Math.min(0, Math.max(...logs, -9) + 0.1), bottom: Math.min(-0.2, ...scored.map(({ score }) => score)) };
const SHAPES = {
  counted: (x, y) => `M${x - 2.6} ${y}a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0 -5.2 0`,
  text: (x, y) => `M${x - 2.4} ${y - 2.4}h4.8v4.8h-4.8z`,
  lines: (x, y) => `M${x} ${y - 3.2}l3.2 5.6h-6.4z`,
  unnamed: (x, y) => `M${x} ${y - 3.2}l3.2 3.2l-3.2 3.2l-3.2 -3.2z`,
};
let scale = null;  // pixels of the map as drawn last
function plot() {
  const svg = $("map"), width = svg.clientWidth, height = svg.clientHeight;
  if (!width || !scored.length) return;
  const right = width - MARGIN.right, base = height - MARGIN.bottom - LANE;
  const x = (log) => MARGIN.left + (log - domain.low) / (domain.high - domain.low) * (right - MARGIN.left);
  const y = (score) => MARGIN.top + (1 - score) / (1 - domain.bottom) * (base - MARGIN.top);
  const at = (feature) => [x(Math.log10(feature.frequency)), feature.score == null ? base + LANE / 2 + 2 : y(feature.score)].map((value) => Math.round(10 * value) / 10);
  scale = { x, y, at, base, right };
  const lines = [];
  for (const score of [0, 0.5, 1]) lines.push(
    drawing("line", { x1: MARGIN.left, x2: right, y1: y(score), y2: y(score), class: score ? "grid" : "axis" }),
    drawing("text", { x: MARGIN.left - 6, y: y(score) + 4, "text-anchor": "end" }, `${score}`));
  lines.push(drawing("text", { x: MARGIN.left - 6, y: base + LANE / 2 + 6, "text-anchor": "end" }, "–"));
  for (let power = Math.ceil(domain.low); power <= 0; power++) if (x(power) <= right + 1) lines.push(
    drawing("line", { x1: x(power), x2: x(power), y1: MARGIN.top, y2: base + LANE, class: "grid" }),
    drawing("text", { x: Math.min(x(power), right - 14), y: height - 6, "text-anchor": "middle" }, `${Number((100 * 10 ** power).toPrecision(1))}%`));
  const inside = new Set(shown), paths = { counted: "", text: "", lines: "", unnamed: "", out: "", silent: "" };
  for (const feature of features) {
    const [left, top] = at(feature);
    if (feature.score == null) paths.silent += `M${left} ${top - 3}v6`;
    else paths[inside.has(feature) ? feature.hand ?? "unnamed" : "out"] += SHAPES[feature.hand ?? "unnamed"](left, top);
  }
  const points = Object.entries(paths).map(([name, d]) => drawing("path", { d, class: `points ${name}` }));
  points.unshift(points.splice(4, 1)[0]);  // those that are filtered out lie below
  svg.replaceChildren(...lines, ...points, brushed(), drawing("circle", { r: 6.5, class: "here", cx: -99, cy: -99 }));
  locate();
}
/** The part of the map that the filters leave. */
function brushed() {
  const [scoreFrom, scoreTo, firesFrom, firesTo] = LIMITS.map(limit), { x, y, base, right } = scale;
  if ([scoreFrom, scoreTo, firesFrom, firesTo].every((value) => value == null)) return drawing("rect", { class: "brush", width: 0, height: 0 });
  const across = (value) => Math.max(MARGIN.left, Math.min(right, x(Math.log10(Math.max(value, 1e-9) / 100))));
  const down = (value) => Math.max(MARGIN.top, Math.min(base, y(value)));
  const left = firesFrom == null ? MARGIN.left : across(firesFrom), end = firesTo == null ? right : across(firesTo);
  const top = scoreTo == null ? MARGIN.top : down(scoreTo), bottom = scoreFrom == null ? (scoreTo == null ? base + LANE : base) : down(scoreFrom);
  return drawing("rect", { class: "brush", x: left, y: top, width: Math.max(0, end - left), height: Math.max(0, bottom - top) });
}
function locate() {
  const [left, top] = current && scale ? scale.at(current) : [-99, -99], here = $("map").querySelector(".here");
  here?.setAttribute("cx", left);
  here?.setAttribute("cy", top);
}
function closest(left, top, reach) {
  let best = null, least = reach ** 2;
  for (const feature of shown) {
    const [x, y] = scale.at(feature), distance = (x - left) ** 2 + (y - top) ** 2;
    if (distance < least) [best, least] = [feature, distance];
  }
  return best;
}
let drag = null;
const placeOn = (event) => { const box = $("map").getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
$("map").addEventListener("pointerdown", (event) => { drag = placeOn(event); $("map").setPointerCapture(event.pointerId); });
$("map").addEventListener("pointermove", (event) => {
  const [left, top] = placeOn(event);
  if (!drag) {
    const near = closest(left, top, 10);
    return tip(near && [el("b", "", `${near.dim}  ${fixed(near.score)}`), ` ${near.interpretation ?? "not explained"}`], near && $("map").getBoundingClientRect(), near && scale.at(near));
  }
  const [x, y] = drag, box = $("map").querySelector(".brush");
  for (const [name, value] of Object.entries({ x: Math.min(x, left), y: Math.min(y, top), width: Math.abs(x - left), height: Math.abs(y - top) })) box.setAttribute(name, value);
});
$("map").addEventListener("pointerup", (event) => {
  const [left, top] = placeOn(event), [x, y] = drag ?? [left, top];
  drag = null;
  if (Math.hypot(left - x, top - y) < 5) {
    const near = closest(left, top, 12);
    if (near) location.hash = `#${near.id}`;
    else { LIMITS.forEach((id) => { $(id).value = ""; }); refresh(); }
    return;
  }
  const share = (pixel) => 100 * 10 ** (domain.low + (pixel - MARGIN.left) / (scale.right - MARGIN.left) * (domain.high - domain.low));
  const score = (pixel) => Math.min(1, 1 - (pixel - MARGIN.top) / (scale.base - MARGIN.top) * (1 - domain.bottom));
  $("fires_from").value = Number(share(Math.min(x, left)).toPrecision(2));
  $("fires_to").value = Number(share(Math.max(x, left)).toPrecision(2));
  $("score_from").value = Math.max(top, y) > scale.base ? "" : score(Math.max(top, y)).toFixed(2);
  $("score_to").value = Math.min(top, y) > scale.base ? "" : score(Math.min(top, y)).toFixed(2);
  $("list").scrollTop = 0;
  refresh();
});
$("map").addEventListener("pointerleave", () => tip(null));

// ---- contexts: unpacked after the list is there ----
async function unpack(run) {
  const pack = $(`pack${run.r}`), text = atob(pack.textContent), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  pack.remove();
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const raw = await new Response(stream).arrayBuffer(), { pairs, length } = run;
  let at = 0;
  const next = (Kind, count) => new Kind(raw, (at += count * Kind.BYTES_PER_ELEMENT) - count * Kind.BYTES_PER_ELEMENT, count);
  const unpacked = {
    start: next(Uint32Array, run.features.length + 1), context: next(Uint32Array, pairs), token: next(Uint32Array, run.distinct * length),
    read: next(Uint16Array, 2 * pairs), kind: next(Uint8Array, pairs), role: next(Uint8Array, pairs), activation: next(Uint8Array, pairs * length),
  };
  const simulation = new Map();  // of a pair: its row of simulated activations
  unpacked.role.forEach((role, n) => { if (role === SIMULATED) simulation.set(n, next(Uint8Array, length)); });
  performance.mark("contexts");
  return { ...unpacked, simulation };
}
const SHOWN = 1, SIMULATED = 3;
const contexts = (run) => run.unpacking ??= unpack(run);

function contextsOf({ run, index }, { start, context, token, read, kind, role, activation, simulation }) {
  const found = [], { length } = run;
  for (let n = start[index]; n < start[index + 1]; n++) {
    const values = activation.subarray(n * length, (n + 1) * length);
    found.push({
      values, ids: token.subarray(context[n] * length, (context[n] + 1) * length), strongest: Math.max(...values),
      kind: kind[n], role: role[n], from: read[2 * n], to: read[2 * n + 1], simulated: simulation.get(n) ?? null,
    });
  }
  return found;
}

function pieces(text) {
  return text.split(/( +|\n|\t)/).filter(Boolean).map((part) => {
    if (!/^[ \n\t]/.test(part)) return visible(part);
    return el("span", { "\n": "nl", "\t": "tab" }[part] ?? "sp", part, part[0] === " " ? {} : { "data-mark": visible(part) });
  });
}

/** A context, each token shaded by its activation; with `strips` bars below it: up what the feature does, down
 *  what the explanation predicts. */
function contextFigure({ run, max }, { values, ids, strongest, role, from, to, simulated }, strips) {
  const spans = Array.from(ids, (id, t) => {
    const unread = t < run.skip || (strips && (t < from || t >= to)), text = run.tokens[id];
    const span = el("span", unread ? "t skipped" : values[t] ? "t on" : "t", pieces(text));
    if (values[t]) span.style.setProperty("--a", (values[t] / 255).toFixed(3));
    if (strips && simulated[t]) span.style.setProperty("--s", (simulated[t] / 255).toFixed(3));
    span.dataset.value = t < run.skip ? "position not looked at" : `${(values[t] / 255 * max).toPrecision(3)}`;
    if (strips && !unread) span.dataset.predicted = (simulated[t] / 255).toFixed(2);
    span.dataset.token = visible(text);
    return span;
  });
  const label = [strongest ? `strongest ${(strongest / 255 * max).toPrecision(3)}` : "silent"];
  if (!strips && role) label.push(el("span", "tag", role === SHOWN ? "shown" : "scored"));
  return el("figure", strips ? "context strips" : "context", [el("pre", "", spans), el("figcaption", "", label)]);
}

// ---- a feature ----
function ruler({ score, control, interval, counting }) {
  const x = (value) => 8 + 112 * (Math.min(1, Math.max(-1, value)) + 1), said = [["score", score], ["control", control], ["counting", counting]];
  const svg = drawing("svg", {
    viewBox: "0 0 240 34", class: "ruler", role: "img",
    "aria-label": `${said.map(([name, value]) => `${name} ${fixed(value)}`).join(", ")}, on a scale from -1 to 1`,
  });
  svg.append(drawing("line", { x1: 8, x2: 232, y1: 14, y2: 14, class: "axis" }));
  for (const tick of [-1, 0, 1]) svg.append(
    drawing("line", { x1: x(tick), x2: x(tick), y1: 9, y2: 19, class: "axis" }),
    drawing("text", { x: x(tick), y: 31, "text-anchor": "middle" }, `${tick}`.replace("-", "−")));
  if (interval) svg.append(drawing("line", { x1: x(interval[0]), x2: x(interval[1]), y1: 14, y2: 14, class: "interval" }));
  if (counting != null) svg.append(drawing("path", { d: `M${x(counting)} 6l5 8l-5 8l-5 -8z`, class: "counting" }));
  if (control != null) svg.append(drawing("circle", { cx: x(control), cy: 14, r: 5, class: "control" }));
  if (score != null) svg.append(drawing("circle", { cx: x(score), cy: 14, r: 6, class: "score" }));
  return svg;
}

function featureLink(run, dim) {
  const other = byId.get(`${run.r ? `r${run.r}` : ""}f${dim}`);
  return other ? el("a", "", `#${dim}`, { href: `#${other.id}` }) : el("span", "", `#${dim}`);
}

/** The figures of an explanation: [name, value, what it says]; those that its journal has. */
function judgements({ about, run }) {
  const { score, control, counting, detection, fuzzing, interval } = about, rows = [];
  const reasoned = (name) => about[`${name}_reason`] ?? "undefined";
  rows.push(["score", score, score == null ? reasoned("score") : interval ? `${interval.map((end) => fixed(end)).join(" to ")} over contexts` : "true against simulated"]);
  if (control != null || about.control_reason) rows.push(["control", control, control == null ? reasoned("control") : about.control_dim != null ? ["the explanation of ", featureLink(run, about.control_dim)] : "another explanation"]);
  if (counting != null || about.counting_reason) rows.push(["counting", counting, counting == null ? reasoned("counting") : "a table of token counts"]);
  if (detection != null || about.detection_reason) rows.push(["detection", detection, detection == null ? reasoned("detection") : "AUROC; 0.5 is chance"]);
  if (fuzzing != null || about.fuzzing_reason) rows.push(["fuzzing", fuzzing, fuzzing == null ? reasoned("fuzzing") : "AUROC; 0.5 is chance"]);
  return rows;
}

function candidatesOf({ about }) {
  const kept = ({ interpretation, explained_by }) => interpretation === about.interpretation && (explained_by ?? null) === (about.explained_by ?? null);
  const sorted = [...about.candidates].sort((a, b) => kept(b) - kept(a) || (b.judged ?? -2) - (a.judged ?? -2));
  return el("table", "candidates", [
    el("caption", "", ["Candidates", el("small", "", "the one that simulates best on contexts of its own is kept")]),
    el("thead", "", el("tr", "", ["made by", "explanation", "judged"].map((text) => el("th", "", text, { scope: "col" })))),
    el("tbody", "", sorted.map((candidate) => {
      const bar = el("i", "bar");
      bar.style.setProperty("--share", Math.max(0, candidate.judged ?? 0));
      return el("tr", kept(candidate) ? "kept" : "", [
        el("td", "", [handMark(candidate.explained_by), candidate.explained_by ?? ""]),
        el("td", "", [candidate.interpretation, kept(candidate) ? el("span", "tag", "kept") : null]),
        el("td", "num", [bar, fixed(candidate.judged)]),
      ]);
    })),
  ]);
}

function explanationOf(feature) {
  const { about, hand } = feature;
  if (!hand) return [el("p", "says faint", "This feature has not been explained.")];
  const cards = judgements(feature).map(([name, value, note]) =>
    el("div", `figure ${name}`, [el("dt", "", name), el("dd", "", fixed(value)), el("dd", "note", note)]));
  const found = [
    el("p", "says", [handMark(hand), el("span", "", about.interpretation)]),
    el("dl", "figures judged", cards), ruler(about),
  ];
  if (about.candidates?.length > 1) found.push(candidatesOf(feature));
  if (about.examples?.length) found.push(el("details", "", [el("summary", "", "Contexts of the explanation"), ...about.examples.map((text) => el("pre", "example", exampleLines(text)))]));
  const by = [hand !== "unnamed" && HANDS[hand].says, about.interpretation_model, about.simulation && `${about.simulation} simulation`].filter(Boolean);
  if (by.length) found.push(el("p", "faint small", by.join("; ")));
  return found;
}

/** An example in a journal of version 0.1: tokens it fires on stand between « and ». */
function exampleLines(text) {
  return text.split(/(«[^»]*»)/).filter(Boolean).map((part) =>
    /^«.*»$/s.test(part) ? el("mark", "", pieces(part.slice(1, -1))) : el("span", "", pieces(part)));
}

function tokensOf({ tokens }) {
  return el("ol", "tokens", tokens.map(({ text, share, fired, seen }) => {
    const bar = el("i", "bar");
    bar.style.setProperty("--share", share);
    return el("li", "", [tokenChip(text), bar, el("span", "num", part(share)),
      el("span", "num faint", `${fired} of ${seen}`, { title: `fires on ${fired} of the ${seen} times it occurs in the kept contexts` })]);
  }));
}

function movedOf(tokens) {
  return el("ol", "moved", tokens.map(({ text, logit }) =>
    el("li", "", [tokenChip(text), logit == null ? null : el("span", "num faint", `${logit > 0 ? "+" : ""}${fixed(logit)}`)])));
}

function neighboursOf({ run, index }) {
  const near = run.near?.[index];
  if (!near) return el("p", "faint small", "Write the report with --autoencoder_path to see them.");
  return el("ol", "near", near.map(([dim, cosine]) => {
    const other = byId.get(`${run.r ? `r${run.r}` : ""}f${dim}`);
    const says = !other ? "not among the samples" : other.interpretation ?? other.tokens.slice(0, 4).map(({ text }) => visible(text)).join("  ");
    return el("li", "", [featureLink(run, dim), el("span", "num", fixed(cosine)), el("span", other ? "" : "faint", says)]);
  }));
}

function section(name, title, about, content) {
  return el("section", name, [el("h3", "", [title, about ? el("small", "", about) : null]), ...[content].flat()]);
}

const KINDS = [
  ["top", "Top", "the contexts it fires on most strongly"],
  ["spread", "Spread", "contexts drawn over its range, strongest first"],
  ["random", "Random", "contexts drawn without looking at it"],
];
const LEGEND = el("p", "legend small", [el("span", "", [el("i", "up"), "up: what the feature does"]), el("span", "", [el("i", "down"), "down: what the explanation predicts"])]);
/** The sections of contexts: scored (true and simulated), shown, and by kind. */
function evidence(feature, found) {
  const grid = (list, strips) => el("div", "contexts", list.map((context) => contextFigure(feature, context, strips)));
  const strongest = (list) => list.sort((a, b) => b.strongest - a.strongest), parts = [];
  const judged = strongest(found.filter(({ simulated }) => simulated)), read = found.filter(({ role }) => role === SHOWN);
  if (judged.length) parts.push(section("scored", "Scored", "true and predicted, on contexts that the explanation was not made from", [LEGEND.cloneNode(true), grid(judged, true)]));
  if (read.length) parts.push(el("details", "shown", [el("summary", "", `Shown: the ${read.length} contexts that the explanation was made from`), grid(read)]));
  KINDS.forEach(([name, title, about], kind) => {
    const list = found.filter((context) => context.kind === kind);
    if (kind === 1) strongest(list);
    parts.push(section(name, title, about, list.length ? grid(list) : el("p", "faint", "none was kept")));
  });
  return parts;
}

async function open(feature) {
  const facts = `fires on ${percent(feature.frequency)} of tokens, up to ${feature.max.toPrecision(3)}`;
  const places = el("div", "evidence", el("p", "faint", "unpacking …")), [promotes, suppresses] = feature.moved;
  const beside = el("div", "beside");
  if (promotes.length || suppresses.length) beside.append(section("effects", "Effect on the next token", "through the decoder row to the logits", el("div", "sides", [
    el("div", "", [el("h4", "", "promotes"), movedOf(promotes)]), el("div", "", [el("h4", "", "suppresses"), movedOf(suppresses)]),
  ])));
  beside.append(section("", "Nearest features", "cosine of the decoder rows", neighboursOf(feature)));
  $("feature").replaceChildren(
    el("header", "", [
      el("div", "", [el("h2", "", `Feature ${feature.dim}`, { tabindex: "-1" }), el("p", "faint", several ? `${feature.run.name}; ${facts}` : facts)]),
      el("nav", "", [
        button("↑", "previous feature (arrow up)", () => step(-1)), button("↓", "next feature (arrow down)", () => step(1)),
        button("×", "close (Esc)", close),
      ], { "aria-label": "features" }),
    ]),
    el("section", "explanation", explanationOf(feature)),
    el("div", "two", [section("", "Tokens", "share of its activation, times it fired", tokensOf(feature)), beside]),
    places,
  );
  $("detail").scrollTop = 0;
  const unpacked = await contexts(feature.run);
  if (feature === current) places.replaceChildren(...evidence(feature, contextsOf(feature, unpacked)));
}

// ---- the overview ----
const FIGURES = [
  ["l0", "L0", "features that fire on a token", (value) => value.toFixed(1)],
  ["explained_variance", "explained variance", "of the activations; 1 is all", (value) => value.toFixed(3)],
  ["loss_recovered", "loss recovered", "with it in the model; 1 is all", (value) => value.toFixed(3)],
  ["dead_share", "dead", "features that never fire", (value) => `${(100 * value).toFixed(1)}%`],
];
const figure = (run, [key, , , style]) => run.metrics[key] == null ? "–" : style(run.metrics[key]);
const card = (label, value, note) => el("div", "figure", [el("dt", "", label), el("dd", "", value), el("dd", "note", note)]);
const beats = ({ about: { score, control, interval } }) => (interval ? interval[0] : score) > control;

function summaryOf(list) {
  const both = list.filter(({ score, control }) => score != null && control != null);
  return {
    score: median(list.map(({ score }) => score)), control: median(list.map(({ control }) => control)),
    counting: median(list.map(({ about }) => about.counting)), beat: both.length ? both.filter(beats).length / both.length : null,
  };
}

function chart({ counts, lowest, config, seen, features: listed, dead }) {
  const most = Math.max(1, ...counts), width = 100 / counts.length, place = (log) => 100 * (Math.min(0, Math.max(lowest, log)) - lowest) / -lowest;
  const band = config.log_freq_lower == null ? null : [config.log_freq_lower, config.log_freq_upper];
  const bars = counts.flatMap((count, i) => !count ? [] : drawing("rect", {
    x: i * width, width: 0.86 * width, y: 100 - 96 * count / most, height: 96 * count / most,
  }, drawing("title", {}, `${whole(count)} features, from ${percent(10 ** (lowest * (1 - i / counts.length)))} on`)));
  const svg = drawing("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img", "aria-label": "histogram of how often features fire" });
  if (band) svg.append(drawing("rect", { class: "band", x: place(band[0]), width: place(band[1]) - place(band[0]), y: 0, height: 100 }));
  svg.append(drawing("g", { class: "bars" }, bars));
  const ticks = el("div", "ticks"), share = (log) => `${Number((100 * 10 ** log).toPrecision(2))}%`;
  for (let power = lowest; power <= 0; power++) {
    const tick = el("span", "", share(power));
    tick.style.left = `${place(power)}%`;
    ticks.append(tick);
  }
  const caption = [`${whole(listed.length)} features `, band ? `fire on ${share(band[0])} to ${share(band[1])} of tokens and are listed here` : "are listed here", `. ${whole(dead)} fired on no token looked at.`];
  if (band) caption.unshift(el("i", "swatch"), " ");
  return el("figure", "chart", [svg, ticks, el("figcaption", "small faint", caption), ...[`share of ${whole(seen)} tokens`].map((text) => el("p", "small faint", text))]);
}

function runTable() {
  const heads = ["run", ...FIGURES.map(([, label]) => label), "listed", "explained", "score", "control"];
  const body = runs.map((run) => {
    const own = explained.filter((feature) => feature.run === run), { score, control } = summaryOf(own);
    const only = button(run.name, `show the features of this run alone: ${run.name}`, () => { $("run").value = `${run.r}`; refresh(); });
    return el("tr", "", [el("th", "", only, { scope: "row" }), ...[...FIGURES.map((style) => figure(run, style)), whole(run.features.length), whole(own.length), fixed(score), fixed(control)].map((text) => el("td", "num", text))]);
  });
  return el("div", "wide", el("table", "runs", [el("thead", "", el("tr", "", heads.map((text, i) => el("th", i ? "num" : "", text, { scope: "col" })))), el("tbody", "", body)]), { tabindex: "0", role: "group", "aria-label": "runs" });
}

function facts({ config, fingerprints, name }) {
  const trained = [
    `${whole(config.trained_tokens ?? 0)} tokens`, config.architecture ?? "relu", config.k && `k ${config.k}`,
    config.l1_coefficient != null && `l1 ${config.l1_coefficient}`, config.learning_rate && `learning rate ${config.learning_rate}`,
    config.normalize_dataset && "normalised", config.skip_positions && `without the first ${config.skip_positions} positions of a context`,
  ].filter(Boolean).join(", ");
  const rows = [["model", config.model_name], ["trained on", trained], ["autoencoder", fingerprints.autoencoder], ["dataset", fingerprints.dataset]];
  if (several) rows.unshift(["run", name]);
  return el("dl", "facts-list", rows.flatMap(([label, value]) => [el("dt", "", label), el("dd", "", value)]));
}

function overview() {
  const models = [...new Set(runs.map(({ config }) => config.model_name.split("/").at(-1)))];
  const hooks = [...new Set(runs.map(({ config }) => config.hookpoint))], { config } = runs[0];
  const parts = [
    el("div", "", [el("h1", "", models.join(", ")), el("p", "faint", [
      el("code", "", hooks.join(", ")), several ? `, ${runs.length} runs` : `, ${whole(config.act_vec_size)} dimensions in ${whole(config.dict_vec_size)} features`,
    ])]),
    el("p", "jump", el("a", "", `Browse the ${whole(features.length)} features ↓`, { href: "#browse" })),
    several ? section("", "Runs", "of one page", runTable())
      : section("", "Autoencoder", "on contexts that training did not see", el("dl", "figures", FIGURES.map((style) => card(style[1], figure(runs[0], style), style[2])))),
  ];
  if (runs.some(({ metrics }) => !Object.keys(metrics).length)) parts.push(el("p", "faint small", "No metrics.jsonl was found for some: give --autoencoder_path or --metrics to see the figures."));
  if (explained.length) {
    const { score, control, counting, beat } = summaryOf(explained), won = Object.keys(HANDS).map((hand) => [hand, explained.filter((feature) => feature.hand === hand).length]).filter(([, count]) => count);
    parts.push(section("", "Explanations", `of ${whole(explained.length)} features`, [
      el("dl", "figures", [
        card("median score", fixed(score), "1: predicts exactly where it fires"), card("median control", fixed(control), "another feature's explanation"),
        card("median counting", fixed(counting), "a plain table of token counts"), card("beat their control", beat == null ? "–" : `${(100 * beat).toFixed(0)}%`, "lower end of the interval above it"),
      ]),
      el("p", "legend small", won.map(([hand, count]) => el("span", "", [handMark(hand), `${hand === "unnamed" ? "explained" : hand} ${whole(count)}`]))),
    ]));
  }
  parts.push(
    section("", "How often features fire", "", el("div", "charts", runs.map((run) => el("div", "", [several ? el("h4", "", run.name) : null, chart(run)])))),
    section("", "Reading it", "", [
      el("p", "small", ["Search for a word of the language, such as ", el("code", "", "import"), ": the features that spend most of their activation on that token come first. In a feature, the darker a token, the stronger it fires there."]),
      el("p", "small", "The score says how well the explanation alone predicts where the feature fires (1: exactly, 0: not at all). Beside it stand the control, the same for another feature's explanation, and counting, what a plain table of tokens reaches on the same contexts. Trust a score that stands well above its control; a sentence that knows more than a count stands above counting too."),
    ]),
    el("div", "keys small", [["/", "search"], ["↑ ↓", "previous and next feature"], ["Enter", "open the first one found"], ["Esc", "clear the search, close the feature"]].flatMap(([key, text]) => [el("kbd", "", key), el("span", "", text)])),
    ...runs.map(facts),
  );
  $("overview").replaceChildren(...parts);
}

// ---- moving about ----
let scrolled = 0;
function route() {
  const feature = byId.get(location.hash.slice(1)) ?? null;
  if (feature === current) return;
  if (!current) scrolled = scrollY;
  const closed = current && !feature;
  current = feature;
  document.body.classList.toggle("open", Boolean(feature));
  $("feature").hidden = !feature;
  $("overview").hidden = Boolean(feature);
  document.title = feature ? `Feature ${feature.dim}` : TITLE;
  tip(null);
  if (feature) { open(feature); scrollTo(0, 0); }
  if (closed) scrollTo(0, scrolled);
  reveal();
  draw();
  locate();
}
const TITLE = document.title;
const close = () => { location.hash = ""; };
function step(by) {
  const at = shown.indexOf(current);
  const next = shown[at < 0 ? (by > 0 ? 0 : shown.length - 1) : at + by];
  if (!next) return;
  location.replace(`#${next.id}`);
  route();
}

/** A small box beside a place: a box on the screen, and a point in it where that is what is meant. */
function tip(content, box, point) {
  const node = $("tip");
  node.hidden = !content;
  if (!content) return;
  node.replaceChildren(...content);
  const left = box.left + (point?.[0] ?? 0), top = box.top + (point ? point[1] - 8 : 0), own = node.getBoundingClientRect();
  node.style.left = `${Math.max(4, Math.min(left, innerWidth - own.width - 8))}px`;
  node.style.top = `${top > own.height + 8 ? top - own.height - 4 : (point ? top + 20 : box.bottom + 4)}px`;
}

function option(value, text) {
  return el("option", "", text, { value });
}
/** Only the filters that choose anything here. */
function fillFilters() {
  const hands = Object.keys(HANDS).filter((hand) => explained.some((feature) => feature.hand === hand));
  $("hand").append(option("", "any hand"), ...hands.map((hand) => option(hand, hand === "unnamed" ? "explained" : `${HANDS[hand].mark} ${hand}`)), option("null", "not explained"));
  const types = [...new Set(runs.map(({ layerType }) => layerType))];
  $("layer_type").append(option("", "any layer type"), ...types.map((type) => option(type, type)));
  $("run").append(option("", "all runs"), ...runs.map(({ r, name }) => option(`${r}`, name)));
  $("layer_type").hidden = types.length < 2;
  $("run").hidden = !several;
  $("map").toggleAttribute("hidden", !scored.length);
  $("filter").open = innerWidth >= 1000;
}

addEventListener("hashchange", route);
addEventListener("resize", () => { drawn = null; draw(); plot(); });
addEventListener("beforeprint", () => { printing = true; drawn = null; draw(); });
addEventListener("afterprint", () => { printing = false; drawn = null; draw(); });
document.addEventListener("scroll", () => { draw(); tip(null); }, { capture: true, passive: true });
for (const id of ["search", ...LIMITS, ...CHOICES]) $(id).addEventListener(CHOICES.includes(id) ? "change" : "input", () => { $("list").scrollTop = 0; refresh(); });
$("filter").addEventListener("toggle", plot);
$("reset").addEventListener("click", () => {
  for (const id of [...LIMITS, ...CHOICES]) $(id).value = "";
  refresh();
});
for (const head of document.querySelectorAll("[data-sort]")) head.addEventListener("click", () => {
  const key = head.dataset.sort, up = ["dim", "interpretation", "first"].includes(key);
  sort = sort?.key === key ? { key, up: !sort.up } : { key, up };
  refresh();
});
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const search = $("search"), field = document.activeElement, typing = field === search;
  if (!typing && field.matches("input, select") && event.key !== "Escape") return;
  if (event.key === "/" && !typing) search.focus(), search.select();
  else if (event.key === "Escape" && typing) { if (search.value) search.value = "", refresh(); else search.blur(); }
  else if (event.key === "Escape" && field.matches("input, select")) field.blur();
  else if (event.key === "Escape" && current) close();
  else if (event.key === "ArrowDown" || (event.key === "ArrowRight" && !typing)) step(1);
  else if (event.key === "ArrowUp" || (event.key === "ArrowLeft" && !typing)) step(-1);
  else if (event.key === "Enter" && typing && shown.length) { search.blur(); location.hash = `#${shown[0].id}`; }
  else return;
  event.preventDefault();
});
document.addEventListener("pointerover", (event) => {
  const token = event.target.closest?.(".t");
  if (!token) return event.target.closest?.("#map") ? undefined : tip(null);
  const { value, predicted, token: text } = token.dataset;
  tip([el("b", "", predicted == null ? value : `${value}, predicted ${predicted}`), ` ${text}`], token.getClientRects()[0]);
});

fillFilters();
overview();
refresh();
route();
performance.mark("list");
requestAnimationFrame(() => setTimeout(() => runs.forEach(contexts)));
